"""The tiles of a route fed to PyTorch's CPU flash attention and to its backward pass.

Both go row by row of queries with the keys that it was given, gathered: dq is written once, dk and dv are added up.
Rows whose keys lie side by side, as in a band, are read in the forward pass where they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.kernels.blocked_tiles import additive
from regard.kernels.routed_rows import Batch
from regard.kernels.routed_tiles import Chunk, Run, Tiles

__all__ = ["backward", "forward"]

ROOM = 1 << 22  # bytes of gathered keys and values that stay in the cache
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Work:
    """Memory that chunks share, and how many tiles fit into it."""

    def __init__(self, k: Tensor, shared: int, copies: int) -> None:
        self.like, self.shared, self.copies = k, shared, copies
        self.buffers: list[Tensor] = []
        self.mask: tuple[Any, Tensor | None] = (None, None)

    def room(self, batch: Batch) -> int:
        """Tiles at once."""
        width = self.like.shape[-1] * self.copies + (self.shared * batch.size if batch.masked else 0)
        tiles = ROOM * max(1, torch.get_num_threads()) // max(1, batch.n * width * self.like.element_size())
        return max(1, min(tiles, len(batch)))

    def gather(self, chunk: Chunk, *tensors: Tensor) -> list[Tensor]:
        """Keys and values of a chunk, each ``[tiles, 1, n, width]``, valid until the next."""
        while len(self.buffers) < len(tensors):
            self.buffers.append(self.like.new_empty(0))
        out = []
        for n, x in enumerate(tensors):
            count = len(chunk.keys) * chunk.batch.n * x.shape[-1]
            if self.buffers[n].numel() < count:
                self.buffers[n] = x.new_empty(count)
            out.append(chunk.gather(x, self.buffers[n])[:, None])
        return out

    def masks(self, chunk: Chunk) -> Tensor | None:
        """The additive mask ``[tiles, 1, shared * size, n]``."""
        if chunk.allow is None:
            return None
        if self.mask[0] is not (chunk.batch if not chunk.batch.masked else chunk.allow):
            allow = chunk.allow[:, None].expand(-1, self.shared, chunk.batch.size, -1)
            made = additive(allow.reshape(len(allow), 1, -1, chunk.batch.n), self.like.dtype)
            self.mask = (chunk.allow if chunk.batch.masked else chunk.batch, made)
        mask = self.mask[1]
        assert mask is not None
        return mask.expand(len(chunk.keys), -1, -1, -1)


def _take(x: Tensor, tiles: Tensor | slice) -> Tensor:
    return x[tiles] if isinstance(tiles, slice) else x.index_select(0, tiles)


def _side_by_side(x: Tensor, tiles: Tiles, run: Run, n: int) -> Tensor:
    """``[strips, rows, n, width]`` of the flat keys or values, no copy: rows overlap."""
    width = x.shape[-1]
    shape, strides = (tiles.units.strips, run.rows, n, width), (tiles.kv_slots * width, run.step * width, width, 1)
    return x.as_strided(shape, strides, x.storage_offset() + run.start * width)


def _put(x: Tensor, tiles: Tensor | slice, values: Tensor) -> None:
    if isinstance(tiles, slice):
        x[tiles] = values
    else:
        x.index_copy_(0, tiles, values)


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of slots: q ``[batch, heads, q_slots, width]``, k and v ``[batch, kv_heads, kv_slots, width]``."""
    shared, width = tiles.units.shared, q.shape[-1]
    rows = tiles.rows_of(q).flatten(1, 2)
    k_flat, v_flat = (x.contiguous().view(-1, width) for x in (k, v))
    out = torch.zeros_like(rows)
    lse = q.new_full(rows.shape[:2], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    work = _Work(k, shared, 2)
    at, left = (-1, tiles.n_rows, *rows.shape[1:]), []
    for batch, (runs, others) in zip(tiles.batches, tiles.runs, strict=True):
        left += [others] if others is not None else []
        for run in runs:
            mine = slice(run.first, run.first + run.rows)
            kt, vt = (_side_by_side(x, tiles, run, batch.n) for x in (k_flat, v_flat))
            o, s = _flash(rows.view(at)[:, mine], kt, vt, 0.0, False, scale=scale)
            out.view(at)[:, mine], lse.view(at[:-1])[:, mine] = o, s
    for chunk in tiles.chunks(work.room, q.device, left):
        kt, vt = work.gather(chunk, k_flat, v_flat)
        o, s = _flash(_take(rows, chunk.tiles)[:, None], kt, vt, 0.0, False, attn_mask=work.masks(chunk), scale=scale)
        o, s = o[:, 0], s[:, 0]
        if chunk.allow is not None and chunk.batch.may_be_empty:
            empty = ~chunk.allow.any(-1)  # the kernel's lse says 0 there
            if bool(empty.any()):
                empty = empty[:, None].expand(len(o), shared, chunk.batch.size).reshape(s.shape)
                o, s = o.masked_fill(empty[..., None], 0), s.masked_fill(empty, -torch.inf)
        _put(out, chunk.tiles, o)
        _put(lse, chunk.tiles, s)
    shape = (-1, shared, tiles.size)
    return tiles.from_rows(out.view(*shape, width)), tiles.from_rows(lse.view(shape))


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, tiles: Tiles, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the dtype of the lse; lse is +inf where a row has no key."""
    shared, width = tiles.units.shared, q.shape[-1]
    q_rows, o_rows, d_rows, s_rows = (tiles.rows_of(x).flatten(1, 2) for x in (q, out, d_out, lse))
    k_flat, v_flat = (x.contiguous().view(-1, width) for x in (k, v))
    dq = torch.zeros_like(q_rows, dtype=lse.dtype)
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_flat, v_flat))
    work = _Work(k, shared, 4)
    for chunk in tiles.chunks(work.room, q.device):
        kt, vt = work.gather(chunk, k_flat, v_flat)
        qt, ot, dt, st = (_take(x, chunk.tiles)[:, None] for x in (q_rows, o_rows, d_rows, s_rows))
        gq, gk, gv = _flash_backward(dt, qt, kt, vt, ot, st, 0.0, False, attn_mask=work.masks(chunk), scale=scale)
        _put(dq, chunk.tiles, gq[:, 0].to(dq.dtype))
        chunk.add(dk, gk[:, 0])
        chunk.add(dv, gv[:, 0])
    return tiles.from_rows(dq.view(-1, shared, tiles.size, width)), dk.view(k.shape), dv.view(v.shape)
