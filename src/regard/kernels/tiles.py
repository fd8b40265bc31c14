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
from functools import reduce
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.scope import NOTHING, Scope, Span, make_scope
from regard.patterns.pattern import Pattern

__all__ = ["Add", "Frame", "Reducer", "Tile", "check_qk", "tile_pass"]


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
    # Of each row, [units, q_len]; there after the last tile.
    lse: Tensor  # -inf for rows without a key
    top: Tensor  # largest weight
    entropy: Tensor  # if a reducer needs it

    def zeros(self, *shape: int) -> Tensor:
        """Zeros ``[units, *shape]``."""
        return torch.zeros(self.batch * self.heads, *shape, dtype=self.dtype, device=self.device)

    def per_head(self, flat: Tensor) -> Tensor:
        """``[units, ...]`` seen as ``[batch, heads, ...]``."""
        return flat.view(self.batch, self.heads, *flat.shape[1:])


@dataclass(slots=True)
class Tile:
    """Weights of some units, of a tile of rows over keys ``[lo, hi)``; every other weight of these rows is 0."""

    n: int  # number of the row tile in Frame.tiles
    unit: int  # first unit
    count: int  # number of units
    units: slice
    rows: slice
    lo: int
    hi: int
    weights: Tensor  # [units, rows, hi - lo], a view of `storage`
    storage: Tensor  # [units, rows, width] contiguous, width >= hi - lo, zero past hi - lo
    causal: bool  # no weight past the diagonal, which is all the room a sheared read needs; otherwise rows are padded


Add = Callable[[Tile], None]


class Reducer(ABC):
    """Turns tiles into a result. Objects hold their options only, so one may serve many passes."""

    needs_entropy = False  # in Frame.entropy
    needs_diagonals = False  # zeros past the end of each row of Tile.storage
    all_heads = False  # every head of a sample in the same tile
    by_tile = False  # a tile of all units before the next tile, so that masks of positions can be kept for it

    @abstractmethod
    def start(self, frame: Frame) -> tuple[Add | None, Callable[[], Any]]:
        """The function that takes each tile (None: no need), and the one that gives the result after the last."""


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
    """Scores in a tile: about what the caches of the cores hold; on a GPU, what fills it."""
    return 1 << 18 + min(4, max(1, torch.get_num_threads().bit_length() - 1)) if device.type == "cpu" else 1 << 26


def _row_tiles(scope: Scope, tile: int | None, budget: int) -> list[tuple[int, int]]:
    """Row tiles, of fewer rows where rows see more keys."""
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a number of rows >= 1, or None to choose it, got {tile}")
    # Under a causal mask the last square of a tile is half wasted: a sixteenth of the length at most.
    trims = scope.causal or scope.allowed is not None or scope.pattern is not None
    most = max(64, min(256, scope.q_len // 16)) if trims else 256
    most = most if scope.device.type == "cpu" else 16 * most
    tiles, i0 = [], 0
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


class _Rows:
    """Per row: the largest score m, the largest weight, ``sum_j P_ij (s_ij - m_i)``; lse and entropy follow at the end.

    Scores are those of the keys less their mean; `shift` is what that takes from every score of a row.
    """

    def __init__(self, frame: Frame, scope: Scope, shift: Tensor | None, sink: Tensor | None) -> None:
        self.frame = frame
        self.largest = frame.zeros(frame.q_len).fill_(NOTHING)
        self.top = torch.ones_like(self.largest)
        self.dot = torch.zeros_like(self.largest)
        self.shift = shift
        self.invalid = None
        if scope.invalid is not None:
            self.invalid = scope.invalid.expand(frame.batch, -1).repeat_interleave(frame.heads, 0)
        self.check = scope.may_be_empty()
        self.sink = None
        if sink is not None:  # the sink's score, row by row, on the scale of the shifted scores
            logit = sink.detach().to(frame.device, frame.dtype).repeat(frame.batch)[:, None]
            self.sink = logit.expand_as(self.largest) if shift is None else logit - shift

    def empty(self, at: tuple[slice, slice]) -> Tensor:
        """Rows without a key."""
        empty = self.largest[at] <= NOTHING / 2
        return empty if self.invalid is None else empty | self.invalid[at]

    def key_share(self, at: tuple[slice, slice]) -> Tensor:
        """The part of a row that the keys hold beside the sink."""
        assert self.sink is not None
        return torch.sigmoid(self.largest[at] - self.top[at].log() - self.sink[at])

    def take(self, scores: Tensor, weights: Tensor, width: int, at: tuple[slice, slice], entropy: bool) -> None:
        """Take a tile; scores are used up. Rows without a key get weights of zero."""
        torch.amax(scores[..., :width], -1, out=self.largest[at])
        torch.amax(weights, -1, out=self.top[at])
        if self.check:
            empty = self.empty(at)
            if bool(empty.any()):
                weights.mul_(~empty[..., None])
        if self.sink is not None:
            weights.mul_(self.key_share(at)[..., None])
        if entropy:
            # Less the row's largest score: else a peaked row's entropy is the difference of two large numbers.
            torch.sum(scores.sub_(self.largest[at][..., None]).mul_(weights), -1, out=self.dot[at])

    def finish(self) -> None:
        """Put lse, top and entropy where the reducers look for them."""
        frame, everything = self.frame, (slice(None), slice(None))
        lse = -self.top.log()  # less the largest score, as the sink
        entropy = -self.dot
        if self.sink is not None:
            sink = self.sink - self.largest
            frame.top.copy_(self.top * self.key_share(everything))
            lse = torch.logaddexp(lse, sink)
            share = (sink - lse).exp()
            entropy -= share * torch.where(share > 0, sink, 0)
        else:
            frame.top.copy_(self.top)
        frame.entropy.copy_(entropy.add_(lse).clamp_(min=0))
        lse += self.largest
        frame.lse.copy_(lse if self.shift is None else lse + self.shift)
        empty = self.empty(everything)
        frame.top.masked_fill_(empty, 0)
        frame.entropy.masked_fill_(empty, 0)
        frame.lse.masked_fill_(empty, -torch.inf)


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
    per_row = [torch.full((units, q_len), x, dtype=work, device=q.device) for x in (-torch.inf, 0.0, 0.0)]
    frame = Frame(batch, heads, q_len, kv_len, scope.start, tiles, work, q.device, *per_row)
    started = [r.start(frame) for r in reducers]
    adds = [add for add, _ in started if add is not None]
    if units == 0 or q_len == 0 or kv_len == 0:
        return [finish() for _, finish in started]

    q_all = torch.empty(q.shape, dtype=work, device=q.device).copy_(q).mul_(scale).view(units, q_len, dim)
    k_all = torch.empty(k.shape, dtype=work, device=q.device).copy_(k).view(batch * kv_heads, kv_len, dim)
    shift = None
    if softcap is None:
        # Keys less their mean: the same weights (a constant a row), smaller scores, less rounding.
        mean = k_all.mean(1, keepdim=True)
        k_all -= mean
        shift = (q_all.view(-1, group * q_len, dim) @ mean.transpose(1, 2)).view(units, q_len)
    row_stats = _Rows(frame, scope, shift, sink)

    spans = scope.spans(tiles)
    want_entropy = any(r.needs_entropy for r in reducers)
    want_room = any(r.needs_diagonals for r in reducers)
    most_rows = max(i1 - i0 for i0, i1 in tiles)
    # Several units a tile when rows are short: as many as fit, whole groups (or samples) at a time.
    step = heads if together else group
    many = min(max(budget // (most_rows * kv_len) // step * step, heads if together else 1), units)
    most = many * most_rows * (kv_len + (most_rows if want_room else 0))
    score_buffer = torch.empty(most, dtype=work, device=q.device)
    weight_buffer = torch.empty(most, dtype=work, device=q.device)

    # Keys of a head stay in the cache through its tiles; what depends on positions alone is made once a tile.
    starts, numbers = range(0, units, many), range(len(tiles))
    by_tile = scope.pattern is not None or any(r.by_tile for r in reducers)
    order = product(numbers, starts) if by_tile else ((n, u0) for u0, n in product(starts, numbers))
    for n, u0 in order:
        u1, (i0, i1) = min(u0 + many, units), tiles[n]
        count, kv = u1 - u0, slice(u0 // group, (u1 - 1) // group + 1)
        samples = spans[n]
        span = samples[0]
        if len(samples) > 1:
            span = reduce(Span.cover, samples[u0 // heads : (u1 - 1) // heads + 1])
        if span.lo >= span.hi:
            continue  # no key for any row: the results start out as "empty"
        rows, width = i1 - i0, span.hi - span.lo
        # A causal tile has zeros past each row's end already; others get room for reading along diagonals.
        natural = scope.causal and span.hi == i1 + scope.start and width >= rows
        room = 0 if natural or not want_room else rows
        shape = (count, rows, width + room)
        storage = score_buffer[: math.prod(shape)].view(shape)
        weights = weight_buffer[: math.prod(shape)].view(shape)
        scores = storage[..., :width] if room else storage
        if count == 1:
            torch.mm(q_all[u0, i0:i1], k_all[kv.start, span.lo : span.hi].t(), out=scores[0])
        else:
            queries = q_all[u0:u1, i0:i1].reshape(count // group, group * rows, dim)
            keys = k_all[kv, span.lo : span.hi].transpose(1, 2)
            torch.bmm(queries, keys, out=scores.view(count // group, group * rows, width))
        if room:
            storage[..., width:] = NOTHING
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        scope.forbid(scores, (u0, u1), (i0, i1), span)
        torch.softmax(storage, -1, out=weights)
        at = (slice(u0, u1), slice(i0, i1))
        row_stats.take(storage, weights, width, at, want_entropy)
        if adds:
            kept = weights[..., :width] if room else weights
            piece = Tile(n, u0, count, *at, span.lo, span.hi, kept, weights, natural)
            for add in adds:
                add(piece)
    row_stats.finish()
    return [finish() for _, finish in started]
