"""The dense backend: every pair, straight from the formula. Any dtype and device, differentiable any number of times.

Memory O(batch * heads * q_len * kv_len). It is what the other backends are held to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.kernels.request import Request
from regard.patterns.decided import Routed
from regard.patterns.routed_pairs import each_group

__all__ = ["describe", "refuses", "run"]


def refuses(request: Request) -> str | None:
    """Nothing is refused."""
    return None


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """``(out [batch, heads, q_len, v_dim], lse [batch, heads, q_len] or None)``; sums in `Request.work_dtype`."""
    r, work = request, request.work_dtype
    q = r.q.to(work).reshape(r.batch, r.kv_heads, -1, r.q_len, r.head_dim)
    k, v = r.k.to(work)[:, :, None], r.v.to(work)[:, :, None]
    scores = (q @ k.transpose(-1, -2) * r.scale).reshape(r.batch, r.heads, r.q_len, r.kv_len)
    if r.softcap is not None:
        scores = r.softcap * torch.tanh(scores / r.softcap)
    if r.bias is not None:
        scores = scores + r.bias.to(work)

    def over(allowed: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, lse = r.normalize.weights(scores, allowed.expand_as(scores))
        out = weights.reshape(r.batch, r.kv_heads, -1, r.q_len, r.kv_len) @ v
        return out.reshape(r.batch, r.heads, r.q_len, r.v_dim), lse

    if isinstance(r.pattern, Routed) and r.pattern.repeats == "mean":
        return _mean(r.pattern, over).to(r.q.dtype), None
    out, lse = over(r.allowed())
    return out.to(r.q.dtype), lse if r.need_lse else None


def _mean(routed: Routed, over: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Tensor:
    """The mean of what each query gets in each of its groups; zeros for a query in none."""
    parts = [(over(pairs)[0], there) for pairs, there in each_group(routed)]
    count = sum(there.to(out.dtype) for out, there in parts)
    total = sum(out * there[..., None].to(out.dtype) for out, there in parts)
    assert isinstance(count, Tensor)
    assert isinstance(total, Tensor)
    return total / count.clamp(min=1)[..., None]


def describe(request: Request) -> dict[str, Any]:
    """Every pair is computed; scores and weights are each written and read once."""
    r = request
    pairs = r.batch * r.heads * r.q_len * r.kv_len
    ends = r.batch * (r.heads * r.q_len + r.kv_heads * r.kv_len) * (r.head_dim + r.v_dim) * r.q.element_size()
    return {
        "kernel": "plain PyTorch",
        "order": "memory order",
        "block": [],
        "blocks": 0,
        "full": 0,
        "computed": pairs,
        "operations": 2 * (r.head_dim + r.v_dim) * pairs,
        "bytes": ends + 4 * pairs * r.work_dtype.itemsize,
    }
