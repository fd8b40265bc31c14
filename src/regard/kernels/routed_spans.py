"""Batches of a route that gives each row of queries spans of keys.

Spans, `keep` and `within` become disjoint intervals of keys; rows with about as many keys go together, the shorter ones
padded. Where the queries of a row differ in what they may see, the pairs of a chunk are evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from regard.kernels.routed_entries import Listed, Units, classes, each
from regard.kernels.routed_kinds import FULL
from regard.kernels.routed_rows import Batch
from regard.patterns import intervals as iv
from regard.patterns.decided import Routed
from regard.patterns.pattern import Pattern

__all__ = ["BLOCK", "SpanBatch", "SpanRows", "span_batches", "span_entries", "span_rows"]

BLOCK = 64  # keys in which spans are put together
WASTE = 16  # a row is padded by at most a part in so many


@dataclass(frozen=True, eq=False)
class SpanBatch(Batch):
    """Rows of at most n keys."""

    sets: Tensor  # int64 [tiles, m, 2], disjoint, in order
    counts: Tensor  # [tiles] keys of each
    padded: int  # n
    within: Pattern | None
    keep: Pattern | None
    spans: Tensor | None  # [tiles, width, 2], where pairs are evaluated
    routed: Routed

    @property
    def n(self) -> int:
        """Keys of the longest, or more."""
        return self.padded

    @property
    def unit(self) -> int:
        """Single tokens."""
        return 1

    @cached_property
    def masked(self) -> bool:
        """Whether rows are padded, or pairs evaluated."""
        return self.spans is not None or bool((self.counts < self.padded).any())

    @property
    def may_be_empty(self) -> bool:
        """Whether a query of a row may see less than the others."""
        return self.spans is not None

    @property
    def listed(self) -> tuple[int, int]:
        """All keys, and those of rows whose queries see the same."""
        keys = int(self.counts.sum())
        return keys, keys if self.spans is None else 0

    def keys(self, tiles: slice) -> Tensor:
        """The keys of the intervals one after the other; padding repeats the last."""
        lo, hi = self.sets[tiles].unbind(-1)
        sizes = hi - lo
        begin = sizes.cumsum(1) - sizes
        last = torch.cat([torch.ones_like(hi[:, :1]), hi[:, :-1]], 1) - 1
        step = torch.zeros(len(lo), self.padded + 1, dtype=torch.long)
        step[:, 1 : self.padded] = 1
        # where an interval begins the step is a jump; empty ones, at the end, write beyond
        at = torch.where(sizes > 0, begin, self.padded)
        step.scatter_(1, at, lo - last)
        found = step[:, : self.padded].cumsum(1)
        return torch.minimum(found, hi.amax(1, keepdim=True) - 1)

    def allow(self, tiles: slice) -> Tensor | None:
        """What is not padding, and pairs where queries differ."""
        if not self.masked:
            return None
        real = (torch.arange(self.padded) < self.counts[tiles, None])[:, None]
        if self.spans is None:
            return real
        r, k = self.routed, self.keys(tiles)[:, None]
        row = self.rows[tiles] % r.n_rows
        q = (row[:, None] * self.size + torch.arange(self.size)).clamp(max=r.q_len - 1)[:, :, None] + r.q_start
        spans = self.spans[tiles]
        found = ((spans[:, :, :1] <= k) & (k < spans[:, :, 1:])).any(1)[:, None]
        if self.keep is not None:
            found = found | self.keep.allows(q, k)
        if self.within is not None:
            found = found & self.within.allows(q, k)
        return (found & real).expand(-1, self.size, -1)


class SpanRows(NamedTuple):
    """Rows of the lists that one `within` and one `keep` hold for."""

    within: Pattern | None
    keep: Pattern | None
    rows: Tensor  # int64 [rows], list * rows a list + row
    spans: Tensor  # [rows, width, 2], as given
    sets: Tensor  # [rows, m, 2], disjoint, in order: what some query of the row sees
    counts: Tensor  # [rows] keys of those
    even: Tensor  # bool [rows]: every query of the row sees them


def span_rows(routed: Routed, units: Units) -> list[SpanRows]:
    """All rows of a route of spans."""
    assert routed.start is not None
    assert routed.stop is not None
    lead, n_rows, kv_len = (units.samples, units.decisions), routed.n_rows, routed.kv_len
    size = min(routed.block[0], routed.q_len)
    spans = torch.from_numpy(np.stack([each(x, lead) for x in (routed.start, routed.stop)], -1).astype(np.int64))
    spans = spans.reshape(units.lists, n_rows, routed.start.shape[3], 2)
    first = routed.q_start + torch.arange(n_rows) * size
    last = (first + size).clamp(max=routed.q_start + routed.q_len)
    found = []
    for (within, keep), members in classes(routed, units).items():
        own = spans[torch.tensor(members)].flatten(0, 1)
        most = least = iv.clip(own, kv_len)  # what any and what every query of the row sees
        sets = [None if p is None else _rows(p, first, last, kv_len) for p in (keep, within)]
        exact = size == 1 and all(s is None or s[2] for s in sets)
        for join, theirs in zip((iv.union, iv.intersect), sets, strict=True):
            if theirs is not None:
                some, every = (s.repeat(len(members), 1, 1) for s in theirs[:2])
                most, least = join(most, some, kv_len), least if exact else join(least, every, kv_len)
        counts = iv.length(most)
        even = torch.ones_like(counts, dtype=torch.bool) if exact else iv.length(least) == counts
        rows = (torch.tensor(members)[:, None] * n_rows + torch.arange(n_rows)).flatten()
        found.append(SpanRows(within, keep, rows, own, most, counts, even))
    return found


def span_batches(routed: Routed, spans: list[SpanRows]) -> list[Batch]:
    """The batches of a route of spans."""
    size = min(routed.block[0], routed.q_len)
    return [batch for c in spans for batch in _batches(routed, size, c)]


@dataclass(frozen=True)
class _Edges:
    """Masks of the blocks that a span begins or ends in: kind ``lo (block + 1) + hi`` allows keys lo to hi - 1."""

    block: int

    @cached_property
    def _table(self) -> Tensor:
        lo, hi, at = (torch.arange(n) for n in (self.block + 1, self.block + 1, self.block))
        return ((lo[:, None, None] <= at) & (at < hi[:, None])).flatten(0, 1)

    def masks(self, kinds: np.ndarray) -> Tensor:
        """Bool ``[*kinds, 1, block]``."""
        return self._table[torch.from_numpy(kinds)][..., None, :]


def span_entries(spans: list[SpanRows]) -> Listed | None:
    """The blocks of `BLOCK` keys that spans lie in; None where the queries of a row differ in what they see."""
    parts = []
    for c in spans:
        if not bool(c.even.all()):
            return None
        lo, hi = (x.numpy() for x in c.sets.unbind(-1))
        row, span = np.nonzero(lo < hi)
        lo, hi, row = lo[row, span], hi[row, span], c.rows.numpy()[row]
        n = (hi - 1) // BLOCK - lo // BLOCK + 1
        lo, hi, row = (np.repeat(x, n) for x in (lo, hi, row))
        col = lo // BLOCK + np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)
        a, b = np.maximum(lo - col * BLOCK, 0), np.minimum(hi - col * BLOCK, BLOCK)
        parts.append((row, col, np.where(b - a == BLOCK, FULL, a * (BLOCK + 1) + b)))
    return Listed(parts, _Edges(BLOCK))


def _rows(pattern: Pattern, first: Tensor, last: Tensor, kv_len: int) -> tuple[Tensor, Tensor, bool]:
    """Keys that some and that every query of each row may see, and whether single queries have exactly those."""
    cuts = pattern.cuts(int(first[0]), int(last[-1]))
    inside = torch.searchsorted(cuts, last) - torch.searchsorted(cuts, first, right=True)
    found = None if bool((inside > 0).any()) else pattern.rows(first, last, kv_len)
    if found is None:
        whole = torch.tensor([[[0, kv_len]]]).repeat(len(first), 1, 1)
        return whole, whole[:, :0], False
    return iv.clip(found.any, kv_len), iv.clip(found.all, kv_len), found.exact[0]


def _batches(routed: Routed, size: int, of: SpanRows) -> list[Batch]:
    """Rows by their number of keys, rounded up, those whose queries differ apart."""
    sets, counts, even = of.sets, of.counts, of.even
    step = torch.clamp(counts // WASTE, min=1)
    step = 2 ** step.double().log2().floor().long()
    padded = -(-counts // step) * step
    name = padded * 2 + even
    order = name.argsort(stable=True)
    order = order[counts[order] > 0]
    found: list[Batch] = []
    for at in order.split(name[order].unique_consecutive(return_counts=True)[1].tolist()) if len(order) else []:
        differ = not bool(even[at[0]])
        width = max(1, int((sets[at, :, 1] > sets[at, :, 0]).sum(1).max()))
        found.append(
            SpanBatch(
                of.rows[at],
                size,
                sets[at, :width],
                counts[at],
                int(padded[at[0]]),
                of.within,
                of.keep,
                of.spans[at] if differ else None,
                routed,
            )
        )
    return found
