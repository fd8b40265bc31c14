"""FlexAttention fed with our layouts: compiled once, masks looked up in tables.

Instead of `create_block_mask`, which evaluates every pair, the blocks come from the pattern's layout, and the pairs of
partial blocks from a table of the different masks among them. So one compiled kernel serves every pattern, and a
pattern that changes with each batch (documents) compiles nothing. Grids run in tile order.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.kernels.blocked_routed import into_slots, out_of_slots, slot_heads
from regard.kernels.partial import partial_tiles
from regard.kernels.request import Request, make_request
from regard.patterns.decided import Routed
from regard.patterns.grid import Grid
from regard.patterns.layout import BlockLayout
from regard.patterns.order import TileOrder

__all__ = ["BLOCK", "describe", "refuses", "run"]

BLOCK = 128  # FlexAttention's own sparse block
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = 16  # prepared patterns


def refuses(request: Request) -> str | None:
    """Why FlexAttention cannot compute this exactly, or None."""
    r = request
    if r.normalize.tier != "fused":
        return f"FlexAttention has the softmax alone, not {r.normalize}"
    if r.q.dtype not in _CPU_DTYPES:
        return f"FlexAttention computes in float32, bfloat16 and float16, not {r.q.dtype}"
    if isinstance(r.pattern, Routed) and (why := _refuses_route(r.pattern, r)) is not None:
        return why
    if r.layout is not None and r.layout.block != (BLOCK, BLOCK):
        return f"FlexAttention takes layouts in blocks of {BLOCK}, not {r.layout.block}; leave layout= out"
    if r.q.device.type == "cpu":
        return _refuses_on_cpu(r)
    if r.q.device.type != "cuda":
        return f"it is built for CPU and CUDA, not {r.q.device.type}"
    if min(r.head_dim, r.v_dim) < 16 or max(r.head_dim, r.v_dim) > 256:
        return f"on a GPU it takes widths of 16 to 256, not head_dim {r.head_dim} and v_dim {r.v_dim}"
    if r.bias is not None and r.bias.requires_grad:
        return "gradients of a bias go through its score function, which is slow and not exact in half precision"
    if not _has_triton():
        return "it compiles with Triton, which is not installed"
    return None


def _refuses_route(routed: Routed, r: Request) -> str | None:
    if routed.which is None and any(size % BLOCK for size in routed.block):
        return (
            f"blocks of {routed.block} are no multiples of FlexAttention's tile of {BLOCK}; blocked gathers their keys"
        )
    if routed.repeats == "mean":
        return "it has one softmax a query, and this route averages those of several groups"
    if routed.ordered and r.bias is not None:
        return "a bias is of tokens, and this route runs in slots"
    return None


def _refuses_on_cpu(r: Request) -> str | None:
    if r.needs_grad:
        return "FlexAttention has no backward pass on a CPU"
    if isinstance(r.pattern, Routed) and r.pattern.repeats == "merge":
        return "FlexAttention gives no lse on a CPU, by which groups are merged"
    if r.need_lse:
        return "FlexAttention gives no lse on a CPU" + (", which a sink needs" if r.sink is not None else "")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return f"it compiles C++ on a CPU, and there is no compiler ({compiler}, clang++)"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"on a CPU it needs AVX2, this one has {torch.backends.cpu.get_cpu_capability()}"
    return None


class _Prepared(NamedTuple):
    """A pattern at given lengths, on the device, in FlexAttention's form."""

    block_mask: Any
    q_order: TileOrder | None
    kv_order: TileOrder | None
    layout: BlockLayout


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` by FlexAttention."""
    r = request
    if isinstance(r.pattern, Routed) and r.pattern.ordered:
        return _run_in_slots(r, r.pattern)
    made = _prepared(r)
    q, k, v = r.q, r.k, r.v
    if made.q_order is not None and made.kv_order is not None:
        q, k, v = made.q_order.apply(q), made.kv_order.apply(k), made.kv_order.apply(v)
    kwargs: dict[str, Any] = {
        "score_mod": _score_mod(r.softcap, r.bias),
        "block_mask": made.block_mask,
        "scale": r.scale,
        "enable_gqa": r.group > 1,
    }
    if not r.need_lse:
        out, lse = _compiled(r.q.device.type)(q, k, v, **kwargs), None
    elif _takes_aux():
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = _compiled(r.q.device.type)(q, k, v, **kwargs, return_aux=AuxRequest(lse=True))
        lse = aux.lse
    else:
        out, lse = _compiled(r.q.device.type)(q, k, v, **kwargs, return_lse=True)
    if made.q_order is not None:
        out = made.q_order.undo(out)
        lse = None if lse is None else made.q_order.undo(lse, -1)
    return out, lse


def _run_in_slots(r: Request, routed: Routed) -> tuple[Tensor, Tensor | None]:
    """Tokens put into the route's order and back; outputs of a query in several groups are merged by their lse."""
    q = r.q if routed.q_order is None else into_slots(r.q, routed.q_order, r.heads)
    k, v = r.k, r.v
    if routed.kv_order is not None:
        k, v = (into_slots(x, routed.kv_order, slot_heads(routed, r.heads, r.kv_heads)) for x in (k, v))
    need_lse = r.need_lse or routed.repeats == "merge"
    inside = make_request(q, k, v, routed.slots(), q_start=0, scale=r.scale, softcap=r.softcap, return_lse=need_lse)
    out, lse = run(inside)
    return (out, lse) if routed.q_order is None else out_of_slots(out, lse, routed)


def describe(request: Request) -> dict[str, Any]:
    """The blocks it would run on; every pair of a listed block is computed, and k and v read for each."""
    r = request
    order = "memory order"
    if isinstance(r.pattern, Routed) and r.pattern.ordered:
        slots, grid, order = r.pattern.slots(), None, "slots of the route"
        layout = slots.layout(slots.q_len, slots.kv_len, BLOCK, 0)
    else:
        layout, grid = _layout(r)
    repeats = r.batch // layout.samples * (r.heads // layout.heads)
    i, j = layout.rows % max(layout.n_q_blocks, 1), layout.indices.long()
    rows = (layout.q_len - i * BLOCK).clamp(max=BLOCK)
    keys = (layout.kv_len - j * BLOCK).clamp(max=BLOCK)
    computed = int((rows * keys).sum()) * repeats
    width = r.head_dim + r.v_dim
    return {
        "kernel": "FlexAttention",
        "order": order if grid is None else f"tiles of {'x'.join(map(str, grid.q_order.tile))}",
        "block": [layout.block],
        "blocks": layout.n_blocks * repeats,
        "full": int(layout.full.sum()) * repeats,
        "computed": computed,
        "operations": 2 * width * computed,
        "bytes": r.q.element_size() * width * (r.batch * r.heads * r.q_len + int(keys.sum()) * repeats),
    }


@cache
def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


@cache
def _takes_aux() -> bool:
    from torch.nn.attention.flex_attention import flex_attention

    return "return_aux" in inspect.signature(flex_attention).parameters


@cache
def _compiled(device: str) -> Callable[..., Any]:
    """FlexAttention compiled; every shape it meets counts as one more version, never as a reason to run unfused.

    On a CPU each shape has its own version: its generated C++ does not stand open sizes.
    """
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    most: dict[str, Any] = {limit: 1024}

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(most):
            return compiled(*args, **kwargs)

    return call


# What follows is traced by the compiler. Lambdas, because nothing must wrap them (type checkers wrap functions).


def _score_mod(softcap: float | None, bias: Tensor | None) -> Callable[..., Tensor] | None:
    if bias is None:
        return None if softcap is None else lambda s, b, h, q, k: softcap * torch.tanh(s / softcap)
    b1, h1, q1, k1 = (int(n > 1) for n in bias.shape)
    if softcap is None:
        return lambda s, b, h, q, k: s + bias[b * b1, h * h1, q * q1, k * k1]
    return lambda s, b, h, q, k: softcap * torch.tanh(s / softcap) + bias[b * b1, h * h1, q * q1, k * k1]


def _mask_mod(slot: Tensor, tiles: Tensor) -> Callable[..., Tensor]:
    b1, h1 = int(slot.shape[0] > 1), int(slot.shape[1] > 1)
    return lambda b, h, q, k: tiles[slot[b * b1, h * h1, q // BLOCK, k // BLOCK], q % BLOCK, k % BLOCK]


def _layout(r: Request) -> tuple[BlockLayout, Any]:
    """The layout, and the tiled grid it is of where tokens are reordered."""
    if isinstance(r.pattern, Grid) and r.bias is None and r.layout is None:
        tile = _tile(r.pattern.shape)
        if tile is not None:
            tiled = r.pattern.tiled(tile)
            return tiled.layout, tiled
    return r.block_layout(BLOCK), None


def _tile(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Sides, powers of two of product `BLOCK`, each axis cut about as often as the others; None: too small a grid."""
    sides = [1] * len(shape)
    while (product := torch.Size(sides).numel()) < BLOCK:
        room = [d for d in range(len(shape)) if sides[d] < shape[d]]
        if not room:
            return None
        sides[max(room, key=lambda d: (shape[d] / sides[d], d))] *= 2
    return tuple(sides) if product == BLOCK and len(shape) > 1 else None


_PREPARED: OrderedDict[Any, _Prepared] = OrderedDict()


def _prepared(r: Request) -> _Prepared:
    try:
        key = (r.pattern, r.q_len, r.kv_len, r.q_start, r.q.device, r.bias is None)
        found = _PREPARED.get(key)
    except TypeError:  # a routed pattern holds tensors and has no hash
        return _prepare(r)
    if found is None:
        found = _PREPARED[key] = _prepare(r)
        if len(_PREPARED) > _KEPT:
            _PREPARED.popitem(last=False)
    else:
        _PREPARED.move_to_end(key)
    return found


def _prepare(r: Request) -> _Prepared:
    layout, grid = _layout(r)
    partial = partial_tiles(layout, r.pattern, r.q_start, None if grid is None else grid.mask)
    device = r.q.device
    slot = torch.zeros(layout.samples, layout.heads, layout.n_q_blocks, layout.n_kv_blocks, dtype=torch.int32)
    chosen = ~layout.full
    slot.view(-1, layout.n_kv_blocks)[layout.rows[chosen], layout.indices[chosen].long()] = partial.which.int()
    block_mask = layout.to_block_mask(r.pattern, r.q_start, device)
    block_mask.mask_mod = _mask_mod(slot.to(device), _padded(partial.tiles).to(device))
    q_order, kv_order = (None, None) if grid is None else (grid.q_order, grid.kv_order)
    return _Prepared(block_mask, q_order, kv_order, layout)


def _padded(tiles: Tensor) -> Tensor:
    """As many masks as the next power of two, so that few numbers of them are ever compiled for."""
    more = (1 << max(4, (len(tiles) - 1).bit_length())) - len(tiles)
    return torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, more))
