"""Tiles fed to PyTorch's CPU flash attention, which gives their log-sum-exp too, and to its backward pass.

Forward: anchors are blocks of queries, so each query meets all its keys in one call and nothing is merged. Backward:
anchors are blocks of keys, so dk and dv are written once and dq is added up, and the tiles have many queries, which
is where the kernel is fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels import routed_columns_flash, routed_flash
from regard.kernels.blocked_plan import Batch
from regard.kernels.blocked_strips import Call, Strip, flat, strips
from regard.kernels.blocked_tiles import add_other, additive, allowed, put_anchor, take
from regard.kernels.fused import row_major
from regard.patterns.static import Causal, Full

__all__ = ["backward", "forward", "whole"]

ROOM = 1 << 23  # bytes of gathered tiles that stay in the cache, a thread pair
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _chunks(batch: Batch, bytes_each: int) -> Iterator[slice]:
    """Tiles in chunks that fit the cache."""
    room = ROOM * max(1, torch.get_num_threads() // 2)
    step = max(1, min(len(batch), room // max(bytes_each, 1))) if bytes_each else len(batch)
    for lo in range(0, len(batch), step):
        yield slice(lo, min(lo + step, len(batch)))


def _pair(x: Tensor, y: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Query tiles and key tiles as the kernel takes them; a kv head that is shared is read through a stride of 0."""
    if not shared:
        return x, y
    x = x.transpose(0, 1)
    return x, y.transpose(0, 1).expand(-1, x.shape[1], -1, -1)


class _Masks:
    """Additive masks of a batch; one that all tiles share is made once."""

    def __init__(self, batch: Batch, strip: Strip, dtype: torch.dtype, keys: bool) -> None:
        self.batch, self.strip, self.dtype, self.keys = batch, strip, dtype, keys
        self.each = batch.which is not None or batch.kinds is not None
        self.made = (None, None) if self.each else self._make(slice(None))

    def _make(self, tiles: slice) -> tuple[Tensor | None, Tensor | None]:
        """The masks ``[1 or tiles, queries, keys]``, and which queries they leave no key (None: none of them)."""
        allow = allowed(self.batch, self.strip.plan.blocks, tiles)
        if allow is None:
            return None, None
        if self.keys:
            return additive(allow.transpose(1, 2).contiguous(), self.dtype), None
        empty = ~allow.any(-1)
        return additive(allow, self.dtype), empty if bool(empty.any()) else None

    def of(self, tiles: slice, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The mask ``[.., .., queries, keys]`` for query tiles as the kernel takes them, and the empty queries."""
        mask, empty = self._make(tiles) if self.each else self.made
        if mask is None:
            return None, None
        mask = mask[:, None] if self.strip.shared else mask[None]
        return mask.expand(*q.shape[:2], *mask.shape[2:]), empty


def whole(call: Call) -> bool | None:
    """Whether one call of the kernel does it all, and then whether it is the kernel's causal one; None: tiles."""
    if isinstance(call.pattern, Full):
        return False
    causal = isinstance(call.pattern, Causal) and not call.pattern.future and call.q_start == 0
    return True if causal else None


def _grouped(q: Tensor, *others: Tensor) -> list[Tensor]:
    """``[batch * kv_heads, group, length, width]`` of tensors with q's heads or with those of keys."""
    kv_heads = min(x.shape[1] for x in (q, *others))
    group = q.shape[1] // kv_heads
    made = []
    for x in (q, *others):
        shaped = x.contiguous().view(-1, x.shape[1] // kv_heads, *x.shape[2:])
        made.append(shaped.expand(-1, group, *[-1] * (x.ndim - 2)))
    return made


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of float tensors whose heads are all equally wide."""
    if call.tiles is not None:
        routed = routed_flash if call.tiles.columns is None else routed_columns_flash
        return routed.forward(q, k, v, call.tiles, call.scale)
    causal = whole(call)
    if causal is not None:
        inputs = [row_major(x) for x in (q, k, v)] if q.shape[1] == k.shape[1] else _grouped(q, k, v)
        o, s = _flash(*inputs, 0.0, causal, scale=call.scale)
        return o.reshape(q.shape), s.reshape(q.shape[:3])
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_carry(q))
    q_flat, k_flat, v_flat, out_flat, lse_flat = flat(q), flat(k), flat(v), out.flatten(0, 1), lse.flatten(0, 1)
    for strip in strips(call, q, k):
        into = (out_flat[strip.q], lse_flat[strip.q])
        here = isinstance(strip.q, slice) and strip.plan.place is None
        o, s = _forward(strip, q_flat[strip.q], k_flat[strip.kv], v_flat[strip.kv], call.scale, *into, here)
        if not here:
            out_flat[strip.q], lse_flat[strip.q] = o, s
    return out, lse


def _carry(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(
    strip: Strip, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor, here: bool
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a strip, in the tensors given where that is `here`."""
    plan, width = strip.plan, q.shape[-1]
    if not here:
        shape = (len(q), plan.anchor.length)
        out, lse = q.new_empty(*shape, width), lse.new_empty(shape)
    if not plan.covers:
        out.zero_()
        lse.fill_(-torch.inf)
    buffers: list[Tensor | None] = [None, None]
    for batch in plan.batches:
        gathers = batch.shift is None
        each = 2 * len(k) * batch.n * width * k.element_size() if gathers else 0
        if batch.which is not None or batch.kinds is not None:
            each += batch.size * batch.n * q.element_size()
        masks = _Masks(batch, strip, q.dtype, False)
        for tiles in _chunks(batch, each):
            count = len(range(*tiles.indices(len(batch))))
            if gathers:
                buffers = [_at_least(b, len(k) * count * batch.n * width, k) for b in buffers]
            qt = take(q, batch, plan.anchor, tiles, True)
            kt, vt = (take(x, batch, plan.other, tiles, False, b) for x, b in zip((k, v), buffers, strict=True))
            (qs, ks), (_, vs) = _pair(qt, kt, strip.shared), _pair(qt, vt, strip.shared)
            mask, empty = masks.of(tiles, qs)
            o, s = _flash(qs, ks, vs, 0.0, False, attn_mask=mask, scale=scale)
            if strip.shared:
                o, s = o.transpose(0, 1), s.transpose(0, 1)
            if empty is not None:  # the kernel's lse says 0 there
                o, s = o.masked_fill(empty[..., None], 0), s.masked_fill(empty, -torch.inf)
            put_anchor(out, batch, plan.anchor, tiles, o)
            put_anchor(lse, batch, plan.anchor, tiles, s)
    if plan.place is None:
        return out, lse
    return out.index_select(1, plan.place), lse.index_select(1, plan.place)


def _at_least(buffer: Tensor | None, count: int, like: Tensor) -> Tensor:
    return buffer if buffer is not None and buffer.numel() >= count else like.new_empty(count)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With P the weights: dv = P^T do, ds = P * (do v^T - delta + dlse) with delta = rowsum(do * out), dq = scale ds k,
    dk = scale ds^T q. The kernel makes delta itself; dlse goes in as one more column of out, with ones in do.
    """
    width = q.shape[-1]
    if d_lse is not None:
        extra = 8  # a multiple of 8 columns
        ones, column = torch.ones_like(d_out[..., :1]), -d_lse[..., None].to(out.dtype)
        d_out = F.pad(torch.cat([d_out, ones], -1), (0, extra - 1))
        out = F.pad(torch.cat([out, column], -1), (0, extra - 1))
        q, k, v = (F.pad(x, (0, extra)) for x in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # weights of a row without a key: exp(s - inf) = 0
    if call.tiles is not None:
        routed = routed_flash if call.tiles.columns is None else routed_columns_flash
        grads = routed.backward(q, k, v, out, lse, d_out, call.tiles, call.scale)
        dq, dk, dv = (g[..., :width].to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv
    causal = whole(call)
    if causal is not None:
        args = [d_out, q, k, v, out, lse]
        args = [row_major(x) for x in args] if q.shape[1] == k.shape[1] else _grouped(*args)
        dq, dk, dv = _flash_backward(*args, 0.0, causal, scale=call.scale)
        if q.shape[1] != k.shape[1]:
            dq, dk, dv = dq.reshape(q.shape), dk.sum(1).view(k.shape), dv.sum(1).view(v.shape)
        return dq[..., :width], dk[..., :width], dv[..., :width]
    dq = q.new_zeros(q.shape, dtype=lse.dtype)
    dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    inputs = [flat(x) for x in (q, k, v, out, d_out)] + [lse.contiguous().flatten(0, 1)]
    for strip in strips(call, q, k, keys=True):
        qf, kf, vf, of, df, sf = (x[strip.kv if n in (1, 2) else strip.q] for n, x in enumerate(inputs))
        got = _backward(strip, qf, kf, vf, of, df, sf, call.scale)
        dq.flatten(0, 1)[strip.q] = got[0]
        for total, part in zip((dk, dv), got[1:], strict=True):
            to = total.flatten(0, 1)
            to[strip.kv] = to[strip.kv] + part if strip.shared else part
    return dq[..., :width].to(q.dtype), dk[..., :width].to(k.dtype), dv[..., :width].to(v.dtype)


def _backward(
    strip: Strip, q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    plan, width = strip.plan, q.shape[-1]
    dq = q.new_zeros(q.shape, dtype=lse.dtype)
    dk, dv = (x.new_zeros(len(x), plan.anchor.length, width, dtype=lse.dtype) for x in (k, v))
    buffers: list[Tensor | None] = [None, None, None]
    for batch in plan.batches:
        each = len(q) * batch.n * width * q.element_size() * (4 if batch.shift is None else 1)
        masks = _Masks(batch, strip, q.dtype, True)
        for tiles in _chunks(batch, each):
            count = len(range(*tiles.indices(len(batch))))
            if batch.shift is None:
                buffers = [_at_least(b, len(q) * count * batch.n * width, q) for b in buffers]
            kt, vt = (take(x, batch, plan.anchor, tiles, True) for x in (k, v))
            qt, ot, dt = (
                take(x, batch, plan.other, tiles, False, b) for x, b in zip((q, out, d_out), buffers, strict=True)
            )
            st = take(lse[..., None], batch, plan.other, tiles, False)
            (qs, ks), (os, vs), (ds, _), (ss, _) = (
                _pair(a, b, strip.shared) for a, b in ((qt, kt), (ot, vt), (dt, kt), (st, kt))
            )
            mask, _ = masks.of(tiles, qs)
            gq, gk, gv = _flash_backward(ds, qs, ks, vs, os, ss[..., 0], 0.0, False, attn_mask=mask, scale=scale)
            if strip.shared:
                gq, gk, gv = gq.transpose(0, 1), gk.sum(1)[None], gv.sum(1)[None]
            add_other(dq, batch, plan.other, tiles, gq)
            put_anchor(dk, batch, plan.anchor, tiles, gk)
            put_anchor(dv, batch, plan.anchor, tiles, gv)
    if plan.place is not None:
        dk, dv = dk.index_select(1, plan.place), dv.index_select(1, plan.place)
    return dq, dk, dv
