"""What lies before, around and after the blocks: their list, the embedding, the last norm, the last projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regard.watch.probe import Probe


def blocks(model: nn.Module, seen: Probe) -> tuple[str, ...]:
    """The items of the ModuleList (or Sequential) that hold one self-attention each.

    Of nested lists the one with most such items wins; on equal counts a ModuleList, then the outermost.
    """
    names = list(dict.fromkeys(c.layer for c in seen.calls))
    own = {c.layer for c in seen.calls if c.kind == "self"} or set(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    for name in names:
        parts = name.split(".")
        best: tuple[tuple[int, bool, int], str] | None = None
        for depth in range(len(parts)):
            holder, item = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
            if not isinstance(modules[holder], (nn.ModuleList, nn.Sequential)):
                continue
            inside: dict[str, int] = {}
            for other in own:
                if not holder or other.startswith(holder + "."):
                    key = ".".join(other.split(".")[: depth + 1])
                    inside[key] = inside.get(key, 0) + 1
            if inside.get(item) == 1 and max(inside.values()) == 1:
                rank = (len(inside), isinstance(modules[holder], nn.ModuleList), -depth)
                if best is None or rank > best[0]:
                    best = (rank, item)
        # Outside any list: the module around the attention.
        block = best[1] if best else ".".join(parts[:-1])
        if block not in found:
            found.append(block)
    starts = {e.name: e.start for e in reversed(seen.events)}
    return tuple(sorted(found, key=lambda b: starts.get(b, 0)))


def embed(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> str | None:
    """The module that turns tokens or patches into vectors."""
    said = _said(model, "get_input_embeddings")
    if said is not None:
        return said
    first = next((e for e in seen.events if e.name in blocks), None)
    if first is None or first.given is None:
        return None
    before = [e for e in seen.events if 0 <= e.end < first.start and e.result is not None]
    before = [e for e in before if e.result.ndim == 3 and e.result.shape[-1] == first.given.shape[-1]]  # type: ignore[union-attr]
    if not before:
        return None
    earliest = min(before, key=lambda e: (not e.integers, e.end))
    # A module that only passes on what its last child returned is the one to name.
    same = [e for e in before if e.start <= earliest.start and e.end >= earliest.end]
    same = [e for e in same if e.result.shape == earliest.result.shape and torch.equal(e.result, earliest.result)]  # type: ignore[union-attr,arg-type]
    return max(same, key=lambda e: e.end).name


def unembed(model: nn.Module, seen: Probe) -> str | None:
    """The linear module whose result is the model's."""
    said = _said(model, "get_output_embeddings")
    if said is not None:
        return said
    modules = dict(model.named_modules())
    for e in reversed(seen.events):
        if seen.output is None or e.result is None or not isinstance(modules[e.name], nn.Linear):
            continue
        if e.result.shape == seen.output.shape and torch.equal(e.result, seen.output):
            return e.name
    return None


def final_norm(model: nn.Module, blocks: tuple[str, ...], seen: Probe) -> str | None:
    """The norm that reads what the last block returned; None where the model has none."""
    modules = dict(model.named_modules())
    last = max((e for e in seen.events if e.name in blocks), key=lambda e: e.end, default=None)
    if last is None or last.result is None:
        return None
    for e in seen.events:
        after = e.start > last.end and "norm" in type(modules[e.name]).__name__.lower()
        if after and e.given is not None and e.given.shape == last.result.shape and torch.equal(e.given, last.result):
            return e.name
    return None


def _said(model: nn.Module, method: str) -> str | None:
    """The name of the module that a transformers model says it is."""
    ask: Any = getattr(model, method, None)
    try:
        said = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, m in model.named_modules() if m is said), None)
