"""Linear attention over chosen key blocks: the states of blocks added up as a layout says (SLA, arXiv 2509.24006)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regard.patterns.layout import BlockLayout

__all__ = ["Feature", "block_linear", "channel_softmax"]

Feature = Callable[[Tensor], Tensor]


def channel_softmax(x: Float[Tensor, "... head_dim"]) -> Float[Tensor, "... head_dim"]:
    """``exp(x_c) / sum_c' exp(x_c')`` over the channels: the feature map of SLA."""
    return x.softmax(-1)


def block_linear(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    layout: BlockLayout,
    *,
    feature: Feature = channel_softmax,
    eps: float = 1e-5,
) -> Float[Tensor, "batch heads q_len v_dim"]:
    """Linear attention of each query block over the key blocks that a layout lists, all of their tokens.

    With phi the feature map, ``h_J = phi(K_J)^T V_J`` and ``z_J = sum_{j in J} phi(k_j)`` of every key block, and
    ``H_I``, ``Z_I`` their sums over the blocks J that the layout lists for query block I,

        out_i = phi(q_i) H_I / (phi(q_i) . Z_I + eps)        for i in I.

    The sums are one product of the layout's 0/1 matrix with the states, ``q_blocks * kv_blocks * head_dim * v_dim``
    multiply-adds a head; nothing is subtracted. A query block without a key block gives zeros. Differentiable in q, k
    and v. States are kept in float32 at least, under autocast too; the result has q's dtype.

    Args:
        q, k, v: query head h reads kv head ``h // (heads / kv_heads)``; v_dim may differ from head_dim.
        layout: of these lengths, for 1 or ``heads`` heads and 1 or ``batch`` samples. Its blocks must be full, but for
            a short last key block, which counts whatever it is called.
        feature: phi, on the last axis, of non-negative values.
        eps: added to the denominator, 1e-5 in the paper.

    Raises:
        ValueError: lengths, heads or samples that do not fit, partial blocks.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    _check(layout, q.shape[0], heads, q.shape[2], k.shape[2])
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} heads of q, got {kv_heads}")
    with torch.autocast(q.device.type, enabled=False):
        return _block_linear(q, k, v, layout, feature, eps)


def _block_linear(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, feature: Feature, eps: float) -> Tensor:
    heads, q_len, dim = q.shape[1:]
    kv_heads, kv_len = k.shape[1:3]
    (bq, bk), n_q, n_k = layout.block, layout.n_q_blocks, layout.n_kv_blocks
    group, work = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    # A value of 1 beside the others makes z; padding has neither.
    values = F.pad(F.pad(v.to(work), (0, 1), value=1.0), (0, 0, 0, n_k * bk - kv_len)).unflatten(2, (n_k, bk))
    keys = F.pad(feature(k.to(work)), (0, 0, 0, n_k * bk - kv_len)).unflatten(2, (n_k, bk))
    states = (keys.mT @ values).flatten(-2)[:, :, None]  # [batch, kv_heads, 1, n_k, dim * (v_dim + 1)]
    listed = layout.dense()[0].to(q.device, work)
    listed = listed[:, :, None] if layout.heads == 1 else listed.unflatten(1, (kv_heads, group))
    sums = (listed @ states).unflatten(-1, (dim, -1))
    queries = F.pad(feature(q.to(work)), (0, 0, 0, n_q * bq - q_len)).unflatten(2, (n_q, bq))
    found = queries.unflatten(1, (kv_heads, group)) @ sums
    out = found[..., :-1] / (found[..., -1:] + eps)
    return out.flatten(3, 4).flatten(1, 2)[:, :, :q_len].to(q.dtype)


def _check(layout: BlockLayout, batch: int, heads: int, q_len: int, kv_len: int) -> None:
    if (layout.q_len, layout.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"layout must be of q_len={q_len} and kv_len={kv_len}, got one of {layout.q_len} and {layout.kv_len}"
        )
    if layout.heads not in (1, heads) or layout.samples not in (1, batch):
        raise ValueError(
            f"layout must have 1 or {heads} heads and 1 or {batch} samples, "
            f"got heads={layout.heads}, samples={layout.samples}"
        )
    partial = ~layout.full
    if kv_len % layout.block[1]:
        partial = partial & (layout.indices != layout.n_kv_blocks - 1)
    if bool(partial.any()):
        raise ValueError(
            f"layout must have full blocks (a state knows no single pairs), got {int(partial.sum())} partial ones of "
            f"{layout.n_blocks}"
        )
