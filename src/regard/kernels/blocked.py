"""The blocked backend: the tiles of a pattern's layout fed to a dense kernel. Any pattern, no compiling.

On a CPU the dense kernel is PyTorch's flash attention; where that cannot serve (softcaps, element-wise normalisers,
biases, other devices) a tile is plain PyTorch. Memory O(length): what is kept for the backward pass is q, k, v, out
and lse, and tiles are worked on in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from regard.kernels import blocked_flash, blocked_math, routed_math
from regard.kernels.blocked_plan import FULL
from regard.kernels.blocked_routed import in_slots, serves, slot_heads
from regard.kernels.blocked_strips import Call, strips
from regard.kernels.by_choice import run_by_choice
from regard.kernels.normalize import Softmax
from regard.kernels.request import Request
from regard.kernels.routed_tiles import Tiles, make_tiles
from regard.patterns.decided import Routed

__all__ = ["describe", "refuses", "run"]


def refuses(request: Request) -> str | None:
    """Normalisers that need whole rows."""
    if request.normalize.tier == "rows":
        return f"{request.normalize} needs whole rows of scores, and this works tile by tile"
    return None


def _fused(r: Request) -> bool:
    """Whether the flash kernel serves the request."""
    plain = isinstance(r.normalize, Softmax) and r.softcap is None and r.bias is None
    return plain and r.q.device.type == "cpu"


def _call(r: Request, tiles: Tiles | None = None) -> Call:
    pattern = r.pattern.of() if (r.pattern.heads, r.pattern.samples) == (None, None) else r.pattern
    return Call(pattern, r.layout, r.q_start, r.scale, r.softcap, r.normalize, tiles)


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """``(out [batch, heads, q_len, v_dim], lse [batch, heads, q_len] or None)``."""
    chosen = run_by_choice(request, run)
    if chosen is not None:
        return chosen
    r = request
    if _fused(r):
        # Half precision stays as it is where the kernel is fast in it: bfloat16, not float16.
        work = torch.float32 if r.q.dtype == torch.float16 else r.q.dtype
        width = max(r.head_dim, r.v_dim)
        q, k, v = (_wide(x.to(work), width) for x in (r.q, r.k, r.v))
    else:
        q, k, v = (x.to(r.work_dtype) for x in (r.q, r.k, r.v))

    def kernel(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor | None]:
        if _fused(r):
            out, lse = _Flash.apply(q, k, v, _call(r, tiles))
        else:
            out, lse = _Math.apply(q, k, v, r.bias, _call(r, tiles), r.normalize.has_lse())
        return out, lse

    out, lse = in_slots(r.pattern, q, k, v, kernel) if serves(r.pattern) else kernel(q, k, v)
    return out[..., : r.v_dim].to(r.q.dtype), lse if r.need_lse else None


def _wide(x: Tensor, width: int) -> Tensor:
    """With columns of zeros up to this width: the flash kernel has one width for keys and values."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def describe(request: Request) -> dict[str, Any]:
    """Blocks, density, operations and bytes of the forward pass."""
    r = request
    if _fused(r) and blocked_flash.whole(_call(r)) is not None:
        pairs = r.batch * r.heads * int(r.pattern.row_counts(r.q_len, r.kv_len, r.q_start).sum())
        outputs = r.batch * r.heads * r.q_len * (r.v_dim * r.q.element_size() + 4)
        return {
            "kernel": "flash attention of the CPU, one call",
            "order": "memory order",
            "block": [],
            "blocks": 0,
            "full": 0,
            "computed": pairs,
            "operations": 2 * (r.head_dim + r.v_dim) * pairs,
            "bytes": sum(x.numel() * x.element_size() for x in (r.q, r.k, r.v)) + outputs,
        }
    if serves(r.pattern):
        return _describe_routed(r, r.pattern)
    pairs = listed = full = moved = 0
    order = set()
    block = set()
    for strip in strips(_call(r), r.q, r.k):
        heads = len(range(r.batch * r.heads)[strip.q]) if isinstance(strip.q, slice) else len(strip.q)
        kv_heads = 1 if strip.shared else heads
        plan = strip.plan
        pairs += heads * plan.pairs
        listed += heads * len(plan.blocks.anchor)
        full += heads * int((plan.blocks.kind == FULL).sum())
        width = (r.head_dim + r.v_dim) * r.k.element_size()
        moved += sum(2 * kv_heads * len(b) * b.n * width for b in plan.batches if b.shift is None)
        order.add(plan.order)
        block.add(plan.blocks.block)
    inputs = sum(x.numel() * x.element_size() for x in (r.q, r.k, r.v))
    outputs = r.batch * r.heads * r.q_len * (r.v_dim * r.q.element_size() + 4)
    return {
        "kernel": "flash attention of the CPU" if _fused(r) else "plain PyTorch",
        "order": ", ".join(sorted(order)),
        "block": sorted(block),
        "blocks": listed,
        "full": full,
        "computed": pairs,
        "operations": 2 * (r.head_dim + r.v_dim) * pairs,
        "bytes": inputs + outputs + moved,
    }


def _describe_routed(r: Request, routed: Routed) -> dict[str, Any]:
    tiles = make_tiles(routed, r.batch, r.heads, slot_heads(routed, r.heads, r.kv_heads))
    width = (r.head_dim + r.v_dim) * r.q.element_size()
    own = r.batch * (r.heads * r.q_len + r.kv_heads * r.kv_len) * width  # q and out, k and v
    listed, full = tiles.listed
    order = "slots" if routed.ordered else "memory order"
    pairs, moved = tiles.pairs, 2 * tiles.gathered * width
    columns = tiles.columns if _fused(r) else None
    if columns is not None:  # queries are copied to their keys, and a result of each block from there
        order += ", by block of keys"
        each = tiles.units.each * tiles.size
        pairs = each * columns.queries * columns.block
        moved = 2 * each * columns.queries * width
    return {
        "kernel": "flash attention of the CPU" if _fused(r) else "plain PyTorch",
        "order": order,
        "block": [routed.block],
        "blocks": listed,
        "full": full,
        "computed": pairs,
        "operations": 2 * (r.head_dim + r.v_dim) * pairs,
        "bytes": own + 4 * r.batch * r.heads * r.q_len + moved,
    }


class _Flash(torch.autograd.Function):
    """(q, k, v) -> (out, lse) by the flash kernel."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return blocked_flash.forward(q, k, v, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.call = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return None, None, None, None
        d_out = torch.zeros_like(out) if d_out is None else d_out
        return *_Once.apply(ctx.call, None, q, k, v, out, lse, d_out, d_lse), None


class _Math(torch.autograd.Function):
    """(q, k, v, bias) -> (out, lse) by plain PyTorch."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, has_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if call.tiles is not None:
            return routed_math.forward(q, k, v, bias, call, call.tiles, has_lse)
        return blocked_math.forward(q, k, v, bias, call, has_lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        q, k, v, bias, ctx.call, _ = inputs
        ctx.save_for_backward(q, k, v, bias)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return None, None, None, None, None, None
        if d_out is None:
            d_out = q.new_zeros(*q.shape[:3], v.shape[-1])
        d_bias = bool(ctx.needs_input_grad[3])
        return *_Once.apply(ctx.call, d_bias, q, k, v, bias, None, d_out, d_lse), None, None


class _Once(torch.autograd.Function):
    """The backward pass, which has none of its own."""

    @staticmethod
    def forward(
        call: Call,
        d_bias: bool | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        third: Tensor | None,
        lse: Tensor | None,
        d_out: Tensor,
        d_lse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if d_bias is None:
            assert third is not None
            assert lse is not None
            return blocked_flash.backward(q, k, v, third, lse, d_out, d_lse, call)
        if call.tiles is not None:
            *got, bias = routed_math.backward(q, k, v, third, d_out, d_lse, call, call.tiles, d_bias)
        else:
            *got, bias = blocked_math.backward(q, k, v, third, d_out, d_lse, call, d_bias)
        return *got, None if bias is None or third is None else bias.to(third.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            'backend="blocked" has no double backward: its gradients cannot be differentiated again; '
            'backend="reference" can'
        )
