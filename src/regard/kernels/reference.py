"""The dense backend: every pair, straight from the formula. Any dtype and device, differentiable any number of times.

Memory O(batch * heads * q_len * kv_len). It is what the other backends are held to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.kernels.request import Request

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
    weights, lse = r.normalize.weights(scores, r.allowed().expand_as(scores))
    out = weights.reshape(r.batch, r.kv_heads, -1, r.q_len, r.kv_len) @ v
    out = out.reshape(r.batch, r.heads, r.q_len, r.v_dim).to(r.q.dtype)
    return out, lse if r.need_lse else None


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
