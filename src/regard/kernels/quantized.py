"""Attention on integers: q k^T and P V are products of integers of few bits, with one scale a block.

A reference, to measure what low bits lose: the products are exact integer sums, the rest is plain PyTorch, and nothing
here is faster than attention in floating point. Blocks that the pattern does not list are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from regard.kernels.request import Request, make_request
from regard.patterns import Routed
from regard.patterns.layout import BlockLayout, block_size
from regard.patterns.pattern import Pattern

__all__ = ["Quantized", "integer_product", "quantize", "quantized_attend"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """``x ~ scale * values``, one scale for ``rows`` rows that follow one another (the last of them may be fewer)."""

    values: Int[Tensor, "*lead length width"]
    """int8, also for fewer bits: they are not packed."""
    scale: Float[Tensor, "*lead groups"]
    rows: int

    def row_scale(self) -> Float[Tensor, "*lead length"]:
        """The scale of each row."""
        return self.scale.repeat_interleave(self.rows, -1)[..., : self.values.shape[-2]]

    def dequantize(self) -> Float[Tensor, "*lead length width"]:
        """``scale * values``, in the scale's dtype; no entry is further from x than half its scale."""
        return self.values.to(self.scale.dtype) * self.row_scale()[..., None]


def quantize(x: Float[Tensor, "*lead length width"], bits: int = 8, rows: int = 64) -> Quantized:
    """Signed integers in ``[-m, m]``, ``m = 2^(bits - 1) - 1``: ``round(x / s)``, ``s = max |x| / m`` of each group.

    A group is ``rows`` rows that follow one another, whole; ties go to the even integer. A group of zeros has scale 0.
    Float32 scales, float64 for float64 input.

    Raises:
        ValueError: bits outside 2 to 8, rows below 1, or a value that is not finite.
    """
    most = (1 << (_bits("bits", bits) - 1)) - 1
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows must be an integer >= 1, got {rows!r}")
    if not bool(x.isfinite().all()):
        raise ValueError("x holds NaN or infinite values")
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    length, width = x.shape[-2:]
    groups = -(-length // rows)
    padded = torch.nn.functional.pad(x, (0, 0, 0, groups * rows - length))
    top = padded.abs().reshape(*x.shape[:-2], groups, rows * width)
    scale = (top.amax(-1) if width else top.new_zeros(top.shape[:-1])) / most
    found = Quantized(torch.empty(x.shape, dtype=torch.int8, device=x.device), scale, rows)
    step = torch.where(scale > 0, scale, 1).repeat_interleave(rows, -1)[..., :length, None]
    # scale is rounded, so the largest entry may come out a hair above m
    found.values.copy_((x / step).round_().clamp_(-most, most))
    return found


def integer_product(a: Integer[Tensor, "*lead n d"], b: Integer[Tensor, "*lead d m"]) -> Int[Tensor, "*lead n m"]:
    """``a @ b`` of 8-bit integers, signed or not, in int32: exact.

    On a CPU by integer arithmetic. Elsewhere PyTorch has no such product: float32, which holds every sum below 2^24
    exactly, or float64 where sums may be larger.

    Raises:
        ValueError: another dtype, or so many terms that int32 could overflow.
    """
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"{name} must be int8 or uint8, got {x.dtype}")
    bound = a.shape[-1] * (255 if a.dtype == torch.uint8 else 128) * (255 if b.dtype == torch.uint8 else 128)
    if bound >= 1 << 31:
        raise ValueError(f"a and b: {a.shape[-1]} terms could overflow int32")
    if a.device.type == "cpu":
        return a.to(torch.int32) @ b.to(torch.int32)
    work = torch.float32 if bound < 1 << 24 else torch.float64
    return (a.to(work) @ b.to(work)).to(torch.int32)


def quantized_attend(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    pattern: Pattern | None = None,
    *,
    q_start: int | None = None,
    scale: float | int | None = None,
    qk_bits: int = 8,
    pv_bits: int = 8,
    rows: tuple[int, int] = (32, 64),
    block: int | tuple[int, int] | None = None,
    return_lse: bool = False,
) -> (
    Float[Tensor, "batch heads q_len v_dim"]
    | tuple[Float[Tensor, "batch heads q_len v_dim"], Float[Tensor, "batch heads q_len"]]
):
    """Attention under a pattern whose two products are of integers, as in PAROAttention (arXiv 2506.16054).

    ``s_ij = scale * a_i b_j * (Q_i . K_j)`` with Q, K signed integers and a, b their scales; over the allowed j
    ``P_ij = exp(s_ij - lse_i)``; a block of P becomes unsigned integers of ``pv_bits`` with the scale
    ``max / (2^pv_bits - 1)`` of the block, the values of a block of keys signed integers with one scale;
    ``out_i = sum_blocks scale_P scale_V (P V)``.
    The sums Q . K and P V are exact in int32. The rounded weights of a row are not brought back to a sum of 1.

    With ``d_i = max_j |s_ij - exact s_ij| <= scale / 2 max_j (a_i |k_j|_1 + b_j |a_i Q_i|_1)`` an output is off by at
    most ``(exp(2 d_i) - 1) sum_j P_ij |v_j| + sum_j (e_ij |v_j| + (P_ij exp(2 d_i) + e_ij) f_j)``, P exact, e half the
    scale of the weight's block and f half that of the value's.

    Args:
        q, k, v, pattern, q_start, scale: as in `attend`. The tokens of a block that differ least are quantised best:
            bring them together first, or by a route that does (`regard.plan.reorder`).
        qk_bits, pv_bits: 2 to 8; below 8 the integers still lie in int8.
        rows: rows that share a scale, of q and of k.
        block: tokens of a block of P, ``(queries, keys)``; its keys share the scale of their values. None: 64, and the
            route's own for a stored route in an order of its own, in which its tokens are then quantised.
        return_lse: give ``(out, lse)``, lse that of the quantised scores.

    A query without a key gives zeros and lse = -inf. There is no backward pass: rounding has no gradient.

    Raises:
        ValueError: as `attend` does, for bits and rows that are not as said, NaN or infinite values, and where a
            gradient is asked for.
    """
    r = make_request(q, k, v, pattern, q_start=q_start, scale=scale)
    if r.needs_grad:
        raise ValueError("q, k and v: rounding has no gradient, so none may be asked for; detach them or use no_grad")
    most = (1 << _bits("pv_bits", pv_bits)) - 1
    shape, work = (r.batch, r.heads, r.q_len), r.work_dtype
    out = torch.zeros(*shape, r.v_dim, dtype=work, device=q.device)
    lse = torch.full(shape, -torch.inf, dtype=work, device=q.device)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    sizes = _block(r.pattern, block)
    if not r.empty:
        plan = _Plan(r, sizes)
        blocks = _Blocks(r, plan, quantize(plan.keys(k), qk_bits, rows[1]), quantize(plan.keys(v), pv_bits, sizes[1]))
        qi = quantize(plan.queries(q), qk_bits, rows[0])
        scales = qi.row_scale() * r.scale
        for i in range(plan.rows):
            at = slice(i * sizes[0], (i + 1) * sizes[0])
            found = blocks.row(i, plan.q_slots[:, :, at], qi.values[:, :, at], scales[:, :, at, None], most)
            plan.put(out, at, found[0])
            plan.put(lse[..., None], at, found[1][..., None])
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _block(pattern: Pattern, block: int | tuple[int, int] | None) -> tuple[int, int]:
    """The block asked for; a route whose rows and blocks are of slots has one of its own."""
    if not isinstance(pattern, Routed) or not pattern.ordered:
        return block_size(64 if block is None else block)
    if pattern.repeats != "error" or pattern.keep is not None:
        raise ValueError(
            "pattern is a route in an order of its own with "
            + ("keep" if pattern.keep is not None else f"repeats={pattern.repeats!r}")
            + ", which attention on integers does not take"
        )
    if block is not None and block_size(block) != pattern.block:
        raise ValueError(f"block must be that of the ordered route, {pattern.block}, or None, got {block!r}")
    return pattern.block


class _Plan:
    """Which token each slot holds (-1: none), and which blocks of slots meet. Without an order, slots are tokens."""

    def __init__(self, request: Request, block: tuple[int, int]) -> None:
        self.request, device = request, request.q.device
        r, pattern = request, request.pattern
        self.ordered = isinstance(pattern, Routed) and pattern.ordered
        if isinstance(pattern, Routed) and pattern.ordered:
            assert pattern.index is not None
            assert pattern.count is not None
            orders = [pattern.q_order, pattern.kv_order]
            index, count = pattern.index, pattern.count
        else:
            orders = [None, None]
            index, count = _table(pattern.layout(r.q_len, r.kv_len, block, r.q_start))
        self.index, self.count = (self._spread(x.to(device).long()) for x in (index, count))
        self.q_slots, self.kv_slots = (
            self._slots(order, length, size)
            for order, length, size in zip(orders, (r.q_len, r.kv_len), block, strict=True)
        )
        self.rows, self.columns = (
            x.shape[2] // size for x, size in zip((self.q_slots, self.kv_slots), block, strict=True)
        )

    def _spread(self, x: Tensor) -> Tensor:
        """``[batch, heads, ...]`` from what may tell no samples apart, and decisions instead of heads."""
        heads = self.request.heads // x.shape[1]
        return x.repeat_interleave(heads, 1).expand(self.request.batch, *(-1,) * (x.ndim - 1))

    def _slots(self, order: Tensor | None, length: int, size: int) -> Tensor:
        r = self.request
        slots = torch.arange(length)[None, None] if order is None else order
        slots = torch.nn.functional.pad(slots.to(r.q.device), (0, -slots.shape[-1] % size), value=-1)
        return self._spread(slots) if self.ordered else slots

    def queries(self, x: Tensor) -> Tensor:
        """``[batch, heads, slots, width]``; padding is zero."""
        return self._in_slots(x, self.q_slots)

    def keys(self, x: Tensor) -> Tensor:
        """``[batch, kv_heads, slots, width]``; every query head has keys of its own where they are ordered."""
        return self._in_slots(x.repeat_interleave(self.request.group, 1) if self.ordered else x, self.kv_slots)

    def _in_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        at = slots.clamp(min=0)[..., None].expand(*x.shape[:2], -1, x.shape[3])
        return x.gather(2, at).masked_fill((slots < 0)[..., None], 0)

    def put(self, out: Tensor, at: slice, values: Tensor) -> None:
        """Write rows of slots to their tokens."""
        slots = self.q_slots[:, :, at]
        if not self.ordered:
            tokens = slots[0, 0][slots[0, 0] >= 0]
            out[:, :, tokens] = values[:, :, : len(tokens)]
            return
        b, h, s = (slots >= 0).nonzero(as_tuple=True)
        out[b, h, slots[b, h, s]] = values[b, h, s]


class _Blocks:
    """Keys and values in blocks of slots."""

    def __init__(self, request: Request, plan: _Plan, k: Quantized, v: Quantized) -> None:
        self.request, self.plan, n = request, plan, plan.columns
        group = request.heads // k.values.shape[1]
        parts = (x.values.unflatten(2, (n, -1)).repeat_interleave(group, 1) for x in (k, v))
        self.k, self.v = parts
        self.k_scale = k.row_scale().unflatten(2, (n, -1)).repeat_interleave(group, 1)
        self.v_scale = v.scale.repeat_interleave(group, 1)
        self.tokens = plan.kv_slots.unflatten(2, (n, -1)).expand(request.batch, request.heads, -1, -1)

    def row(self, i: int, q_slots: Tensor, q: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of one block of queries."""
        r = self.request
        count = self.plan.count[:, :, i]
        width = max(int(count.max()), 1)
        index = torch.nn.functional.pad(self.plan.index[:, :, i], (0, 1), value=-1)[..., :width]
        there = torch.arange(width, device=index.device) < count[..., None]
        index = torch.where(there, index, 0)
        k, v, tokens = (_pick(x, index) for x in (self.k, self.v, self.tokens))
        allowed = self._allowed(q_slots, torch.where(there[..., None], tokens, -1).flatten(2))
        whole = integer_product(q, k.flatten(2, 3).transpose(2, 3)).to(r.work_dtype)
        scores = whole * scale * _pick(self.k_scale, index).flatten(2)[:, :, None]
        scores = scores.masked_fill(~allowed, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        weights = (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()
        weights = weights.unflatten(3, (width, -1)).transpose(2, 3)  # [batch, heads, block, query, key]
        step = weights.amax((-2, -1)) / most
        whole = (weights / torch.where(step > 0, step, 1)[..., None, None]).round_().clamp_(max=most).to(torch.uint8)
        parts = integer_product(whole, v).to(r.work_dtype)
        return torch.einsum("bhm,bhmqd->bhqd", step * _pick(self.v_scale, index), parts), lse

    def _allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Pairs of the tokens in slots ``[batch, heads, n]``; none with padding."""
        r, device = self.request, keys.device
        real = (queries >= 0)[..., None] & (keys >= 0)[:, :, None]
        if r.whole:
            return real
        head = torch.arange(r.heads, device=device)[:, None, None]
        sample = torch.arange(r.batch, device=device)[:, None, None, None]
        i, j = queries.clamp(min=0)[..., None] + r.q_start, keys.clamp(min=0)[:, :, None]
        return real & r.pattern.allows(i, j, head, sample)


def _table(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """``(index [samples, heads, rows, width], count)`` of a layout's blocks, in padded rows."""
    counts = layout.counts
    place = torch.arange(max(int(counts.max()) if len(counts) else 0, 1))
    there = place < counts[:, None]
    index = torch.full(there.shape, -1, dtype=torch.long)
    index[there] = layout.indices.long()
    lead = (layout.samples, layout.heads, layout.n_q_blocks)
    return index.view(*lead, len(place)), counts.view(lead)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``[batch, heads, m, ...]``: the blocks `index` of ``[batch, heads, blocks, ...]``."""
    at = index.view(*index.shape, *(1,) * (x.ndim - 3)).expand(*index.shape, *x.shape[3:])
    return x.gather(2, at)


def _bits(name: str, bits: Any) -> int:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"{name} must be an integer from 2 to 8, got {bits!r}")
    return bits
