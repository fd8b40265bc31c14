"""From what a route lists to batches of equal tiles: a row of queries with all the keys it was given.

A `Batch` holds rows with equally many keys. Within a row the blocks that need no mask come first, so most rows of a
batch share one mask; where they do not, masks are put together chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.kernels.routed_entries import Listed, Masks
from regard.kernels.routed_keep import Entries
from regard.kernels.routed_kinds import FULL

__all__ = ["Batch", "BlockBatch", "block_batches"]


@dataclass(frozen=True, eq=False)
class Batch(ABC):
    """Rows with equally many keys."""

    rows: Tensor
    """int64 ``[tiles]``: list * rows a list + row."""
    size: int
    """Queries of each, places past the end included."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    @abstractmethod
    def n(self) -> int:
        """Keys of each, masked places included."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Tokens in a row for each number that `keys` gives."""

    @property
    @abstractmethod
    def masked(self) -> bool:
        """Whether each tile has a mask of its own."""

    @property
    @abstractmethod
    def may_be_empty(self) -> bool:
        """Whether the masks may leave a query no key."""

    @property
    @abstractmethod
    def listed(self) -> tuple[int, int]:
        """Blocks (single keys, where there are no blocks) of all tiles, and those that need no mask."""

    @abstractmethod
    def keys(self, tiles: slice) -> Tensor:
        """int64 ``[tiles, n / unit]``: numbers of blocks of `unit` tokens (of slots, where ordered)."""

    @abstractmethod
    def allow(self, tiles: slice) -> Tensor | None:
        """Bool ``[1 or tiles, size or 1, n]``; None: every pair."""


@dataclass(frozen=True, eq=False)
class BlockBatch(Batch):
    """Rows of equally many blocks."""

    blocks: Tensor  # int64 [tiles, m], those under a mask last
    kinds: np.ndarray  # [1 or tiles, p] kinds of the last p blocks
    makes: Masks
    width: int  # keys of a block
    length: int  # places of keys in all

    @property
    def n(self) -> int:
        """Keys of a row."""
        return self.blocks.shape[1] * self.width

    @property
    def unit(self) -> int:
        """Whole blocks, or tokens where the last block is short."""
        return self.width if self.length % self.width == 0 else 1

    @property
    def masked(self) -> bool:
        """Whether tiles have masks of their own."""
        return len(self.kinds) > 1

    @property
    def may_be_empty(self) -> bool:
        """Whether no block is without a mask."""
        return self.kinds.shape[1] == self.blocks.shape[1]

    @property
    def listed(self) -> tuple[int, int]:
        """All blocks, and those before the last p."""
        return self.blocks.numel(), self.blocks.numel() - len(self) * self.kinds.shape[1]

    def keys(self, tiles: slice) -> Tensor:
        """Block numbers, or tokens, in which the places past the end repeat the last token."""
        if self.unit == self.width:
            return self.blocks[tiles]
        tokens = self.blocks[tiles, :, None] * self.width + torch.arange(self.width)
        return tokens.flatten(1).clamp_(max=self.length - 1)

    def allow(self, tiles: slice) -> Tensor | None:
        """The mask that all share, or one for each."""
        p = self.kinds.shape[1]
        if not p:
            return None
        kinds = self.kinds if len(self.kinds) == 1 else self.kinds[tiles]
        last = self.makes.masks(kinds).transpose(1, 2).reshape(len(kinds), self.size, -1)
        if p == self.blocks.shape[1]:
            return last
        return torch.cat([last.new_ones(1, 1, self.n - last.shape[2]).expand(len(kinds), self.size, -1), last], 2)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Blocks row by row, those under a mask last."""

    indptr: np.ndarray
    cols: np.ndarray
    kind: np.ndarray
    partial: np.ndarray  # [rows] how many are under a mask


def _assembled(parts: list[Entries], n: int) -> _Rows:
    """The parts, each sorted by row, as one table; nothing is sorted."""
    split = [tuple(x[m] for x in part) for full in (True, False) for part in parts for m in [(part[2] == FULL) == full]]
    counts = np.array([np.bincount(part[0], minlength=n) for part in split])
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(counts.sum(0), out=indptr[1:])
    cols, kind = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.int64)
    begin = indptr[:-1].copy()
    for (row, col, which), own in zip(split, counts, strict=True):
        place = begin[row] + np.arange(len(row)) - (np.cumsum(own) - own)[row]
        cols[place], kind[place] = col, which
        begin += own
    return _Rows(indptr, cols, kind, counts[len(parts) :].sum(0))


def block_batches(listed: Listed, n: int, block: tuple[int, int], length: int) -> list[Batch]:
    """Rows of equally many blocks, of which equally many are under masks; the mask most of them have goes alone.

    Args:
        listed: of n rows in all.
        block: queries of a row, keys of a block.
        length: places of keys in all.
    """
    table, makes = _assembled(listed.parts, n), listed.kinds
    counts = np.diff(table.indptr)
    name = counts * (int(table.partial.max(initial=0)) + 1) + table.partial
    order = np.argsort(name, kind="stable")
    order = order[counts[order] > 0]
    found: list[Batch] = []
    for rows in np.split(order, np.flatnonzero(np.diff(name[order])) + 1) if len(order) else []:
        c, p = int(counts[rows[0]]), int(table.partial[rows[0]])
        at = table.indptr[rows][:, None] + np.arange(c)
        kinds = table.kind[at[:, c - p :]]
        for members, kept in _alike(kinds):
            found.append(
                BlockBatch(
                    torch.from_numpy(rows[members]),
                    block[0],
                    torch.from_numpy(table.cols[at[members]]),
                    kept,
                    makes,
                    block[1],
                    length,
                )
            )
    return found


def _alike(kinds: np.ndarray) -> list[tuple[slice | np.ndarray, np.ndarray]]:
    """Rows of equal kinds ``[rows, p]`` where they are many, the others together."""
    if len(kinds) == 1 or kinds.shape[1] == 0 or (kinds == kinds[:1]).all():
        return [(slice(None), kinds[:1])]
    _, which, n = np.unique(kinds, axis=0, return_inverse=True, return_counts=True)
    most = which.reshape(-1) == int(n.argmax())
    if 4 * most.sum() < len(kinds):
        return [(slice(None), kinds)]
    some, rest = np.flatnonzero(most), np.flatnonzero(~most)
    return [(some, kinds[some[:1]]), (rest, kinds[rest])]
