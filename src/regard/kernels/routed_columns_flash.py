"""Tiles of a block of keys fed to PyTorch's CPU flash attention and to its backward pass, and their results merged.

With s_b the log-sum-exp of a query over block b and o_b its output there: ``lse = log sum_b exp(s_b)`` and
``out = sum_b exp(s_b - lse) o_b``. The backward pass takes the whole lse and out, so what it gives adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regard.kernels.blocked_tiles import additive
from regard.kernels.combine import merge
from regard.kernels.routed_columns import ColumnBatch, Columns, Stage
from regard.kernels.routed_tiles import Tiles

__all__ = ["backward", "forward"]

ROOM = 1 << 22  # bytes of gathered queries, keys and masks that stay in the cache
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Chunk(NamedTuple):
    """Some tiles of a batch."""

    rows: Tensor  # [tiles, r], of all strips
    keys: Tensor  # [tiles * block / unit], of the flat axis of all kv heads
    mask: Tensor | None  # additive [tiles or 1, 1, r * shared * size, block]
    empty: Tensor | None  # bool [tiles or 1, 1, r * shared * size], without a key
    padding: Tensor | None  # bool [tiles, r]
    place: int


class _Run:
    """A stage on one strip of each of its lists."""

    def __init__(self, tiles: Tiles, columns: Columns, like: Tensor) -> None:
        self.tiles, self.columns, self.like = tiles, columns, like
        self.each = tiles.units.shared * tiles.size
        self.kept: tuple[ColumnBatch | None, Tensor | None, Tensor | None] = (None, None, None)

    def masks(self, batch: ColumnBatch, at: slice) -> tuple[Tensor | None, Tensor | None]:
        """The additive mask of tiles, and the queries which it leaves no key (None: none)."""
        if batch.kinds is None:
            return None, None
        if len(batch.kinds) == 1 and self.kept[0] is batch:
            return self.kept[1:]
        allow = self.columns.kinds.masks(batch.kinds if len(batch.kinds) == 1 else batch.kinds[at])
        allow = allow[:, :, None].expand(-1, -1, self.tiles.units.shared, -1, -1)
        allow = allow.reshape(len(allow), 1, -1, allow.shape[-1])
        empty = ~allow.any(-1) if self.tiles.size > 1 else None  # a row of one query lists no block it sees nothing of
        made = additive(allow, self.like.dtype), empty if empty is not None and bool(empty.any()) else None
        self.kept = (batch, *made)
        return made

    def chunks(self, stage: Stage, strips: Tensor, kv: Tensor) -> Iterator[_Chunk]:
        """All tiles; ``strips [lists]``: which strip of each list."""
        c, n_rows = self.columns, self.tiles.n_rows
        for batch in stage.batches:
            r = batch.rows.shape[1]
            width = self.like.shape[-1] * (r * self.each + c.block) * 2
            width += self.each * r * c.block if batch.kinds is not None else 0
            step = max(1, ROOM * torch.get_num_threads() // (width * self.like.element_size()))
            padded = bool((batch.counts < r).any())
            for lo in range(0, len(batch), step):
                at = slice(lo, lo + step)
                strip = strips[batch.lists[at]]
                keys = c.keys(batch.blocks[at]) + (kv[strip] * (self.tiles.kv_slots // c.unit))[:, None]
                padding = torch.arange(r) >= batch.counts[at, None] if padded else None
                yield _Chunk(
                    batch.rows[at] + strip[:, None] * n_rows,
                    keys.flatten(),
                    *self.masks(batch, at),
                    padding,
                    batch.place + lo * r,
                )

    def queries(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """``[tiles, 1, r * shared * size, ...]`` of rows ``[strips * rows, shared, size, ...]``."""
        found = x.flatten(1).index_select(0, chunk.rows.flatten())
        return found.view(len(chunk.rows), 1, -1, *x.shape[3:])

    def keys(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """``[tiles, 1, block, width]`` of the flat keys or values."""
        width = x.shape[-1]
        found = x.view(-1, self.columns.unit * width).index_select(0, chunk.keys)
        return found.view(len(chunk.rows), 1, self.columns.block, width)

    def add(self, x: Tensor, values: Tensor, chunk: _Chunk) -> None:
        """Add ``[tiles, 1, block, width]`` to the flat gradient."""
        width = self.columns.unit * x.shape[-1]
        x.view(-1, width).index_add_(0, chunk.keys, values.reshape(-1, width).to(x.dtype))


def _merged(places: Tensor, width: int) -> Iterator[slice]:
    step = max(1, ROOM * torch.get_num_threads() // (4 * max(1, places.shape[1] * width)))
    for lo in range(0, len(places), step):
        yield slice(lo, lo + step)


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of slots, as `routed_flash.forward`."""
    width, columns, (strips, kv) = q.shape[-1], tiles.columns, tiles.strips
    assert columns is not None
    rows = tiles.rows_of(q)
    k_flat, v_flat = (x.contiguous().view(-1, width) for x in (k, v))
    out = torch.zeros_like(rows)
    lse = q.new_full(rows.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    run = _Run(tiles, columns, q)
    parts = q.new_empty(max((s.places for s in columns.stages), default=0), run.each, width)
    sums = lse.new_empty(parts.shape[:2])
    for stage in columns.stages:
        for strip in strips.T:
            for chunk in run.chunks(stage, strip, kv):
                kt, vt = run.keys(k_flat, chunk), run.keys(v_flat, chunk)
                mask = None if chunk.mask is None else chunk.mask.expand(len(chunk.rows), -1, -1, -1)
                o, s = _flash(run.queries(rows, chunk), kt, vt, 0.0, False, attn_mask=mask, scale=scale)
                if chunk.empty is not None:  # the kernel's lse says 0 there
                    o, s = o.masked_fill(chunk.empty[..., None], 0), s.masked_fill(chunk.empty, -torch.inf)
                here = slice(chunk.place, chunk.place + chunk.rows.numel())
                parts[here], sums[here] = o.reshape(-1, run.each, width), s.reshape(-1, run.each)
            for lists, row, places in stage.merges:
                to = strip[lists] * tiles.n_rows + row
                for at in _merged(places, run.each * width):
                    o, s = _merge(parts, sums, places[at])
                    out.index_copy_(0, to[at], o.view(-1, *out.shape[1:]))
                    lse.index_copy_(0, to[at], s.view(-1, *lse.shape[1:]))
    return tiles.from_rows(out), tiles.from_rows(lse)


def _merge(parts: Tensor, sums: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[n, each, width]`` and log-sum-exps ``[n, each]`` of rows with the results at ``places [n, c]``."""
    if places.shape[1] == 1:
        return parts.index_select(0, places[:, 0]), sums.index_select(0, places[:, 0])
    o = parts.index_select(0, places.flatten()).view(*places.shape, *parts.shape[1:])
    s = sums.index_select(0, places.flatten()).view(*places.shape, -1)
    return merge(o.unbind(1), s.unbind(1))


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, tiles: Tiles, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, as `routed_flash.backward`; lse is +inf where a row has no key."""
    width, columns, (strips, kv) = q.shape[-1], tiles.columns, tiles.strips
    assert columns is not None
    q_rows, o_rows, d_rows, s_rows = (tiles.rows_of(x) for x in (q, out, d_out, lse))
    k_flat, v_flat = (x.contiguous().view(-1, width) for x in (k, v))
    dq = torch.zeros_like(q_rows, dtype=lse.dtype)
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_flat, v_flat))
    run = _Run(tiles, columns, q)
    parts = q.new_empty(max((s.places for s in columns.stages), default=0), run.each, width)
    for stage in columns.stages:
        for strip in strips.T:
            for chunk in run.chunks(stage, strip, kv):
                kt, vt = run.keys(k_flat, chunk), run.keys(v_flat, chunk)
                qt, ot, dt, st = (run.queries(x, chunk) for x in (q_rows, o_rows, d_rows, s_rows))
                if chunk.padding is not None:  # weights exp(s - inf) = 0
                    st.view(*chunk.rows.shape, -1).masked_fill_(chunk.padding[..., None], torch.inf)
                mask = None if chunk.mask is None else chunk.mask.expand(len(chunk.rows), -1, -1, -1)
                gq, gk, gv = _flash_backward(dt, qt, kt, vt, ot, st, 0.0, False, attn_mask=mask, scale=scale)
                parts[chunk.place : chunk.place + chunk.rows.numel()] = gq.reshape(-1, run.each, width)
                run.add(dk, gk, chunk)
                run.add(dv, gv, chunk)
            for lists, row, places in stage.merges:
                to = strip[lists] * tiles.n_rows + row
                for at in _merged(places, run.each * width):
                    found = parts.index_select(0, places[at].flatten()).view(*places[at].shape, *dq.shape[1:])
                    dq.index_copy_(0, to[at], found.sum(1, dtype=dq.dtype))
    return tiles.from_rows(dq), dk.view(k.shape), dv.view(v.shape)
