"""What a routed call lists, as one table for all its heads and samples: rows of queries, blocks of keys, masks."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from regard.kernels.routed_keep import Entries, kept_entries
from regard.kernels.routed_kinds import ABSENT, Kinds, Places
from regard.patterns import states as st
from regard.patterns.decided import Routed
from regard.patterns.pattern import Pattern

__all__ = ["Listed", "Masks", "Units", "block_entries", "classes", "each", "sizes", "slots", "units_of"]


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

    @property
    def each(self) -> int:
        """Query heads, over all samples, that a list serves."""
        return self.strips // self.lists * self.shared

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


def slots(routed: Routed) -> tuple[int, int]:
    """Places of queries and of keys, padding of orders included."""
    q, k = routed.q_order, routed.kv_order
    return routed.q_len if q is None else q.shape[-1], routed.kv_len if k is None else k.shape[-1]


def sizes(routed: Routed) -> tuple[int, int]:
    """Its block, no larger than there are places."""
    return min(routed.block[0], slots(routed)[0]), min(routed.block[1], slots(routed)[1])


@runtime_checkable
class Masks(Protocol):
    """What the kinds of blocks stand for."""

    def masks(self, kinds: np.ndarray) -> Tensor:
        """Bool ``[*kinds, queries, keys]``: what each block allows; FULL is all."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Blocks of keys that rows of queries were given, none twice to a row; the masks of those not given whole."""

    parts: list[Entries]
    kinds: Masks


def block_entries(routed: Routed, units: Units) -> Listed:
    """What a route of blocks lists and keeps: rows are ``list * rows + row``."""
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
    return Listed(parts, kinds)


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
