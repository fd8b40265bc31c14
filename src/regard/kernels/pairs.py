"""Weights of chosen pairs, of a band of offsets, and the mass a pattern keeps, each given the lse of the full rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.scope import NOTHING, Scope, Span, make_scope
from regard.kernels.tiles import check_qk
from regard.patterns.pattern import Pattern

__all__ = ["band_weights", "pair_weights", "pattern_mass"]

CHUNK = 1 << 22  # numbers held at once


def _prepare(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, **where: Any
) -> tuple[Tensor, Tensor, Tensor, Scope]:
    """Scaled q [units, q_len, d], k [kv units, kv_len, d], lse [units, q_len], and the scope."""
    batch, heads, kv_heads, q_len, kv_len, dim = check_qk(q, k)
    if tuple(lse.shape) != (batch, heads, q_len):
        raise ValueError(f"lse must be [batch, heads, q_len] = {[batch, heads, q_len]}, got {list(lse.shape)}")
    if bool(lse.isnan().any()):
        raise ValueError("lse holds NaN; rows without a key have lse = -inf")
    scope = make_scope((batch, heads, q_len, kv_len), q.device, **where)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = q.detach().to(work) * (1 / math.sqrt(dim) if scale is None else scale)
    keys = k.detach().to(work).reshape(batch * kv_heads, kv_len, dim)
    return scaled.reshape(-1, q_len, dim), keys, lse.detach().to(work).reshape(-1, q_len), scope


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(s - lse)``, 0 where the row has no key or the pair is not allowed."""
    out = (scores - lse[..., None].clamp(min=NOTHING / 4)).exp_()
    return out.masked_fill_((scores <= NOTHING / 2) | (lse == -torch.inf)[..., None], 0)


def pair_weights(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    q_idx: Int[Tensor, "pairs"],
    kv_idx: Int[Tensor, "pairs"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
) -> Float[Tensor, "batch heads pairs"]:
    """``P_ij = exp(scale q_i . k_j + b_ij - lse_i)`` for a list of pairs; q_idx counts the rows of q from 0.

    ``lse`` is that of the full rows (`Lse`, `row_expectation`), with the same keyword arguments. Pairs that are
    not allowed get 0. Cost O(pairs * heads * head_dim), in chunks. IndexError outside the ranges.
    """
    qs, ks, flat, scope = _prepare(
        q, k, lse, scale, mask=mask, is_causal=is_causal, pattern=pattern, q_start=q_start, valid=valid
    )
    units, q_len, dim = qs.shape
    kv_len, group = ks.shape[1], q.shape[1] // k.shape[1]
    if len(q_idx) != len(kv_idx):
        raise ValueError(f"q_idx and kv_idx must be equally long, got {len(q_idx)} and {len(kv_idx)}")
    for name, idx, limit in (("q_idx", q_idx, q_len), ("kv_idx", kv_idx, kv_len)):
        if idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= limit):
            raise IndexError(f"{name} must lie in [0, {limit}), got {int(idx.min())} to {int(idx.max())}")
    out = qs.new_zeros(units, len(q_idx))
    step = max(1, CHUNK // max(1, units * dim))
    for a in range(0, len(q_idx) if units else 0, step):
        i, j = q_idx[a : a + step].to(q.device), kv_idx[a : a + step].to(q.device)
        rows = qs[:, i].unflatten(0, (-1, group))  # [kv units, group, pairs, d]
        scores = torch.einsum("ngpd,npd->ngp", rows, ks[:, j]).flatten(0, 1)
        scope.forbid_pairs(scores, i, j)
        out[:, a : a + step] = _weights(scores[..., None], flat[:, i])[..., 0]
    return out.view(q.shape[0], q.shape[1], -1)


def band_weights(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    lo: int,
    hi: int,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
    tile: int = 256,
) -> Iterator[tuple[slice, Float[Tensor, "batch heads rows offsets"]]]:
    """``P[i, i - o]`` for lo <= o < hi, normalised by the full lse, a tile of rows at a time.

    Yields ``(rows, weights)``, weights [batch, heads, rows, hi - lo], offset lo first; 0 where i - o is no key or not
    allowed. Offsets are on the key axis, negative ones are later keys. Cost O(L (tile + hi - lo) head_dim),
    memory O(heads * tile * (tile + hi - lo)).
    """
    if lo >= hi:
        raise ValueError(f"lo must be < hi, got lo={lo}, hi={hi}")
    if tile < 1:
        raise ValueError(f"tile must be >= 1 rows, got {tile}")
    qs, ks, flat, scope = _prepare(
        q, k, lse, scale, mask=mask, is_causal=is_causal, pattern=pattern, q_start=q_start, valid=valid
    )
    return _band(qs, ks, flat, scope, lo, hi, tile, q.shape[1] // k.shape[1])


def _band(
    qs: Tensor, ks: Tensor, lse: Tensor, scope: Scope, lo: int, hi: int, tile: int, group: int
) -> Iterator[tuple[slice, Tensor]]:
    units, q_len, dim = qs.shape
    for i0 in range(0, q_len, tile):
        i1 = min(i0 + tile, q_len)
        count, first = i1 - i0, i0 + scope.start - hi + 1  # key of column 0
        width = count + hi - lo - 1
        a, b = max(first, 0), min(first + width, scope.kv_len)
        scores = qs.new_full((units, count, width), NOTHING)
        if a < b:
            part = scores[:, :, a - first : b - first]
            rows = qs[:, i0:i1].reshape(-1, group * count, dim)
            part.copy_((rows @ ks[:, a:b].transpose(1, 2)).view(units, count, b - a))
            scope.forbid(part, (0, units), (i0, i1), Span(a, b, 0, 0))
        # Row r and column c of the sheared view hold the key first + r + c, that is the offset hi - 1 - c.
        band = torch.as_strided(scores, (units, count, hi - lo), (count * width, width + 1, 1))
        weights = _weights(band, lse[:, i0:i1]).flip(-1)
        if scope.invalid is not None:
            weights.unflatten(0, (-1, scope.heads)).masked_fill_(scope.invalid[:, None, i0:i1, None], 0)
        yield slice(i0, i1), weights.view(-1, scope.heads, count, hi - lo)


def pattern_mass(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    lse: Float[Tensor, "batch heads q_len"],
    pattern: Pattern,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_start: int | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
    tile: int = 128,
) -> Float[Tensor, "batch heads q_len"]:
    """``exp(lse_pattern,i - lse_i)``: the mass that query i gives to the keys the pattern keeps.

    ``lse`` is that of the full rows, with the same keyword arguments. Where the pattern knows its rows in closed
    form, only keys that it may allow to some row of a tile are touched: O(q_len * (keys kept + tile) * head_dim).
    """
    qs, ks, flat, scope = _prepare(
        q, k, lse, scale, mask=mask, is_causal=is_causal, pattern=pattern, q_start=q_start, valid=valid
    )
    group = q.shape[1] // k.shape[1]
    units, q_len, dim = qs.shape
    out = torch.zeros_like(flat)
    if out.numel() == 0:
        return out.view(q.shape[:3])
    tiles = [(i0, min(i0 + tile, q_len)) for i0 in range(0, q_len, tile)]
    found = scope.key_intervals(tiles)
    for n, (i0, i1) in enumerate(tiles):
        pieces = [[0, scope.kv_len]] if found is None else found[n][0].tolist()
        if is_causal:
            pieces = [[a, min(b, i1 + scope.start)] for a, b in pieces]
        keys = torch.cat([torch.arange(a, max(a, b)) for a, b in pieces] or [torch.arange(0)]).to(q.device)
        if not len(keys):
            continue
        rows = qs[:, i0:i1].reshape(-1, group * (i1 - i0), dim)
        scores = (rows @ ks[:, keys].transpose(1, 2)).view(units, i1 - i0, -1)
        scope.forbid_at(scores, (0, units), (i0, i1), keys)
        kept = torch.logsumexp(scores, -1)
        full = flat[:, i0:i1]
        there = (kept > NOTHING / 2) & (full != -torch.inf)
        out[:, i0:i1] = torch.where(there, (kept - torch.where(there, full, 0)).exp(), 0)
    mass = out.view(q.shape[:3])
    return mass if scope.invalid is None else mass.masked_fill_(scope.invalid[:, None], 0)
