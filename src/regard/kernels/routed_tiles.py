"""The tiles of a routed call, chunk by chunk: which queries, which keys, under which mask.

A tile is one row of queries of a strip (query heads that share keys and decision, stacked) with the keys its row lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.routed_columns import SHORT, Columns, make_columns, pays
from regard.kernels.routed_entries import Listed, Units, block_entries, sizes, slots, units_of
from regard.kernels.routed_rows import Batch, BlockBatch, block_batches
from regard.kernels.routed_spans import BLOCK, SpanRows, span_batches, span_entries, span_rows
from regard.patterns.decided import Routed

__all__ = ["Chunk", "Run", "Tiles", "make_tiles"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tiles of a batch, for one strip of each list."""

    batch: Batch
    tiles: Tensor | slice  # [tiles] strip * rows + row, a slice where they follow each other
    strip: Tensor  # [tiles]
    row: Tensor  # [tiles] row of the list
    keys: Tensor  # [tiles, n / unit], numbers in the flat axis of all kv heads
    allow: Tensor | None  # bool [1 or tiles, size or 1, n]

    def gather(self, x: Tensor, buffer: Tensor | None = None) -> Tensor:
        """``[tiles, n, width]`` of the flat keys or values ``[kv heads * length, width]``."""
        t, width, unit = len(self.keys), x.shape[-1], self.batch.unit
        rows = self.keys.flatten().to(x.device)
        flat = x.view(-1, unit * width)
        if buffer is None:
            found = flat.index_select(0, rows)
        else:
            found = buffer[: len(rows) * unit * width].view(len(rows), unit * width)
            torch.index_select(flat, 0, rows, out=found)
        return found.view(t, self.batch.n, width)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add ``[tiles, n, width]`` to what stands at the keys of the flat ``[kv heads * length, width]``."""
        width = self.batch.unit * x.shape[-1]
        x.view(-1, width).index_add_(0, self.keys.flatten().to(x.device), values.reshape(-1, width).to(x.dtype))


class Run(NamedTuple):
    """Rows that follow each other, each with the keys ``start + step * i`` and on, i counted from the first row."""

    first: int
    rows: int
    start: int
    step: int


@dataclass(frozen=True, eq=False)
class Tiles:
    """A call's batches, and how its tensors are cut."""

    routed: Routed
    units: Units
    blocks: Listed | None  # None: spans
    n_rows: int
    size: int
    q_slots: int
    kv_slots: int

    @cached_property
    def batches(self) -> list[Batch]:
        """Rows of queries with the keys that they were given."""
        if self.blocks is None:
            return span_batches(self.routed, self._spans)
        return block_batches(self.blocks, self.units.lists * self.n_rows, sizes(self.routed), self.kv_slots)

    @cached_property
    def runs(self) -> list[tuple[list[Run], Batch | None]]:
        """Of each batch the rows that read keys where they stand, and a batch of the others."""
        return [_runs(self, batch) for batch in self.batches]

    @cached_property
    def _spans(self) -> list[SpanRows]:
        return span_rows(self.routed, self.units)

    @cached_property
    def columns(self) -> Columns | None:
        """Blocks of keys with the queries that they were given to, where those are the better tiles."""
        if self.units.shared * self.size >= SHORT:
            return None
        listed, block = self.blocks, sizes(self.routed)[1]
        if listed is None:
            listed, block = span_entries(self._spans), BLOCK
        if listed is None or not pays(listed, self.units, self.size, block):
            return None
        shape = (self.n_rows, -(-self.kv_slots // block))
        return make_columns(listed, self.units, shape, self.size, block, self.kv_slots)

    @property
    def pairs(self) -> int:
        """Pairs that are computed, over all heads and samples."""
        return self.units.each * sum(len(b) * b.size * b.n for b in self.batches)

    @property
    def gathered(self) -> int:
        """Keys that are copied together, over all kv heads."""
        return self.units.strips // self.units.lists * sum(len(b) * b.n for b in self.batches)

    @property
    def listed(self) -> tuple[int, int]:
        """Blocks over all query heads and samples, and those that need no mask."""
        found = [b.listed for b in self.batches]
        return self.units.each * sum(n for n, _ in found), self.units.each * sum(full for _, full in found)

    @cached_property
    def strips(self) -> tuple[Tensor, Tensor]:
        """The strips of each list ``[lists, strips of each]``, and the flat kv head of each strip."""
        lists, kv = self.units.of_strips()
        return lists.argsort(stable=True).view(self.units.lists, -1), kv

    def chunks(
        self, room: Callable[[Batch], int], device: torch.device, batches: list[Batch] | None = None
    ) -> Iterator[Chunk]:
        """All tiles, or those of some batches, `room(batch)` of them at once."""
        strips, kv = self.strips
        for batch in self.batches if batches is None else batches:
            step = max(1, room(batch))
            shared = None if batch.masked else _on(batch.allow(slice(0, 1)), device)
            lists, row = batch.rows // self.n_rows, batch.rows % self.n_rows
            strip = strips[lists].T.contiguous()  # [strips of each list, tiles]
            tiles, base = strip * self.n_rows + row, kv[strip] * (self.kv_slots // batch.unit)
            even = (tiles.diff() == 1).all(1).tolist()
            for lo in range(0, len(batch), step):
                at = slice(lo, min(lo + step, len(batch)))
                keys = batch.keys(at)
                allow = _on(batch.allow(at), device) if batch.masked else shared
                for n, follow in enumerate(even):
                    first = int(tiles[n, lo])
                    here = slice(first, first + at.stop - lo) if follow else tiles[n, at].to(device)
                    yield Chunk(batch, here, strip[n, at], row[at], keys + base[n, at, None], allow)

    def tokens(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample ``[tiles]``, heads ``[tiles, shared]``, queries (from 0) ``[tiles, shared, size]`` and keys
        ``[tiles, shared, n]`` of a chunk; padding stands for the last one, or for 0 in an order."""
        u, kv = self.units, self.strips[1]
        first = chunk.strip * u.shared
        b, heads = first // u.heads, (first % u.heads)[:, None] + torch.arange(u.shared)
        q = (chunk.row[:, None] * self.size + torch.arange(self.size)).clamp(max=self.q_slots - 1)
        k = (chunk.keys - (kv[chunk.strip] * (self.kv_slots // chunk.batch.unit))[:, None])[..., None]
        k = (k * chunk.batch.unit + torch.arange(chunk.batch.unit)).flatten(1)
        found = []
        for order, slot in ((self.routed.q_order, q), (self.routed.kv_order, k)):
            here = slot[:, None].expand(-1, u.shared, -1)
            found.append(here if order is None else _tokens(order, u.heads, b, heads, slot))
        return b, heads, found[0], found[1]

    def rows_of(self, x: Tensor) -> Tensor:
        """``[strips * rows, shared, size, ...]`` of ``[batch, heads, q_slots, ...]``, zeros past the end."""
        u, short = self.units, self.n_rows * self.size - self.q_slots
        shape = (u.strips, u.shared, self.n_rows, self.size, *x.shape[3:])
        if short:
            x = F.pad(x, (*(0,) * (2 * (x.ndim - 3)), 0, short))
        return x.reshape(shape).transpose(1, 2).reshape(-1, u.shared, self.size, *x.shape[3:])

    def from_rows(self, x: Tensor) -> Tensor:
        """`rows_of` undone."""
        u = self.units
        x = x.view(u.strips, self.n_rows, u.shared, self.size, *x.shape[3:]).transpose(1, 2)
        x = x.reshape(u.batch, u.heads, self.n_rows * self.size, *x.shape[4:])
        return x[:, :, : self.q_slots]


def _tokens(order: Tensor, heads: int, b: Tensor, h: Tensor, slot: Tensor) -> Tensor:
    """``[tiles, shared, slots]`` tokens of slots ``[tiles, slots]``."""
    order = order.cpu().clamp(min=0)
    sample = b if order.shape[0] > 1 else torch.zeros_like(b)
    return order[sample[:, None, None], (h // (heads // order.shape[1]))[:, :, None], slot[:, None]]


def _on(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


def make_tiles(routed: Routed, batch: int, heads: int, kv_heads: int) -> Tiles:
    """The tiles of a call of so many samples and heads; kv heads as the slots have them. Made once for each shape."""

    def make() -> Tiles:
        units = units_of(routed, batch, heads, kv_heads)
        (q_slots, kv_slots), (size, _) = slots(routed), sizes(routed)
        blocks = None if routed.index is None else block_entries(routed, units)
        return Tiles(routed, units, blocks, routed.n_rows, size, q_slots, kv_slots)

    found: Tiles = routed.once(("tiles", batch, heads, kv_heads), make)
    return found


def _runs(tiles: Tiles, batch: Batch) -> tuple[list[Run], Batch | None]:
    """The rows of a batch that read keys side by side, as few runs, and a batch of the others.

    Only where all strips read the same whole blocks, each of a kv head of its own, and under no mask.
    """
    u = tiles.units
    if u.lists > 1 or u.strips != u.batch * u.kv_heads or not isinstance(batch, BlockBatch):
        return [], batch
    if batch.kinds.shape[1] or batch.unit != batch.width:
        return [], batch
    beside = (batch.blocks.diff(dim=1) == 1).all(1)
    rows, start = batch.rows[beside], batch.blocks[beside, 0]
    step = start.diff()
    ends = (rows.diff() != 1) | (step < 0)
    ends[1:] |= ~ends[:-1] & (step[1:] != step[:-1])
    at = [0, *(ends.nonzero()[:, 0] + 1).tolist(), len(rows)]
    if not len(rows) or (len(at) > 3 and 2 * len(at) > len(rows)):
        return [], batch  # many small calls take longer than to gather
    found = [
        Run(int(rows[a]), b - a, int(start[a]) * batch.width, int(step[a]) * batch.width if b - a > 1 else 0)
        for a, b in pairwise(at)
    ]
    others = replace(batch, rows=batch.rows[~beside], blocks=batch.blocks[~beside])
    return found, others if len(others) else None
