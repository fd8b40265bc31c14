"""One exact pass over the weights in row tiles, each tile handed to any number of reducers.

Per tile: one matrix product for the scores, one softmax over whole rows, then what the reducers ask for.
A tile stays in the processor's cache; the keys are trimmed to those that some row of the tile may see.
Time O(q_len * kv_len * head_dim), halved for causal calls and O(q_len * window) for windows; memory one tile.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.scope import NOTHING, Scope, make_scope
from regard.patterns.pattern import Pattern

__all__ = ["Frame", "Reducer", "Tile", "check_qk", "tile_pass"]


@dataclass
class Frame:
    """What a reducer needs to know before the first tile. A unit is one head of one sample: batch * heads of them."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    start: int  # index on the key axis of the first query
    tiles: list[tuple[int, int]]
    dtype: torch.dtype
    device: torch.device

    def zeros(self, *shape: int) -> Tensor:
        """Zeros ``[units, *shape]``."""
        return torch.zeros(self.batch * self.heads, *shape, dtype=self.dtype, device=self.device)

    def per_head(self, flat: Tensor) -> Tensor:
        """``[units, ...]`` seen as ``[batch, heads, ...]``."""
        return flat.view(self.batch, self.heads, *flat.shape[1:])


@dataclass
class Tile:
    """Weights of some units, of rows ``[i0, i1)`` over keys ``[lo, hi)``; every other weight of these rows is 0."""

    n: int  # number of the row tile in Frame.tiles
    units: slice
    rows: slice
    lo: int
    hi: int
    weights: Tensor  # [units, rows, hi - lo], a view of `storage`
    storage: Tensor  # [units, rows, width] contiguous, width >= hi - lo, zero past hi - lo
    causal: bool  # no weight past the diagonal, which is all the room a sheared read needs; otherwise rows are padded
    lse: Tensor  # [units, rows], -inf for rows without a key
    top: Tensor  # [units, rows] largest weight of the row
    entropy: Tensor | None  # [units, rows], if a reducer needs it


class Reducer(ABC):
    """Turns tiles into a result. Objects hold their options only, so one may serve many passes."""

    needs_entropy = False  # of each row, in Tile.entropy
    needs_diagonals = False  # zeros past the end of each row of Tile.storage
    all_heads = False  # every head of a sample in the same tile

    @abstractmethod
    def start(self, frame: Frame) -> tuple[Callable[[Tile], None], Callable[[], Any]]:
        """The function that takes each tile, and the one that gives the result after the last."""


def check_qk(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int, int]:
    """Check shapes and values; returns (batch, heads, kv_heads, q_len, kv_len, head_dim)."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "q and k must be [batch, heads, q_len, head_dim] and [batch, kv_heads, kv_len, head_dim], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"q and k must agree in batch and head_dim, got {list(q.shape)} and {list(k.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k must have a number of heads that divides the {heads} of q, got {kv_heads}")
    for name, x in (("q", q), ("k", k)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        total = x.detach().sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        if not bool(total.isfinite()) and not bool(x.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q and k must share dtype and device, got {q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
    return batch, heads, kv_heads, q_len, kv_len, dim


def _budget(device: torch.device) -> int:
    """Scores in a tile: what stays in a processor's cache; on a GPU, what fills it."""
    return 1 << 18 if device.type == "cpu" else 1 << 26


def _row_tiles(scope: Scope, tile: int | None, budget: int) -> list[tuple[int, int]]:
    """Row tiles, smaller where rows see more keys."""
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a number of rows >= 1, or None to choose it, got {tile}")
    tiles, i0, most = [], 0, 128 if budget <= 1 << 20 else 4096
    while i0 < scope.q_len:
        keys = scope.kv_len
        if scope.causal:
            keys = min(keys, max(1, i0 + most + scope.start))
        rows = tile or max(16, min(most, budget // max(keys, 1) // 16 * 16))
        tiles.append((i0, min(scope.q_len, i0 + rows)))
        i0 += rows
    return tiles


def tile_pass(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    reducers: Sequence[Reducer],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, "heads"] | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
    tile: int | None = None,
) -> list[Any]:
    """Exact weights ``P = softmax(scale q k^T + bias)`` in row tiles, reduced by each of ``reducers``.

    Returns one result a reducer, in order, in float32 (float64 for float64 input). Half precision inputs are
    converted to float32 first, so the weights are those of the given q and k and not of a half precision product.

    - ``mask``: bool (True = allowed) or additive; broadcastable to [batch, heads, q_len, kv_len]. ``-inf``, or
      anything at or below -1e30 such as ``torch.finfo(torch.float32).min``, means not allowed.
    - ``is_causal``: query i sees keys j <= i + q_start; ``q_start=None`` means 0 then, as in
      ``scaled_dot_product_attention``, and otherwise that the queries are the last ones.
    - ``pattern``: absolute indices; combined with the others by "and". Keys it forbids to a whole tile cost nothing.
    - ``scale``: default 1/sqrt(head_dim). ``softcap`` c: scores become c tanh(s / c), before the mask.
    - ``sink``: one learned logit a head that joins the normaliser; the keys' weights then sum to less than 1.
    - ``valid`` [batch, q_len]: rows that are False count as rows without a key.
    - ``tile``: rows in a tile; None chooses by the cache (CPU) or the memory (GPU).

    Rows without a key: weights 0, lse -inf, entropy 0. NaN or infinite values in q or k: ValueError.
    Time: with the usual reducers about one call of the fused attention; memory O(tile * kv_len), plus copies of
    q and k in float32.
    """
    batch, heads, _, q_len, kv_len, dim = check_qk(q, k)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for none, got {softcap}")
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scope = make_scope(
            (batch, heads, q_len, kv_len),
            q.device,
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            q_start=q_start,
            valid=valid,
        )
        scale = 1 / math.sqrt(dim) if scale is None else scale
        return _run(q, k, reducers, scope, float(scale), softcap, sink, tile)


def _run(
    q: Tensor,
    k: Tensor,
    reducers: Sequence[Reducer],
    scope: Scope,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
    tile: int | None,
) -> list[Any]:
    batch, heads, q_len, kv_len = scope.batch, scope.heads, scope.q_len, scope.kv_len
    kv_heads, dim = k.shape[1], q.shape[3]
    group, units = heads // kv_heads, batch * heads
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    budget = _budget(q.device)
    together = any(r.all_heads for r in reducers)
    tiles = _row_tiles(scope, tile, budget // heads if together and heads else budget)
    frame = Frame(batch, heads, q_len, kv_len, scope.start, tiles, work, q.device)
    adds, finishes = [], []
    for reducer in reducers:
        add, finish = reducer.start(frame)
        adds.append(add)
        finishes.append(finish)
    if units == 0 or q_len == 0 or kv_len == 0:
        return [finish() for finish in finishes]

    q_all = torch.empty(q.shape, dtype=work, device=q.device).copy_(q).mul_(scale).view(units, q_len, dim)
    k_all = torch.empty(k.shape, dtype=work, device=q.device).copy_(k).view(batch * kv_heads, kv_len, dim)
    shift = None
    if softcap is None:
        # Keys less their mean: the same weights (a constant a row), smaller scores, less rounding.
        mean = k_all.mean(1, keepdim=True)
        k_all = k_all - mean
        shift = (q_all.view(-1, group * q_len, dim) @ mean.transpose(1, 2)).view(units, q_len)
    sinks = None if sink is None else sink.detach().to(work).repeat(batch)

    spans = scope.spans(tiles)
    want_entropy = any(r.needs_entropy for r in reducers)
    want_room = any(r.needs_diagonals for r in reducers)
    most_rows = max(i1 - i0 for i0, i1 in tiles)
    # Several units a tile when rows are short: as many as fit, whole groups (or samples) at a time.
    step = heads if together else group
    many = min(max(budget // (most_rows * kv_len) // step * step, heads if together else 1), units)
    size = many * most_rows * (kv_len + most_rows)
    score_buffer = torch.empty(size, dtype=work, device=q.device)
    weight_buffer = torch.empty(size, dtype=work, device=q.device)

    for u0 in range(0, units, many):
        u1 = min(u0 + many, units)
        for n, (i0, i1) in enumerate(tiles):
            per_batch = spans[n]
            span = per_batch[0]
            if len(per_batch) > 1:
                b0, b1 = u0 // heads, (u1 - 1) // heads
                span = per_batch[b0]
                for b in range(b0 + 1, b1 + 1):
                    span = span.cover(per_batch[b])
            if span.lo >= span.hi:
                continue  # no key for any row: the results start out as "empty"
            count, rows, width = u1 - u0, i1 - i0, span.hi - span.lo
            # A causal tile has zeros past each row's end already; others get room for the shear.
            natural = scope.causal and span.hi == i1 + scope.start and width >= rows
            pad = 0 if natural or not want_room else rows
            shape = (count, rows, width + pad)
            storage = score_buffer[: math.prod(shape)].view(shape)
            scores = storage[..., :width]
            if count == 1:
                kv = u0 // group
                torch.mm(q_all[u0, i0:i1], k_all[kv, span.lo : span.hi].t(), out=scores[0])
            else:
                keys = k_all[u0 // group : u1 // group, span.lo : span.hi].transpose(1, 2)
                queries = q_all[u0:u1, i0:i1].reshape(count // group, group * rows, dim)
                scores.copy_((queries @ keys).view(count, rows, width))
            if pad:
                storage[..., width:] = NOTHING
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            scope.forbid(scores, (u0, u1), (i0, i1), span)
            weights = weight_buffer[: math.prod(shape)].view(shape)
            torch.softmax(storage, -1, out=weights)
            largest = scores.amax(-1)
            top = weights.amax(-1)
            lse = largest - top.log()
            empty = None
            if scope.may_be_empty():
                empty = largest <= NOTHING / 2
                if scope.invalid is not None:
                    bad = scope.invalid[:, i0:i1].expand(batch, -1).repeat_interleave(heads, 0)
                    empty = empty | bad[u0:u1]
                if bool(empty.any()):
                    weights.mul_(~empty[..., None])
                    top.masked_fill_(empty, 0)
                    lse.masked_fill_(empty, -torch.inf)
                else:
                    empty = None
            entropy = None
            if sinks is not None:
                logit = sinks[u0:u1, None] if shift is None else sinks[u0:u1, None] - shift[u0:u1, i0:i1]
                total = torch.logaddexp(lse, logit)
                share = (lse - total).exp()
                if empty is not None:
                    share.masked_fill_(empty, 0)
                weights.mul_(share[..., None])
                top.mul_(share)
                if want_entropy:
                    entropy = total - (logit - total).exp() * logit
                lse = total if empty is None else total.masked_fill(empty, -torch.inf)
            if want_entropy:
                base = lse if entropy is None else entropy
                entropy = base - storage.mul_(weights).sum(-1)
                entropy.clamp_(min=0)
                if empty is not None:
                    entropy.masked_fill_(empty, 0)
            if shift is not None:
                lse = lse + shift[u0:u1, i0:i1]
            piece = Tile(
                n,
                slice(u0, u1),
                slice(i0, i1),
                span.lo,
                span.hi,
                weights[..., :width],
                weights,
                natural,
                lse,
                top,
                entropy,
            )
            for add in adds:
                add(piece)
    return [finish() for finish in finishes]
