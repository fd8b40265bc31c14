"""Grids whose groups run as a batch of dense problems: windows, strided grids, rows, columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import Grid, Pattern, intervals

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


def axis_groups(axis: Pattern, n: int) -> Int[Tensor, "groups size"]:
    """The classes of an axis whose pairs are an equivalence (-1 pads short ones); else one group of everything.

    From the intervals of its rows, so an axis of a million coordinates costs its intervals and no n x n mask.
    """
    place = torch.arange(n)
    rows = axis.rows(place, place + 1, n)
    if rows is not None:
        keys = rows.any
        label, size = keys[:, 0, 0], intervals.length(keys)  # no row is empty here
        own = ((keys[..., 0] <= place[:, None]) & (place[:, None] < keys[..., 1])).any(1)
        same = bool((keys == keys[label]).all())
    else:
        mask = axis.allows(place[:, None], place[None]).expand(n, n)
        label, size, own = mask.int().argmax(1), mask.sum(1), mask.diagonal()
        same = bool((mask == mask[label]).all())
    # Every q sees itself and what the first key of q sees: a partition iff each class is as large as its members' rows.
    if not (same and bool(own.all()) and torch.equal(label.bincount(minlength=n)[label], size)):
        return place[None]
    order = label.argsort(stable=True)
    members = order.split(label.bincount()[label.unique()].tolist())
    return torch.nn.utils.rnn.pad_sequence(list(members), batch_first=True, padding_value=-1)


def fold(grid: Grid) -> Folding | None:
    """The folding of a grid; None where groups are too large or too sparse to run dense.

    Axes that are an equivalence (`Blocks`, `Congruent`, `Same`, `Full`, `Segments`) fall apart into their classes; any
    other axis stays whole and is masked. A mask is taken up to ``MOST_MASKED`` tokens a group and down to
    ``LEAST_FILLED`` of its pairs.
    """
    shape = tuple(grid.shape)
    counts = [axis.row_counts(n, n, 0) for axis, n in zip(grid.axes, shape, strict=True)]
    if any(bool((c == 0).any()) for c in counts):
        return None  # queries without a key: attend has them
    groups = [axis_groups(axis, n) for axis, n in zip(grid.axes, shape, strict=True)]
    sizes = tuple(g.shape[1] for g in groups)
    squares = [int(((g >= 0).sum(1) ** 2).sum()) for g in groups]
    filled = math.prod(int(c.sum()) / square for c, square in zip(counts, squares, strict=True))
    padded = any(bool((g < 0).any()) for g in groups)
    if (filled < 1 or padded) and (math.prod(sizes) > MOST_MASKED or filled < LEAST_FILLED):
        return None
    pairs = [_pairs(a, n, g, int(c.sum())) for a, n, g, c in zip(grid.axes, shape, groups, counts, strict=True)]
    table = torch.zeros(1, 1, dtype=torch.long)
    for g, n in zip(groups, shape, strict=True):
        there = (table >= 0)[:, None, :, None] & (g >= 0)[None, :, None, :]
        index = table[:, None, :, None] * n + g[None, :, None, :]
        table = torch.where(there, index, -1).flatten(0, 1).flatten(1, 2)
    flat = table.flatten()
    slot = torch.empty(math.prod(shape), dtype=torch.long)
    slot[flat[flat >= 0]] = (flat >= 0).nonzero().flatten()
    return Folding(table, sizes, slot, _product(pairs, groups))


def _pairs(axis: Pattern, n: int, groups: Tensor, count: int) -> Tensor | None:
    """Which slots of each group meet, [groups, size, size]; padded slots see all that is there. None: all meet."""
    there, at = groups >= 0, groups.clamp(min=0)
    if bool(there.all()) and count == groups.shape[0] * groups.shape[1] ** 2:
        return None
    return (axis.allows(at[:, :, None], at[:, None, :]) | ~there[:, :, None]) & there[:, None, :]


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
