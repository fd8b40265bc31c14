"""The tiles of a route by plain PyTorch: any device, any normaliser, softcaps, biases with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.kernels.blocked_math import ROOM, tile
from regard.kernels.blocked_strips import Call
from regard.kernels.routed_rows import Batch
from regard.kernels.routed_tiles import Chunk, Tiles

__all__ = ["backward", "forward"]


class _Bias:
    """Pieces of a bias ``[batch|1, heads|1, q_len|1, kv_len|1]``, by token, and the gradient that is added to them."""

    def __init__(self, bias: Tensor, tiles: Tiles, work: torch.dtype) -> None:
        self.bias, self.tiles, self.work = bias, tiles, work
        self.grad: Tensor | None = None

    def at(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """Index of the pairs ``[tiles, shared, size, n]`` of a chunk."""
        b, h, rows, cols = self.tiles.tokens(chunk)
        index = (b[:, None, None, None], h[:, :, None, None], rows[:, :, :, None], cols[:, :, None])
        sizes, device = self.bias.shape, self.bias.device
        return tuple((i if n > 1 else torch.zeros_like(i)).to(device) for i, n in zip(index, sizes, strict=True))

    def piece(self, index: tuple[Tensor, ...]) -> Tensor:
        """``[tiles|1, shared|1, size|1, n|1]``."""
        return self.bias[index].to(self.work)

    def add(self, index: tuple[Tensor, ...], grad: Tensor) -> None:
        """Add the gradient of a piece."""
        if self.grad is None:
            self.grad = torch.zeros(self.bias.shape, dtype=self.work, device=self.bias.device)
        self.grad.index_put_(index, grad, accumulate=True)


def _room(tiles: Tiles, q: Tensor) -> int:
    return (ROOM if q.device.type == "cpu" else 16 * ROOM) // (tiles.units.shared * q.element_size())


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, tiles: Tiles, has_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse or None)`` of slots."""
    rows = tiles.rows_of(q)
    k_flat, v_flat = (x.contiguous().view(-1, x.shape[-1]) for x in (k, v))
    out, lse = rows.new_zeros(*rows.shape[:3], v.shape[-1]), rows.new_full(rows.shape[:3], -torch.inf)
    pieces = None if bias is None else _Bias(bias, tiles, q.dtype)
    room = _room(tiles, q)

    def fits(batch: Batch) -> int:
        return room // max(1, batch.n * (batch.size + 2 * q.shape[-1]))

    for chunk in tiles.chunks(fits, q.device):
        piece = None if pieces is None else pieces.piece(pieces.at(chunk))
        kt, vt = (chunk.gather(x)[:, None] for x in (k_flat, v_flat))
        found = tile(call, rows[chunk.tiles], kt, vt, piece, _allow(chunk, q.device))
        out[chunk.tiles] = found[0]
        if has_lse:
            lse[chunk.tiles] = found[1]
    return tiles.from_rows(out), tiles.from_rows(lse) if has_lse else None


def _allow(chunk: Chunk, device: torch.device) -> Tensor:
    if chunk.allow is None:
        return torch.ones(1, 1, chunk.batch.size, chunk.batch.n, dtype=torch.bool, device=device)
    return chunk.allow[:, None].expand(-1, -1, chunk.batch.size, -1)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    tiles: Tiles,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias: each tile is computed once more and differentiated by autograd."""
    rows, d_rows = tiles.rows_of(q), tiles.rows_of(d_out)
    s_rows = None if d_lse is None else tiles.rows_of(d_lse)
    k_flat, v_flat = (x.contiguous().view(-1, x.shape[-1]) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (rows, k_flat, v_flat))
    pieces = None if bias is None else _Bias(bias, tiles, q.dtype)
    room = _room(tiles, q) // 2

    def fits(batch: Batch) -> int:
        return room // max(1, batch.n * (batch.size + 2 * q.shape[-1]))

    for chunk in tiles.chunks(fits, q.device):
        inputs = [rows[chunk.tiles], *(chunk.gather(x)[:, None] for x in (k_flat, v_flat))]
        inputs = [x.detach().requires_grad_() for x in inputs]
        piece: Tensor | None = None
        index: tuple[Tensor, ...] = ()
        if pieces is not None:
            index = pieces.at(chunk)
            piece = pieces.piece(index)
        if grad_bias and piece is not None:
            piece = piece.detach().requires_grad_()
            inputs.append(piece)
        with torch.enable_grad():
            found = tile(call, inputs[0], inputs[1], inputs[2], piece, _allow(chunk, q.device))
        grads = [d_rows[chunk.tiles]] if s_rows is None else [d_rows[chunk.tiles], s_rows[chunk.tiles]]
        got = torch.autograd.grad(found[: len(grads)], inputs, grads, allow_unused=True)
        dq[chunk.tiles] = got[0]
        chunk.add(dk, got[1])
        chunk.add(dv, got[2])
        if len(inputs) == 4 and pieces is not None and got[3] is not None:
            pieces.add(index, got[3])
    d_bias = pieces.grad if pieces is not None and grad_bias else None
    if d_bias is None and grad_bias and bias is not None:
        d_bias = torch.zeros_like(bias, dtype=q.dtype)
    return tiles.from_rows(dq), dk.view(k.shape), dv.view(v.shape), d_bias
