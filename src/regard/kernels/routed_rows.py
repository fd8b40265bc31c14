"""From what a route lists to batches of equal tiles: a row of queries with all the keys it was given.

A `Batch` holds rows with equally many keys. Within a row the blocks that need no mask come first, so most rows of a
batch share one mask; where they do not, masks are put together chunk by chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from regard.kernels.routed_keep import Entries, kept_entries
from regard.kernels.routed_kinds import ABSENT, FULL, Kinds, Places
from regard.patterns import states as st
from regard.patterns.decided import Routed
from regard.patterns.pattern import Pattern

__all__ = ["Batch", "BlockBatch", "Units", "block_batches", "classes", "each", "sizes", "slots", "units_of"]


@dataclass(frozen=True)
class Units:
    """Which heads go together: `shared` query heads of one kv head and one decision are one strip."""

    batch: int
    heads: int
    kv_heads: int
    samples: int  # decisions are told apart for so many samples, 1 or batch
    decisions: int  # and for so many heads
    shared: int

    @property
    def lists(self) -> int:
        """Lists of rows."""
        return self.samples * self.decisions

    @property
    def strips(self) -> int:
        """Strips in all."""
        return self.batch * self.heads // self.shared

    def of_strips(self) -> tuple[Tensor, Tensor]:
        """The list and the flat kv head of each strip."""
        strip = torch.arange(self.strips)
        b, h = strip // (self.heads // self.shared), strip % (self.heads // self.shared) * self.shared
        sample = b if self.samples > 1 else torch.zeros_like(b)
        kv = b * self.kv_heads + h // (self.heads // self.kv_heads)
        return sample * self.decisions + h // (self.heads // self.decisions), kv

    def head(self, decision: int) -> int:
        """The first query head of a decision."""
        return decision * (self.heads // self.decisions)


def units_of(routed: Routed, batch: int, heads: int, kv_heads: int) -> Units:
    """The strips of a call."""
    parts = [p for p in (routed.within, routed.keep) if p is not None]
    samples = batch if any(p.samples for p in parts) else routed.batch
    decisions = heads if any(p.heads for p in parts) else routed.decisions
    return Units(batch, heads, kv_heads, samples, decisions, gcd(heads // decisions, heads // kv_heads))


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
    makes: Kinds
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


def slots(routed: Routed) -> tuple[int, int]:
    """Places of queries and of keys, padding of orders included."""
    q, k = routed.q_order, routed.kv_order
    return routed.q_len if q is None else q.shape[-1], routed.kv_len if k is None else k.shape[-1]


def sizes(routed: Routed) -> tuple[int, int]:
    """Its block, no larger than there are places."""
    return min(routed.block[0], slots(routed)[0]), min(routed.block[1], slots(routed)[1])


def block_batches(routed: Routed, units: Units) -> list[Batch]:
    """The batches of a route that lists blocks."""
    assert routed.index is not None
    assert routed.count is not None
    bq, bk = sizes(routed)
    n_rows, n_cols = routed.n_rows, routed.n_columns
    lead = (units.samples, units.decisions)
    index = each(routed.index, lead).reshape(units.lists * n_rows, routed.index.shape[3])
    count = each(routed.count, lead).reshape(-1).astype(np.int64)
    rows = np.repeat(np.arange(len(count)), count)
    cols = index[np.arange(index.shape[1]) < count[:, None]].astype(np.int64)
    q = Places.of(routed.q_order, routed.q_len, bq, routed.q_start)
    k = Places.of(routed.kv_order, routed.kv_len, bk)
    frame = None if routed.ordered else st.Frame(routed.q_start, routed.q_len, 0, routed.kv_len, bq, bk, routed.kv_len)
    kinds = Kinds(q, k, frame, routed.kv_len)
    q_row, k_row = (_orders(order, lead) for order in (routed.q_order, routed.kv_order))

    def kind_of(pattern: Pattern | None, at: np.ndarray, to: np.ndarray) -> np.ndarray:
        unit = at // max(n_rows, 1)
        return kinds.of(pattern, q_row[unit] * n_rows + at % max(n_rows, 1), k_row[unit] * n_cols + to)

    kind = np.empty(len(rows), np.int64)
    kept: list[Entries] = []
    edges = np.searchsorted(rows, np.arange(units.lists + 1) * n_rows)
    for (within, keep), members in classes(routed, units).items():
        if len(members) == units.lists:
            kind[:] = kind_of(within, rows, cols)
        else:
            at = np.concatenate([np.arange(edges[u], edges[u + 1]) for u in members])
            kind[at] = kind_of(within, rows[at], cols[at])
        if keep is not None:
            inside = keep if within is None else keep & within
            kept.append(kept_entries(inside, routed, (bq, bk), members, (rows, cols), kinds, kind_of))
    there = kind != ABSENT
    parts = [(rows[there], cols[there], kind[there]), *kept] if kept or not there.all() else [(rows, cols, kind)]
    return _batches(_assembled(parts, len(count)), kinds, (bq, bk), slots(routed)[1])


def each(x: Tensor, lead: tuple[int, int]) -> np.ndarray:
    """``[samples, decisions, ...]`` of a table with one sample, or fewer decisions, where that is asked for."""
    x = x.cpu()
    if x.shape[1] != lead[1]:
        x = x.repeat_interleave(lead[1] // x.shape[1], 1)
    return x.expand(lead[0], *x.shape[1:]).numpy()


def _orders(order: Tensor | None, lead: tuple[int, int]) -> np.ndarray:
    """The number of each list's order, in `Places`."""
    if order is None:
        return np.zeros(lead[0] * lead[1], np.int64)
    b, r = order.shape[:2]
    sample = np.arange(lead[0]) if b > 1 else np.zeros(lead[0], np.int64)
    decision = np.arange(lead[1]) * r // lead[1]
    return (sample[:, None] * r + decision).reshape(-1)


def classes(routed: Routed, units: Units) -> dict[tuple[Pattern | None, Pattern | None], list[int]]:
    """Lists by what holds inside them and what is kept beside them."""
    found: dict[tuple[Pattern | None, Pattern | None], list[int]] = {}
    apart = [p for p in (routed.within, routed.keep) if p is not None and (p.heads or p.samples)]
    if not apart:
        return {(routed.within, routed.keep): list(range(units.lists))}
    for u in range(units.lists):
        head, sample = units.head(u % units.decisions), u // units.decisions
        name = tuple(None if p is None else p.of(head, sample) for p in (routed.within, routed.keep))
        found.setdefault((name[0], name[1]), []).append(u)
    return found


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


def _batches(table: _Rows, makes: Kinds, block: tuple[int, int], length: int) -> list[Batch]:
    """Rows of equally many blocks, of which equally many are under masks; the mask most of them have goes alone."""
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
