"""Tiles by plain PyTorch: any device, any normaliser, softcaps, biases with gradients.

One function of a tile's queries, keys, values and bias, differentiated by autograd tile by tile: the backward pass
computes each tile once more, so nothing larger than a chunk of tiles is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regard.kernels.blocked_plan import Batch
from regard.kernels.blocked_strips import Call, Strip, flat, strips
from regard.kernels.blocked_tiles import add_other, allowed, anchor_tokens, other_tokens, put_anchor, take

__all__ = ["backward", "forward", "tile"]

ROOM = 1 << 25  # bytes of scores at once, on a CPU; 16 times as many elsewhere


def _chunks(batch: Batch, strip: Strip, q: Tensor) -> Iterator[slice]:
    room = ROOM if q.device.type == "cpu" else 16 * ROOM
    width = batch.size * batch.n + 2 * batch.n * q.shape[-1]
    step = max(1, room // (len(q) * width * q.element_size()))
    for lo in range(0, len(batch), step):
        yield slice(lo, min(lo + step, len(batch)))


def tile(call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, allow: Tensor) -> tuple[Tensor, ...]:
    """out ``[strips, tiles, size, v_dim]`` and, if there is one, lse, of whole rows."""
    scores = (q @ k.transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        scores = scores + bias
    normalize: Any = call.normalize
    weights, lse = normalize.weights(scores, allow.expand_as(scores))
    out = weights @ v
    return (out,) if lse is None else (out, lse)


class _Bias:
    """Pieces of a bias ``[batch|1, heads|1, q_len|1, kv_len|1]``, and the gradient that is added to them."""

    def __init__(self, bias: Tensor, shape: tuple[int, int], work: torch.dtype) -> None:
        self.bias, self.shape, self.work = bias, shape, work
        self.grad: Tensor | None = None

    def at(self, strip: Strip, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
        """Index of the pairs of rows ``[tiles, size]`` and cols ``[tiles, n]`` of a strip's heads."""
        unit = torch.arange(self.shape[0] * self.shape[1])[strip.q][:, None, None, None]
        index = (unit // self.shape[1], unit % self.shape[1], rows[None, :, :, None], cols[None, :, None, :])
        sizes, device = self.bias.shape, self.bias.device
        return tuple((i if n > 1 else torch.zeros_like(i)).to(device) for i, n in zip(index, sizes, strict=True))

    def piece(self, index: tuple[Tensor, ...]) -> Tensor:
        """``[strips|1, tiles|1, size|1, n|1]``."""
        return self.bias[index].to(self.work)

    def add(self, index: tuple[Tensor, ...], grad: Tensor) -> None:
        """Add the gradient of a piece."""
        if self.grad is None:
            self.grad = torch.zeros(self.bias.shape, dtype=self.work, device=self.bias.device)
        self.grad.index_put_(index, grad, accumulate=True)


def _walk(call: Call, q: Tensor, k: Tensor, v: Tensor, bias: _Bias | None, visit: Callable[..., None]) -> None:
    """Call ``visit(strip, batch, tiles, q tiles, k tiles, v tiles, bias index, allowed)`` for every chunk of tiles."""
    qf, kf, vf = flat(q), flat(k), flat(v)
    for strip in strips(call, q, k):
        plan, qs, ks, vs = strip.plan, qf[strip.q], kf[strip.kv], vf[strip.kv]
        for batch in plan.batches:
            for tiles in _chunks(batch, strip, qs):
                qt = take(qs, batch, plan.anchor, tiles, True)
                kt, vt = (take(x, batch, plan.other, tiles, False) for x in (ks, vs))
                allow = allowed(batch, plan.blocks, tiles)
                if allow is None:
                    allow = torch.ones(1, batch.size, batch.n, dtype=torch.bool)
                index = None
                if bias is not None:
                    rows = plan.anchor.at(anchor_tokens(batch, plan.anchor, tiles))
                    cols = plan.other.at(other_tokens(batch, plan.other, tiles))
                    index = bias.at(strip, rows, cols)
                visit(strip, batch, tiles, qt, kt, vt, index, allow.to(q.device)[None])


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, has_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse or None)`` of float tensors."""
    heads, v_dim = q.shape[0] * q.shape[1], v.shape[-1]
    out, lse = q.new_zeros(heads, q.shape[2], v_dim), q.new_full((heads, q.shape[2]), -torch.inf)
    pieces = None if bias is None else _Bias(bias, (q.shape[0], q.shape[1]), q.dtype)
    made: dict[int, tuple[Strip, Tensor, Tensor]] = {}

    def visit(strip, batch, tiles, qt, kt, vt, index, allow):  # type: ignore[no-untyped-def]
        if id(strip) not in made:
            shape = (qt.shape[0], strip.plan.anchor.length)
            made[id(strip)] = (strip, q.new_zeros(*shape, v_dim), q.new_full(shape, -torch.inf))
        _, o, s = made[id(strip)]
        found = tile(call, qt, kt, vt, None if pieces is None else pieces.piece(index), allow)
        put_anchor(o, batch, strip.plan.anchor, tiles, found[0])
        if has_lse:
            put_anchor(s, batch, strip.plan.anchor, tiles, found[1])

    _walk(call, q, k, v, pieces, visit)
    for strip, o, s in made.values():
        place = strip.plan.place
        if place is not None:
            o, s = o.index_select(1, place.to(o.device)), s.index_select(1, place.to(o.device))
        out[strip.q], lse[strip.q] = o, s
    shape = (*q.shape[:3],)
    return out.view(*shape, v_dim), lse.view(shape) if has_lse else None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device).flatten(0, 1) for x in (q, k, v))
    pieces = None if bias is None else _Bias(bias, (q.shape[0], q.shape[1]), q.dtype)
    df, sf = flat(d_out), None if d_lse is None else d_lse.contiguous().flatten(0, 1)[..., None]

    def visit(strip, batch, tiles, qt, kt, vt, index, allow):  # type: ignore[no-untyped-def]
        plan = strip.plan
        # padding of an order repeats token 0: its rows and keys are masked, so it adds zeros
        dt = take(df[strip.q], batch, plan.anchor, tiles, True)
        inputs = [x.detach().requires_grad_() for x in (qt, kt, vt)]
        piece = None if pieces is None else pieces.piece(index)
        if grad_bias and piece is not None:
            inputs.append(piece.detach().requires_grad_())
            piece = inputs[3]
        with torch.enable_grad():
            found = tile(call, inputs[0], inputs[1], inputs[2], piece, allow)
        grads = [dt]
        if sf is not None:
            grads.append(take(sf[strip.q], batch, plan.anchor, tiles, True)[..., 0])
        got = torch.autograd.grad(found[: len(grads)], inputs, grads, allow_unused=True)
        shared = [dq[strip.q], dk[strip.kv], dv[strip.kv]]
        _add_anchor(shared[0], batch, plan, tiles, got[0])
        for to, grad in zip(shared[1:], got[1:3], strict=True):
            add_other(to, batch, plan.other, tiles, grad)
        if not isinstance(strip.q, slice):  # an index copies
            dq[strip.q] = shared[0]
            if not isinstance(strip.kv, slice):
                dk[strip.kv], dv[strip.kv] = shared[1], shared[2]
        if len(inputs) == 4 and pieces is not None and got[3] is not None:
            pieces.add(index, got[3])

    _walk(call, q, k, v, pieces, visit)
    d_bias = pieces.grad if pieces is not None and grad_bias else None
    if d_bias is None and grad_bias and bias is not None:
        d_bias = torch.zeros_like(bias, dtype=q.dtype)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), d_bias


def _add_anchor(x: Tensor, batch: Batch, plan: Any, tiles: slice, values: Tensor) -> None:
    if plan.anchor.order is None:
        put_anchor(x, batch, plan.anchor, tiles, values)
        return
    strips_, length, width = x.shape
    rows = plan.anchor.at(anchor_tokens(batch, plan.anchor, tiles)).flatten()
    rows = (torch.arange(0, strips_ * length, length)[:, None] + rows).flatten().to(x.device)
    x.view(-1, width).index_add_(0, rows, values.reshape(-1, width))
