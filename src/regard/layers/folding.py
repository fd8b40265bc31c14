"""Grids whose groups run as a batch of dense problems: windows, strided grids, rows, columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MOST_MASKED = 1024  # tokens of a group that still gets a mask of all its pairs
LEAST_FILLED = 0.4  # share of a group's pairs that must be allowed for dense to be worth it


@dataclass(frozen=True, eq=False)
class Folding:
    """Groups of tokens that see no other group.

    Attributes:
        table: tokens of each group, -1 for padding; slots are row-major over ``sizes``.
        sizes: tokens of a group along each axis.
        slot: where each token stands in the flattened table.
        mask: which pairs of slots are allowed, one mask for all groups or one each; None: all.
    """

    table: Int[Tensor, "groups slots"]
    sizes: tuple[int, ...]
    slot: Int[Tensor, "length"]
    mask: Bool[Tensor, "groups_or_1 slots slots"] | None


def axis_mask(axis: Any, n: int) -> Bool[Tensor, "n n"]:
    """All pairs of one axis of n coordinates."""
    place = torch.arange(n)
    return axis.allows(place[:, None], place[None]).expand(n, n)


def axis_groups(mask: Bool[Tensor, "n n"]) -> Int[Tensor, "groups size"]:
    """The classes of an axis whose pairs are an equivalence (-1 pads short ones); else one group of everything."""
    n = len(mask)
    label = mask.int().argmax(1)
    if not torch.equal(mask, label[:, None] == label[None]):
        return torch.arange(n)[None]
    members = [(label == first).nonzero().flatten() for first in label.unique()]
    return torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)


def fold(grid: Any) -> Folding | None:
    """The folding of a grid; None where groups are too large or too sparse to run dense.

    Axes that are an equivalence (`Blocks`, `Congruent`, `Same`, `Full`, `Segments`) fall apart into their classes; any
    other axis stays whole and is masked. A mask is taken up to ``MOST_MASKED`` tokens a group and down to
    ``LEAST_FILLED`` of its pairs.
    """
    shape = tuple(grid.shape)
    masks = [axis_mask(axis, n) for axis, n in zip(grid.axes, shape, strict=True)]
    if not all(bool(m.any(1).all()) for m in masks):
        return None  # queries without a key: attend has them
    groups = [axis_groups(m) for m in masks]
    sizes = tuple(g.shape[1] for g in groups)
    pairs = [_pairs(m, g) for m, g in zip(masks, groups, strict=True)]
    if any(p is not None for p in pairs):
        filled = math.prod(int(m.sum()) / int(((g >= 0).sum(1) ** 2).sum()) for m, g in zip(masks, groups, strict=True))
        if math.prod(sizes) > MOST_MASKED or filled < LEAST_FILLED:
            return None
    table = torch.zeros(1, 1, dtype=torch.long)
    for g, n in zip(groups, shape, strict=True):
        there = (table >= 0)[:, None, :, None] & (g >= 0)[None, :, None, :]
        index = table[:, None, :, None] * n + g[None, :, None, :]
        table = torch.where(there, index, -1).flatten(0, 1).flatten(1, 2)
    flat = table.flatten()
    slot = torch.empty(math.prod(shape), dtype=torch.long)
    slot[flat[flat >= 0]] = (flat >= 0).nonzero().flatten()
    return Folding(table, sizes, slot, _product(pairs, groups))


def _pairs(mask: Tensor, groups: Tensor) -> Tensor | None:
    """Which slots of each group meet, [groups, size, size]; padded slots see all that is there. None: all meet."""
    there, at = groups >= 0, groups.clamp(min=0)
    allowed = (mask[at[:, :, None], at[:, None, :]] | ~there[:, :, None]) & there[:, None, :]
    return None if bool(allowed.all()) else allowed


def _product(pairs: list[Tensor | None], groups: list[Tensor]) -> Tensor | None:
    """The pairs of the groups of all axes, one mask where they are alike."""
    if all(p is None for p in pairs):
        return None
    out = torch.ones(1, 1, 1, dtype=torch.bool)
    for p, g in zip(pairs, groups, strict=True):
        count, size = g.shape
        part = torch.ones(count, size, size, dtype=torch.bool) if p is None else p
        out = out[:, None, :, None, :, None] & part[None, :, None, :, None, :]
        out = out.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return out[:1] if bool((out == out[:1]).all()) else out
