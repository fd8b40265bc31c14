"""Sets of half-open intervals, one set a row, as a tensor ``[rows, m, 2]``; empties are ``(0, 0)``."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["clip", "complement", "intersect", "length", "union"]


def clip(sets: Int[Tensor, "rows m 2"], limit: int) -> Int[Tensor, "rows m_out 2"]:
    """Clip to ``[0, limit)``, drop empties, sort, and merge what overlaps or abuts."""
    rows, m = sets.shape[:2]
    if rows == 0 or m == 0:
        return sets.new_zeros(rows, 0, 2)
    lo, hi = sets.clamp(0, limit).unbind(-1)
    lo = torch.where(lo < hi, lo, limit + 1)  # empties sort last
    lo, order = lo.sort(dim=1)
    hi = hi.gather(1, order)
    there = lo <= limit
    reach = torch.where(there, hi, -1).cummax(dim=1).values
    opens = torch.ones_like(there)
    opens[:, 1:] = lo[:, 1:] > reach[:, :-1]
    slot = (opens & there).cumsum(1) - 1
    width = int(slot.max()) + 1
    out = sets.new_zeros(rows, width + 1, 2)  # the last column takes what is not there
    slot = torch.where(there, slot, width)
    out[..., 0] = limit + 1
    out[..., 0].scatter_reduce_(1, slot, lo, "amin")
    out[..., 1].scatter_reduce_(1, slot, torch.where(there, hi, 0), "amax")
    out = out[:, :width]
    return torch.where((out[..., :1] < out[..., 1:]), out, 0)


def union(a: Int[Tensor, "rows m 2"], b: Int[Tensor, "rows n 2"], limit: int) -> Int[Tensor, "rows k 2"]:
    """What is in either set."""
    return clip(torch.cat([a, b], dim=1), limit)


def complement(a: Int[Tensor, "rows m 2"], limit: int) -> Int[Tensor, "rows k 2"]:
    """What of ``[0, limit)`` is not in the set (which must be sorted and disjoint, as ``clip`` leaves it)."""
    rows = a.shape[0]
    lo = torch.where(a[..., 0] < a[..., 1], a[..., 0], limit)
    hi = torch.where(a[..., 0] < a[..., 1], a[..., 1], limit)
    starts = torch.cat([a.new_zeros(rows, 1), hi], dim=1)
    ends = torch.cat([lo, a.new_full((rows, 1), limit)], dim=1)
    return clip(torch.stack([starts, ends], dim=-1), limit)


def intersect(a: Int[Tensor, "rows m 2"], b: Int[Tensor, "rows n 2"], limit: int) -> Int[Tensor, "rows k 2"]:
    """What is in both sets."""
    return complement(union(complement(a, limit), complement(b, limit), limit), limit)


def length(a: Int[Tensor, "rows m 2"]) -> Int[Tensor, "rows"]:
    """Number of indices in each set."""
    return (a[..., 1] - a[..., 0]).clamp(min=0).sum(-1)
