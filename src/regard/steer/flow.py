"""Attribution from attention itself, without the matrices: O(length) memory under a fused kernel.

One row of a product of matrices of weights is a row vector times matrices, and a row vector times P is the mass that
keys receive under row weights: the tile pass gives it. The gradient of a metric by a row of weights is
`dm/dP_ij = g_i . v_j` with `g_i = dm/dz_i`: one more row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.fused import column_mass
from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.call import Call
from regard.watch.effects import Metric
from regard.watch.probe import run
from regard.watch.seam import Seam
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["attention_mean", "attention_norms", "attention_x_grad", "head_importance", "rollout"]


@dataclass
class _Kept:
    """What is needed of a call after the forward: its tensors, not its weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    where: dict[str, Any]
    valid: Tensor

    def received(self, row_weights: Float[Tensor, "batch q_len"]) -> Float[Tensor, "batch heads kv_len"]:
        """`sum_i w_i P_ij` for every key."""
        return column_mass(self.q, self.k, row_weights[..., None], **self.where)[:, :, 0]

    def row(self, at: int) -> Float[Tensor, "batch heads kv_len"]:
        """The weights of one query."""
        where = dict(self.where, q_start=self.where["q_start"] + at)
        mask = where["mask"]
        if mask is not None and mask.shape[2] > 1:
            where["mask"] = mask[:, :, at : at + 1]
        one = torch.ones(1, 1, 1, device=self.q.device)
        return column_mass(self.q[:, :, at : at + 1], self.k, one, **where)[:, :, 0]


def rollout(
    model: nn.Module, inputs: Any, pos: int = -1, *, residual: float = 0.5, anatomy: Anatomy | None = None
) -> Float[Tensor, "batch length"]:
    """Attention rollout of one row (Abnar & Zuidema, arXiv 2005.00928): its share of every input token.

    `r <- residual * r + (1 - residual) * r Pbar` from the last layer down, r the one-hot row of `pos` and Pbar the mean
    over heads; the row `pos` of the product of `residual * I + (1 - residual) * Pbar` over layers.

    Args:
        pos: the column whose row is taken, negative from the end.
        residual: share that the residual stream carries past attention.

    Returns:
        Non-negative, adding up to 1 where every row has a key.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual}")
    calls = _calls(model, inputs, anatomy)
    batch, _, length, _ = calls[-1].q.shape
    if not -length <= pos < length:
        raise IndexError(f"pos={pos}: the sequence has {length} columns")
    r = torch.zeros(batch, length, device=calls[-1].q.device)
    r[:, pos] = 1
    for call in reversed(calls):
        r = residual * r + (1 - residual) * call.received(r).mean(1).to(r)
    return r


def attention_mean(model: nn.Module, inputs: Any, *, anatomy: Anatomy | None = None) -> Float[Tensor, "batch length"]:
    """The mean weight a token receives: over layers, heads and rows (padding rows left out)."""
    calls = _calls(model, inputs, anatomy)
    each = []
    for call in calls:
        rows = call.valid.to(torch.float32)
        each.append(call.received(rows / rows.sum(1, keepdim=True).clamp_min(1)).mean(1))
    return torch.stack(each).mean(0)


def attention_norms(model: nn.Module, inputs: Any, *, anatomy: Anatomy | None = None) -> Float[Tensor, "batch length"]:
    """The mean of `||P_ij v_j||` over layers, heads and rows (padding rows left out).

    Weights are not negative, so this is the mean weight a key receives in each head times the norm of its value: no
    matrix. Kobayashi et al. (arXiv 2004.10102) also multiply v by the head's output matrix; v alone is what this takes.
    """
    calls = _calls(model, inputs, anatomy)
    each = []
    for call in calls:
        rows = call.valid.to(torch.float32)
        received = call.received(rows / rows.sum(1, keepdim=True).clamp_min(1))
        norm = call.v.to(received).norm(dim=-1).repeat_interleave(received.shape[1] // call.v.shape[1], dim=1)
        each.append((received * norm).mean(1))
    return torch.stack(each).mean(0)


def attention_x_grad(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    rows: Sequence[int] | int = -1,
    *,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "layers batch heads rows length"]:
    """`|P_ij dm/dP_ij|` for the rows asked for, `dm/dP_ij = g_i . v_j`, g the gradient by z: exact, O(length) a row.

    Args:
        rows: columns of queries, negative from the end.

    Raises:
        ValueError: layers with different numbers of heads.
    """
    wanted = [rows] if isinstance(rows, int) else list(rows)
    kept: dict[str, _Kept] = {}
    parts = anatomy_for(model, inputs, anatomy)
    names = [name for name in parts.attn if name is not None]
    sites = [Site(name, "z") for name in names]

    with Seam(model, _keep(kept)):
        found = trace(model, inputs, sites, grad=True, metric=metric, anatomy=parts)
    layers = []
    for name, site in zip(names, sites, strict=True):
        call, gradient = kept[name], found[site][1]
        v = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)
        length = call.q.shape[2]
        each = []
        for row in wanted:
            if not -length <= row < length:
                raise IndexError(f"rows: {row} is not a column of {length}")
            at = row % length
            slope = torch.einsum("bhd,bhjd->bhj", gradient[:, :, at].to(v), v)
            each.append((call.row(at) * slope).abs())
        layers.append(torch.stack(each, dim=2))
    return _by_layer(layers)


def head_importance(
    model: nn.Module, inputs: Any, metric: Metric, *, anatomy: Anatomy | None = None
) -> Float[Tensor, "layers batch heads"]:
    """`|sum_i z_i . dm/dz_i|`, the slope of the metric in a gate on the head at 1 (Michel et al., arXiv 1905.10650).

    Raises:
        ValueError: layers with different numbers of heads.
    """
    parts = anatomy_for(model, inputs, anatomy)
    sites = [Site(name, "z") for name in parts.attn if name is not None]
    found = trace(model, inputs, sites, grad=True, metric=metric, anatomy=parts)
    layers = [(z * g).sum((-2, -1)).abs() for z, g in found.values()]
    return _by_layer(layers)


def _by_layer(layers: list[Tensor]) -> Tensor:
    """Scores of each layer, [batch, heads, ...], in one tensor."""
    if len({x.shape[1] for x in layers}) > 1:
        raise ValueError("the layers have different numbers of heads, so their scores do not fit one tensor")
    return torch.stack(layers)


def _keep(kept: dict[str, _Kept]) -> Any:
    def handler(call: Call) -> None:
        where = {"mask": call.mask, "is_causal": call.is_causal, "scale": call.scale, "q_start": call.q_start}
        kept[call.layer] = _Kept(call.q.detach(), call.k.detach(), call.v.detach(), where, call.valid)

    return handler


def _calls(model: nn.Module, inputs: Any, anatomy: Anatomy | None) -> list[_Kept]:
    """The self-attention calls of the blocks, in their order."""
    parts = anatomy_for(model, inputs, anatomy)
    kept: dict[str, _Kept] = {}
    with torch.no_grad(), Seam(model, _keep(kept)):
        run(model, inputs)
    names = [name for name in parts.attn if name is not None]
    shapes = {kept[name].q.shape[2] for name in names} | {kept[name].k.shape[2] for name in names}
    if len(shapes) > 1:
        raise ValueError(
            f"the layers see sequences of different lengths {sorted(shapes)}, so rows of one are not keys of the next"
        )
    return [kept[name] for name in names]
