"""Statistics through the fused attention kernel: O(L) memory, and no tile of weights in sight.

A statistic that is linear in the weights with a feature of the key alone is an attention output with that feature
for value. The kernel is PyTorch's CPU flash attention, which also returns the lse; on other devices the tile pass
gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.reducers import Columns, Entropy, Features, Lse
from regard.kernels.scope import NOTHING, Scope, make_scope
from regard.kernels.tiles import check_qk, tile_pass
from regard.patterns.pattern import Pattern

__all__ = ["column_mass", "row_entropy", "row_expectation"]

MASK_PAIRS = 1 << 22  # pairs in the largest additive mask made at once


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(scope: Scope, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows, keys and additive mask [b, h, rows, keys] of each call to the fused kernel; mask None: a plain call.

    Whatever is not plain goes in blocks of rows, so that its mask takes O(kv_len) memory.
    """
    special = [scope.allowed, scope.bias, scope.pattern, scope.invalid]
    if all(x is None for x in special) and (not scope.causal or scope.start == 0):
        yield slice(0, scope.q_len), slice(0, scope.kv_len), None
        return
    units = scope.batch * scope.heads
    step = max(1, MASK_PAIRS // max(1, units * scope.kv_len))
    tiles = [(i0, min(i0 + step, scope.q_len)) for i0 in range(0, scope.q_len, step)]
    for (i0, i1), samples in zip(tiles, scope.spans(tiles), strict=True):
        span = samples[0]
        for other in samples[1:]:
            span = span.cover(other)
        if span.lo < span.hi:
            mask = torch.zeros(units, i1 - i0, span.hi - span.lo, dtype=dtype, device=scope.device)
            scope.forbid(mask, (0, units), (i0, i1), span)
            yield slice(i0, i1), slice(span.lo, span.hi), mask.view(scope.batch, scope.heads, i1 - i0, -1)


def row_major(x: Tensor) -> Tensor:
    """With neighbours in memory along the last axis: the flash kernel reads on from there whatever the stride is."""
    return x if x.ndim < 4 or x.stride(-1) == 1 else x.contiguous()


def _flash(q: Tensor, k: Tensor, v: Tensor, scope: Scope, scale: float) -> tuple[Tensor, Tensor]:
    """(sum_j P_ij v_j, lse_i) by PyTorch's CPU flash kernel; v is as wide as the head. Rows without a key: 0, -inf."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    q, k, v = (row_major(x) for x in (q, k, v))
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for rows, keys, mask in _blocks(scope, q.dtype):
        causal = mask is None and scope.causal
        for g in range(kv_heads):
            hs = slice(g * group, (g + 1) * group)
            # The heads of a group read the same keys through a stride of 0: nothing is repeated in memory.
            kg, vg = (x[:, g : g + 1, keys].expand(-1, group, -1, -1) for x in (k, v))
            out[:, hs, rows], lse[:, hs, rows] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, hs, rows], kg, vg, 0.0, causal, attn_mask=None if mask is None else mask[:, hs], scale=scale
            )
    empty = lse <= NOTHING / 2
    if scope.invalid is not None:
        empty = empty | scope.invalid[:, None]
    return out.masked_fill_(empty[..., None], 0), lse.masked_fill_(empty, -torch.inf)


def row_expectation(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    features: Float[Tensor, "kv_len features"] | Float[Tensor, "#batch #kv_heads kv_len features"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
) -> tuple[Float[Tensor, "batch heads q_len features"], Float[Tensor, "batch heads q_len"]]:
    """``E_i = sum_j P_ij f_j`` for any features of the key alone, and ``lse_i``.

    Positions give mean distance, indicators group or block masses, random signs a sketch of the row. ``features`` is
    [kv_len, F], or [batch, kv_heads, kv_len, F] where they differ. Keyword arguments as in `tile_pass`.

    Cost: one fused attention call (float32, float64 for float64 input) for every head_dim columns: a value wider than
    the head would leave the fused kernel. Memory O(L); masks and patterns are turned into additive masks a block of
    rows at a time. Rows without a key: E = 0, lse = -inf. ValueError for NaN or infinite values in q, k or features.
    """
    batch, heads, kv_heads, q_len, kv_len, dim = check_qk(q, k)
    if features.shape[-2] != kv_len:
        raise ValueError(f"features must have kv_len = {kv_len} rows, got {list(features.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError("features holds NaN or infinite values")
    count = features.shape[-1]
    if q.device.type != "cpu" and features.ndim == 2:
        e, lse = tile_pass(
            q,
            k,
            [Features(features), Lse()],
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            scale=scale,
            q_start=q_start,
            valid=valid,
        )
        return e, lse
    if q.device.type != "cpu":
        raise ValueError(f"features must be [kv_len, features] on {q.device.type}, got {list(features.shape)}")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scope = make_scope(
            (batch, heads, q_len, kv_len),
            q.device,
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            q_start=q_start,
            valid=valid,
        )
        work = _work_dtype(q)
        q, k = q.to(work), k.to(work)
        f = features.to(work).expand(batch, kv_heads, kv_len, count)
        out = q.new_zeros(batch, heads, q_len, count)
        lse = q.new_full((batch, heads, q_len), -torch.inf)
        if not (out.numel() or lse.numel()) or kv_len == 0:
            return out, lse
        scale = 1 / math.sqrt(dim) if scale is None else scale
        for c in range(0, max(count, 1), dim):
            v = f[..., c : c + dim]
            e, lse = _flash(q, k, F.pad(v, (0, dim - v.shape[-1])), scope, scale)
            out[..., c : c + dim] = e[..., : v.shape[-1]]
        return out, lse


def row_entropy(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, "heads"] | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
) -> Float[Tensor, "batch heads q_len"]:
    """Entropy of each row in nats: ``H_i = lse'_i - scale q_i . (P (K - c))_i``, one fused call, O(L) memory.

    c is the mean key of the kv head and lse' the log-sum-exp over the centred keys: without centring the two terms
    are large and nearly equal wherever keys share a component, and the difference loses its digits. Additive
    biases, softcaps and sinks do not fit the formula; there, and off the CPU, the tile pass sums ``P * s`` itself.
    Rows without a key: 0. Keyword arguments as in `tile_pass`.
    """
    biased = mask is not None and mask.dtype != torch.bool
    if biased or softcap is not None or sink is not None or q.device.type != "cpu":
        (entropy,) = tile_pass(
            q,
            k,
            [Entropy()],
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            scale=scale,
            q_start=q_start,
            softcap=softcap,
            sink=sink,
            valid=valid,
        )
        return entropy
    batch, heads, _, q_len, kv_len, dim = check_qk(q, k)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scope = make_scope(
            (batch, heads, q_len, kv_len),
            q.device,
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            q_start=q_start,
            valid=valid,
        )
        work = _work_dtype(q)
        q, k = q.to(work), k.to(work)
        if q.numel() == 0 or k.numel() == 0:
            return q.new_zeros(batch, heads, q_len)
        scale = 1 / math.sqrt(dim) if scale is None else scale
        centred = k - k.mean(2, keepdim=True)
        expected, lse = _flash(q, centred, centred, scope, scale)
        entropy = lse - scale * (q * expected).sum(-1)
        return entropy.clamp_(min=0)  # -inf of rows without a key included


def column_mass(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    row_weights: Float[Tensor, "#batch q_len columns"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    pattern: Pattern | None = None,
    scale: float | None = None,
    q_start: int | None = None,
    valid: Bool[Tensor, "#batch q_len"] | None = None,
    backward: bool = False,
) -> Float[Tensor, "batch heads columns kv_len"]:
    """``sum_i w_ic P_ij`` for every key j: what each key receives from rows weighted by w.

    By default one tile pass. ``backward=True`` takes it from the backward pass for v of the fused kernel, in O(L)
    memory: the gradient of ``sum_i w_i . (P v)_i`` for v is ``P^T w``. Under grouped queries that gradient adds the
    heads of a group, so each head writes its own column of the value; a call carries ``head_dim // group`` of the
    row-weight columns. The kernel computes the gradients for q and k too: on a CPU the tile pass is the faster one.
    Keyword arguments as in `tile_pass`.
    """
    batch, heads, kv_heads, q_len, kv_len, dim = check_qk(q, k)
    if row_weights.shape[0] not in (1, batch) or row_weights.shape[1] != q_len:
        raise ValueError(
            f"row_weights must be [batch or 1, q_len, columns] with batch {batch} and q_len {q_len}, "
            f"got {list(row_weights.shape)}"
        )
    if not backward:
        (mass,) = tile_pass(
            q,
            k,
            [Columns(row_weights)],
            mask=mask,
            is_causal=is_causal,
            pattern=pattern,
            scale=scale,
            q_start=q_start,
            valid=valid,
        )
        return mass
    group = heads // kv_heads
    if group > dim:
        raise ValueError(f"backward=True needs head_dim >= heads / kv_heads, got {dim} and {group}; use backward=False")
    scope = make_scope(
        (batch, heads, q_len, kv_len),
        q.device,
        mask=mask,
        is_causal=is_causal,
        pattern=pattern,
        q_start=q_start,
        valid=valid,
    )
    work = _work_dtype(q)
    q, k, w = q.detach().to(work), k.detach().to(work), row_weights.detach().to(work).expand(batch, -1, -1)
    columns, per_call = w.shape[-1], dim // group
    mass = q.new_zeros(batch, heads, columns, kv_len)
    if q.numel() == 0 or kv_len == 0:
        return mass
    if scope.invalid is not None:
        w = w.masked_fill(scope.invalid[..., None], 0)
    with torch.autocast(q.device.type, enabled=False), torch.enable_grad():
        for rows, keys, bias in _blocks(scope, work):
            v = q.new_zeros(batch, kv_heads, keys.stop - keys.start, dim).requires_grad_()
            out = F.scaled_dot_product_attention(
                q[:, :, rows],
                k[:, :, keys],
                v,
                attn_mask=bias,
                is_causal=bias is None and scope.causal,
                scale=scale,
                enable_gqa=group > 1,
            )
            there = None if bias is None else (bias > NOTHING / 2).any(-1)  # rows without a key pass nothing on
            for c in range(0, columns, per_call):
                part = w[:, None, rows, c : c + per_call]
                if there is not None:
                    part = part * there[..., None]
                width = part.shape[-1]
                grad = q.new_zeros(batch, heads, part.shape[2], width, group)
                for h in range(heads):
                    grad[:, h, :, :, h % group] = part[:, h if part.shape[1] > 1 else 0]
                flat = F.pad(grad.flatten(-2), (0, dim - width * group))
                (dv,) = torch.autograd.grad(out, v, flat, retain_graph=c + per_call < columns)
                got = dv[..., : width * group].unflatten(-1, (width, group))  # [b, kv, keys, width, group]
                mass[:, :, c : c + width, keys] += got.permute(0, 1, 4, 3, 2).reshape(batch, heads, width, -1)
    return mass
