"""Sets of half-open intervals, one set a row, as a tensor ``[rows, m, 2]``; empties are ``(0, 0)``."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["clip", "complement", "intersect", "length", "union"]

FEW = 16  # intervals that are met each with each


def clip(sets: Int[Tensor, "rows m 2"], limit: int) -> Int[Tensor, "rows m_out 2"]:
    """Clip to ``[0, limit)``, drop empties, sort, and merge what overlaps or abuts. Sets in order are not sorted."""
    rows, m = sets.shape[:2]
    if rows == 0 or m == 0:
        return sets.new_zeros(rows, 0, 2)
    lo, hi = np.ascontiguousarray(np.moveaxis(sets.cpu().numpy(), -1, 0).clip(0, limit))
    there = lo < hi
    if (
        not (lo[:, 1:] >= lo[:, :-1]).all()
        and (np.maximum.accumulate(np.where(there, lo, -1), axis=1) > np.where(there, lo, limit)).any()
    ):
        order = np.where(there, lo, limit).argsort(axis=1)  # empties sort last
        lo, hi, there = (np.take_along_axis(x, order, 1) for x in (lo, hi, there))
    reach = np.maximum.accumulate(np.where(there, hi, -1), axis=1)
    opens = there.copy()
    opens[:, 1:] &= lo[:, 1:] > reach[:, :-1]
    closes = reach >= 0  # an interval ends before the next one opens, the last one at the end of the row
    closes[:, :-1] &= opens[:, 1:]
    total = opens.sum(1)
    width = int(total.max())
    found = np.stack([lo[opens], reach[closes]], axis=-1)
    if (total == width).all():
        out = found.reshape(rows, width, 2)
    else:
        out = np.zeros((rows, width, 2), found.dtype)
        out[np.arange(width) < total[:, None]] = found
    return torch.from_numpy(out).to(sets.device)


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
    """What is in both sets (which must be sorted and disjoint, as ``clip`` leaves them)."""
    if a.shape[1] * b.shape[1] <= FEW:  # each interval with each, which come out in order
        lo = torch.maximum(a[:, :, None, 0], b[:, None, :, 0])
        hi = torch.minimum(a[:, :, None, 1], b[:, None, :, 1])
        return clip(torch.stack([lo, hi], -1).flatten(1, 2), limit)
    return complement(union(complement(a, limit), complement(b, limit), limit), limit)


def length(a: Int[Tensor, "rows m 2"]) -> Int[Tensor, "rows"]:
    """Number of indices in each set."""
    return (a[..., 1] - a[..., 0]).clamp(min=0).sum(-1)
