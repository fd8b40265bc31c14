"""A batch in which samples were given different patterns, run pattern by pattern: each at the speed of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from regard.kernels.request import Request
from regard.patterns import Full, Pattern
from regard.patterns.decided import Routed, both

__all__ = ["run_by_choice"]

Run = Callable[[Request], tuple[Tensor, Tensor | None]]


def run_by_choice(request: Request, run: Run) -> tuple[Tensor, Tensor | None] | None:
    """``(out, lse or None)`` of a `Routed.choose` of one decision a sample; None for every other request.

    The samples of each chosen pattern go through ``run`` together, under that pattern alone.
    """
    r = request
    routed = r.pattern
    if not isinstance(routed, Routed) or routed.which is None or routed.patterns is None or routed.decisions > 1:
        return None
    if any(p is not None and p.samples is not None for p in (routed.within, routed.keep)):
        return None
    which = routed.which[:, 0].to(r.q.device)
    chosen = which.unique().tolist()
    if len(chosen) == 1:
        return run(replace(r, pattern=_alone(routed, chosen[0]), layout=None))
    rows = [(which == choice).nonzero()[:, 0] for choice in chosen]
    found = [run(_part(r, at, _alone(routed, choice))) for at, choice in zip(rows, chosen, strict=True)]
    back = torch.cat(rows).argsort()
    out = torch.cat([out for out, _ in found]).index_select(0, back)
    lses = [lse for _, lse in found if lse is not None]
    return out, torch.cat(lses).index_select(0, back) if lses else None


def _alone(routed: Routed, choice: int) -> Pattern:
    """What the samples that were given this pattern may see."""
    assert routed.patterns is not None
    pattern = routed.patterns[choice]
    if isinstance(pattern, Full):
        return Full() if routed.within is None else routed.within
    found = both(pattern if routed.keep is None else pattern | routed.keep, routed.within)
    return pattern if found is None else found


def _part(r: Request, at: Tensor, pattern: Pattern) -> Request:
    bias = r.bias if r.bias is None or r.bias.shape[0] == 1 else r.bias.index_select(0, at)
    q, k, v = (x.index_select(0, at) for x in (r.q, r.k, r.v))
    return replace(r, q=q, k=k, v=v, bias=bias, pattern=pattern, layout=None)
