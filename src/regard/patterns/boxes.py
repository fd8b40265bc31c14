"""Runs of row-major tokens as boxes of a grid, and products of intervals as flat intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows

__all__ = ["axis_rows", "flat_intervals", "run_boxes"]


def run_boxes(
    q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], shape: Sequence[int]
) -> tuple[Int[Tensor, "runs boxes axes 2"], Bool[Tensor, "runs boxes"]]:
    """The flat runs ``[q0, q1)`` as disjoint boxes ``[lo_d, hi_d)``, and which of the boxes are there.

    Below the first axis where the run's two ends differ, each axis gives one box behind the first end and one before
    the last: at most 2 axes - 1 of them.
    """
    axes = len(shape)
    size = torch.tensor(shape, device=q0.device)
    step = torch.tensor([prod(shape[d + 1 :]) for d in range(axes)], device=q0.device)
    first, last = q0[:, None] // step % size, (q1[:, None] - 1) // step % size
    boxes = q0.new_zeros(len(q0), 2 * axes, axes, 2)
    for d in range(axes):
        split = (first[:, :d] != last[:, :d]).any(1)
        end = d == axes - 1  # the two end tokens themselves belong to the boxes of the last axis
        for slot, corner in ((2 * d, first), (2 * d + 1, last)):
            boxes[:, slot, :d, 0], boxes[:, slot, :d, 1] = corner[:, :d], corner[:, :d] + 1
            boxes[:, slot, d + 1 :, 1] = size[d + 1 :]
        after = first[:, d] + (not end)
        boxes[:, 2 * d, d, 0] = after
        boxes[:, 2 * d, d, 1] = torch.where(split, size[d], torch.maximum(last[:, d] + end, after))
        boxes[:, 2 * d + 1, d, 1] = torch.where(split, last[:, d] + end, 0)
    there = (boxes[..., 0] < boxes[..., 1]).all(-1)
    return boxes, there


def axis_rows(pattern: Pattern, lo: Int[Tensor, "n"], hi: Int[Tensor, "n"], length: int) -> Rows | None:
    """`rows` of one axis for runs that may cross its cuts: any = union, all = intersection of the pieces."""
    cuts = pattern.cuts(0, length)
    if not len(cuts) or not len(lo):
        return pattern.rows(lo, hi, length)
    cuts, lo, hi = cuts.to(lo.device), lo.contiguous(), hi.contiguous()
    before, after = torch.searchsorted(cuts, lo, right=True), torch.searchsorted(cuts, hi)
    pieces = after - before + 1
    whole = pieces.cumsum(0) - pieces
    run = torch.repeat_interleave(torch.arange(len(lo), device=lo.device), pieces)
    nth = torch.arange(len(run), device=lo.device) - whole[run]
    edge = before[run] + nth
    a = torch.where(nth == 0, lo[run], cuts[(edge - 1).clamp(min=0)])
    b = torch.where(nth == pieces[run] - 1, hi[run], cuts[edge.clamp(max=len(cuts) - 1)])
    rows = pattern.rows(a, b, length)
    if rows is None:
        return None

    def joined(sets: Tensor) -> Tensor:
        out = sets.new_zeros(len(lo), int(pieces.max()), *sets.shape[1:])
        out[run, nth] = sets
        return iv.clip(out.flatten(1, 2), length)

    return Rows(joined(rows.any), iv.complement(joined(iv.complement(rows.all, length)), length), rows.exact)


def flat_intervals(sets: Sequence[Int[Tensor, "boxes _ 2"]], shape: Sequence[int]) -> Int[Tensor, "boxes m 2"]:
    """The row-major indices of products of interval sets, one set an axis; neither merged nor sorted.

    An axis whose inner axes are whole stays intervals, any other gives one piece for each of its coordinates.
    """
    inner, size = sets[-1], shape[-1]
    for keys, length in zip(reversed(sets[:-1]), reversed(shape[:-1]), strict=True):
        whole = (inner[:, 0, 0] == 0) & (inner[:, 0, 1] == size) if inner.shape[1] else inner.new_zeros(1).bool()
        if whole.all():
            inner = keys * size
        else:
            coordinate, there = _coordinates(keys)
            pieces = coordinate[:, :, None, None] * size + inner[:, None]
            empty = (~there)[:, :, None] | (inner[:, None, :, 0] >= inner[:, None, :, 1])
            inner = pieces.masked_fill(empty[..., None], 0).flatten(1, 2)
        size *= length
    return inner


def _coordinates(sets: Tensor) -> tuple[Tensor, Tensor]:
    """Every member of each set, ``[boxes, most]``, and which entries are there."""
    size = (sets[..., 1] - sets[..., 0]).clamp(min=0)
    total = size.sum(1)
    nth = torch.arange(int(total.max()) if len(total) else 0, device=sets.device).expand(len(sets), -1).contiguous()
    if not sets.shape[1]:
        return nth, torch.zeros_like(nth, dtype=torch.bool)
    ends = size.cumsum(1)
    piece = torch.searchsorted(ends, nth, right=True).clamp(max=sets.shape[1] - 1)
    member = sets[..., 0].gather(1, piece) + nth - (ends - size).gather(1, piece)
    return member, nth < total[:, None]
