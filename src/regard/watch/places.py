"""From a site to the module and the door at which its tensor is met, and how to take and give it there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.site import Site


@dataclass(frozen=True)
class Place:
    """A module and how the tensor is met there.

    `door` is "input" or "output" (first floating tensor), "in_place" (the input, changed where it lies because another
    branch reads the same tensor), "logits" (of the model's output) or "attention" (then `part` says which tensor).
    """

    module: str
    door: str
    part: str = ""


def place_of(site: Site, model: nn.Module, anatomy: Callable[[], Anatomy]) -> Place:
    """Where the tensor of `site` is met. `anatomy()` is asked only if names do not settle it.

    Raises:
        LookupError: if the model has no such part, saying why and how to give it.
    """
    if site.in_attention:
        return Place(_attention(site, model, anatomy), "attention", site.part)
    if site.part == "logits":
        return Place("", "logits")
    parts = anatomy()
    if site.part == "embed":
        return Place(_known(parts.embed, site, parts, "embed"), "output")
    if site.part == "final":
        return Place(parts.final_norm if parts.final_norm is not None else parts.blocks[-1], "output")
    assert site.layer is not None
    at = parts.block(site.layer)
    if site.part == "resid_pre":
        return Place(parts.blocks[at], "input")
    if site.part == "resid_post":
        return Place(parts.blocks[at], "output")
    if site.part == "mlp_out":
        return Place(_known(parts.mlp[at], site, parts, "mlp"), "output")
    if site.part == "attn_out":
        if site.layer == parts.cross[at]:
            return Place(_known(parts.cross_out[at], site, parts, "cross_out"), "output")
        return Place(_known(parts.attn_out[at], site, parts, "attn_out"), "output")
    if parts.parallel[at]:
        raise LookupError(
            f"{site}: {parts.blocks[at]} is a parallel block: attention and MLP both read resid_pre, so there is no "
            "stream between them; use attn_out, mlp_out, resid_pre or resid_post"
        )
    mid = parts.mid[at]
    if mid is None:
        _known(None, site, parts, "mid")
        raise AssertionError
    return Place(mid[0], "output" if mid[1] == "output" else "in_place")


def _attention(site: Site, model: nn.Module, anatomy: Callable[[], Anatomy]) -> str:
    assert site.layer is not None
    if isinstance(site.layer, int):
        return anatomy().attention(site.layer)
    try:
        return anatomy().attention(site.layer)
    except (ValueError, KeyError):
        # Without inputs to probe with, or outside the blocks, a module's name is enough for attention.
        if site.layer in dict(model.named_modules(remove_duplicate=False)):
            return site.layer
        raise


def _known(name: str | None, site: Site, parts: Anatomy, field: str) -> str:
    if name is None:
        why = parts.missing.get(field, f"{field} was not found; give {field}= to anatomy()")
        raise LookupError(f"{site}: {why}, and pass the result as anatomy=")
    return name


def read_input(args: tuple, kwargs: dict) -> tuple[Tensor, int | str]:
    """The first floating tensor among a module's arguments, and where it stands."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and x.is_floating_point():
            return x, i
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            return x, name
    raise RuntimeError("the module was called without a floating tensor")


def write_input(args: tuple, kwargs: dict, slot: int | str, new: Tensor) -> tuple[tuple, dict]:
    """The arguments with another tensor at `slot`."""
    if isinstance(slot, int):
        return (*args[:slot], new, *args[slot + 1 :]), kwargs
    return args, {**kwargs, slot: new}


def replace_first(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first floating tensor of a module's output (a tensor, a tuple, a mapping), and how to put another there."""
    if isinstance(output, Tensor):
        return output, lambda new: new
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    for key, x in items:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x, partial(_with, output, key)
    raise RuntimeError(f"the module returned {type(output).__name__} without a floating tensor")


def find_logits(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The scores a model returns: its `logits`, or the tensor it returns."""
    if isinstance(output, Tensor):
        return output, lambda new: new
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return output["logits"], partial(_with, output, "logits")
        raise LookupError(
            f"the model returns {type(output).__name__} with {', '.join(map(str, output))}, and no logits: "
            "use part 'final', or the model's class with a head"
        )
    if isinstance(output, (tuple, list)):
        for i, x in enumerate(output):
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2:
                return x, partial(_with, output, i)
    raise LookupError(f"the model returns {type(output).__name__}, in which no logits are known")


def _with(output: Any, key: Any, new: Tensor) -> Any:
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[key] = new  # type: ignore[index]
        return changed
    items = [new if i == key else x for i, x in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
