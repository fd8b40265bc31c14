"""From what a route lists to tiles of a block of keys with all the queries that it was given to.

Rows of a query or two share a block of keys with many others. Put together by block, a tile has as many queries as the
block is listed for, and is as good a product as in dense attention; each query then gets a result of every block it
listed, and these are merged by their log-sum-exps. (MoBA, arXiv 2502.13189, computes chosen blocks so.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.kernels.routed_entries import Listed, Masks, Units
from regard.kernels.routed_kinds import FULL

__all__ = ["SHORT", "ColumnBatch", "Columns", "Stage", "make_columns", "pays"]

SHORT = 32  # rows of fewer queries make bad tiles
WIDE = 8  # a block of fewer keys is not worth a result of its own
MANY = 32  # queries that list a block, on average, make a good tile
LONG = 2048  # rows in a tile at most
WASTE = 16  # a tile is padded by at most a part in so many
RESULTS = 1 << 18  # outputs of queries that a stage holds before they are merged


@dataclass(frozen=True, eq=False)
class ColumnBatch:
    """Blocks that about as many rows list, all of them whole or all of them under masks."""

    lists: Tensor  # int64 [tiles]
    blocks: Tensor  # int64 [tiles], of the list's keys
    rows: Tensor  # int64 [tiles, r], of the list; padding repeats the last
    counts: Tensor  # int64 [tiles], rows without padding
    kinds: np.ndarray | None  # [1 or tiles, r]
    place: int  # of the first result; the results of tiles stand one after the other, padding included

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True, eq=False)
class Stage:
    """Some rows, of one list or of several: their tiles, and which results each row merges."""

    batches: list[ColumnBatch]
    merges: list[tuple[Tensor, Tensor, Tensor]]
    """``(list, row, places [n, c])`` of rows with c results."""
    places: int


@dataclass(frozen=True, eq=False)
class Columns:
    """All lists of a call."""

    stages: list[Stage]
    kinds: Masks
    block: int  # keys
    length: int  # places of keys in all

    @property
    def queries(self) -> int:
        """Rows of all tiles, padding included, over all lists."""
        return sum(s.places for s in self.stages)

    @property
    def unit(self) -> int:
        """Whole blocks, or tokens where the last block is short."""
        return self.block if self.length % self.block == 0 else 1

    def keys(self, blocks: Tensor) -> Tensor:
        """int64 ``[tiles, block / unit]``; the places past the end repeat the last token."""
        if self.unit == self.block:
            return blocks[:, None]
        return (blocks[:, None] * self.block + torch.arange(self.block)).clamp_(max=self.length - 1)


def pays(listed: Listed, units: Units, size: int, block: int) -> bool:
    """Whether rows shorter than `SHORT` are better put together by block: it is wide, and many of them list it."""
    if block < WIDE:
        return False
    blocks = int(np.count_nonzero(np.bincount(np.concatenate([cols for _, cols, _ in listed.parts]))))
    queries = units.shared * size * sum(len(rows) for rows, _, _ in listed.parts)
    return queries >= MANY * max(1, blocks) * units.lists


def make_columns(listed: Listed, units: Units, shape: tuple[int, int], size: int, block: int, length: int) -> Columns:
    """The columns of what is listed.

    Args:
        listed: entries whose rows are ``list * shape[0] + row``.
        units: of the call.
        shape: rows and blocks of a list.
        size: queries of a row.
        block: keys of a block.
        length: places of keys in all.
    """
    rows, cols, kind = (np.concatenate(x) for x in zip(*listed.parts, strict=True))
    if len(listed.parts) > 1:
        order = np.argsort(rows, kind="stable")
        rows, cols, kind = rows[order], cols[order], kind[order]
    ends = np.searchsorted(rows, np.arange(units.lists * shape[0] + 1))
    stages, lo = [], 0
    while ends[lo] < len(rows):
        most = ends[lo] + max(1, RESULTS // (units.shared * size))
        hi = max(lo + 1, int(np.searchsorted(ends, most, side="right")) - 1)
        some = slice(int(ends[lo]), int(ends[hi]))
        stages.append(_stage(rows[some], cols[some], kind[some], shape))
        lo = hi
    return Columns(stages, listed.kinds, block, length)


def _stage(rows: np.ndarray, cols: np.ndarray, kind: np.ndarray, shape: tuple[int, int]) -> Stage:
    """Of entries sorted by row."""
    name = (rows // shape[0] * shape[1] + cols) * 2 + (kind != FULL)
    order = np.argsort(name, kind="stable")
    new = np.flatnonzero(np.diff(name[order], prepend=-1))
    counts = np.diff(new, append=len(name))
    parts = -(-counts // LONG)  # a block that more rows list makes several tiles
    inside = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    first = np.repeat(new, parts) + LONG * inside
    counts = np.minimum(np.repeat(counts, parts) - LONG * inside, LONG)
    step = 2 ** np.log2(np.maximum(counts // WASTE, 1)).astype(np.int64)
    padded = -(-counts // step) * step
    masked = name[order[first]] % 2
    place_of = np.empty(len(name), np.int64)
    batches, place = [], 0
    alike = padded * 2 + masked
    tiles_of = np.argsort(alike, kind="stable")
    for tiles in np.split(tiles_of, np.flatnonzero(np.diff(alike[tiles_of])) + 1) if len(tiles_of) else []:
        n, own = int(padded[tiles[0]]), counts[tiles]
        entries = order[first[tiles][:, None] + np.minimum(np.arange(n), own[:, None] - 1)]
        real = np.arange(n) < own[:, None]
        place_of[entries[real]] = place + np.flatnonzero(real)
        kinds = kind[entries] if masked[tiles[0]] else None
        if kinds is not None and (kinds == kinds[:1]).all():
            kinds = kinds[:1]
        at = entries[:, 0]
        batches.append(
            ColumnBatch(
                torch.from_numpy(rows[at] // shape[0]),
                torch.from_numpy(cols[at]),
                torch.from_numpy(rows[entries] % shape[0]),
                torch.from_numpy(own),
                kinds,
                place,
            )
        )
        place += real.size
    return Stage(batches, _merges(rows, place_of, shape[0]), place)


def _merges(rows: np.ndarray, place_of: np.ndarray, n_rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows by how many results they have."""
    begin = np.flatnonzero(np.diff(rows, prepend=-1))
    counts = np.diff(begin, append=len(rows))
    found = []
    for c in np.unique(counts):
        at = begin[counts == c]
        row = rows[at]
        places = place_of[at[:, None] + np.arange(c)]
        found.append((torch.from_numpy(row // n_rows), torch.from_numpy(row % n_rows), torch.from_numpy(places)))
    return found
