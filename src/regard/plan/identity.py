"""Which model a plan is for, and how another one differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from regard.watch.provenance import fingerprint, model_name

__all__ = ["differences", "identity"]


def identity(model: nn.Module, layers: Iterable[str]) -> dict[str, Any]:
    """Class, name, parameters and their fingerprint, and the shapes of the attention modules; for JSON."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "name": model_name(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint(model),
        "attention": {name: _shapes(modules.get(_module(name))) for name in layers},
    }


def differences(wanted: Mapping[str, Any], model: nn.Module, weights: bool = True) -> list[str]:
    """What sets a model apart from the one described, most telling first; ``weights=False``: but for their values."""
    here = identity(model, wanted["attention"])
    if weights and here["fingerprint"] == wanted["fingerprint"]:
        return []
    found = []
    if here["class"] != wanted["class"]:
        found.append(f"it is a {here['class']}, the plan is for a {wanted['class']}")
    if here["parameters"] != wanted["parameters"]:
        found.append(f"it has {here['parameters']:,} parameters, the plan's model {wanted['parameters']:,}")
    for name, shapes in wanted["attention"].items():
        mine = here["attention"][name]
        if mine is None:
            found.append(f"it has no module {_module(name)!r}")
        elif mine != shapes:
            odd = sorted(set(map(str, (shapes or {}).items())) ^ set(map(str, mine.items())))
            found.append(f"{name} has other weights: {', '.join(odd[:2])}")
        if len(found) > 4:
            break
    if weights and not found:
        found.append(
            f"its weights are others (fingerprint {here['fingerprint']}, the plan's {wanted['fingerprint']}), so what "
            "was measured of the heads need not hold; any_weights=True applies the plan all the same"
        )
    return found


def _module(label: str) -> str:
    return label.split("#")[0]


def _shapes(module: nn.Module | None) -> dict[str, list[int]] | None:
    return None if module is None else {name: list(p.shape) for name, p in module.named_parameters()}
