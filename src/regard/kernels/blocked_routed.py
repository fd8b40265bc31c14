"""Routed patterns on the blocked backend: rows of queries with the keys that they were given, no layout of all heads.

Where a route has orders, tokens are put into slots before and out of them after; in between slots are all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import TypeGuard

import torch
from torch import Tensor

from regard.kernels.routed_tiles import Tiles, make_tiles
from regard.patterns import listed
from regard.patterns.decided import Routed

__all__ = ["in_slots", "into_slots", "out_of_slots", "serves", "slot_heads"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tiles], tuple[Tensor, Tensor | None]]


def serves(pattern: object) -> TypeGuard[Routed]:
    """Whether it lists keys; one that chooses among static patterns goes the way of those."""
    return isinstance(pattern, Routed) and pattern.which is None


def in_slots(routed: Routed, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
    """``(out, lse or None)`` of the tokens, `kernel` having them in slots."""
    batch, heads = q.shape[:2]
    if not routed.ordered:
        return kernel(q, k, v, make_tiles(routed, batch, heads, k.shape[1]))
    kv_heads = slot_heads(routed, heads, k.shape[1])
    tiles = make_tiles(routed, batch, heads, kv_heads)
    if routed.kv_order is not None:
        k, v = (into_slots(x, routed.kv_order, kv_heads) for x in (k, v))
    if routed.q_order is not None:
        q = into_slots(q, routed.q_order, heads)
    out, lse = kernel(q, k, v, tiles)
    return (out, lse) if routed.q_order is None else out_of_slots(out, lse, routed)


def slot_heads(routed: Routed, heads: int, kv_heads: int) -> int:
    """Heads that the keys have in slots: more than they have as tokens where orders differ within a group."""
    many = kv_heads if routed.kv_order is None else lcm(kv_heads, routed.kv_order.shape[1])
    return heads if heads % many else many


def _rows(order: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """Rows of the flat ``[batch * heads * length]`` of an order ``[batch|1, decisions|1, slots, ...]``, 0 for -1."""
    order = order.repeat_interleave(heads // order.shape[1], 1).expand(batch, *(-1,) * (order.ndim - 1))
    first = torch.arange(batch * heads, device=order.device) * length
    return first.view(batch, heads, *(1,) * (order.ndim - 2)) + order.clamp(min=0)


def into_slots(x: Tensor, order: Tensor, heads: int) -> Tensor:
    """``[batch, heads, slots, width]`` of ``[batch, fewer heads, length, width]``; padding repeats token 0."""
    batch, own, length, width = x.shape
    rows = _rows(order.to(x.device), batch, heads, 0)
    head = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) // (heads // own) * length
    return x.reshape(-1, width).index_select(0, (head + rows).flatten()).view(batch, heads, -1, width)


def out_of_slots(out: Tensor, lse: Tensor | None, routed: Routed) -> tuple[Tensor, Tensor | None]:
    """The tokens' outputs from their slots'; several slots of a token are merged or averaged as `repeats` says."""
    assert routed.q_order is not None
    batch, heads, slots, width = out.shape
    at = listed.places(routed.q_order.to(out.device), routed.q_len)  # [b, r, q_len, most]
    rows = _rows(at, batch, heads, slots)
    there = (at >= 0).repeat_interleave(heads // at.shape[1], 1).expand(batch, -1, -1, -1)
    found = out.reshape(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)
    if at.shape[-1] == 1 and bool((at >= 0).all()):  # a slot for each token: nothing to merge
        each = None if lse is None or routed.repeats == "mean" else lse.reshape(-1).index_select(0, rows.flatten())
        return found[..., 0, :], None if each is None else each.view(rows.shape[:-1])
    if routed.repeats == "mean":
        weight = there.to(torch.promote_types(found.dtype, torch.float32))
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        return (found * weight[..., None].to(found.dtype)).sum(-2), None
    if lse is None:
        return (found * there[..., None].to(found.dtype)).sum(-2), None
    each = lse.reshape(-1).index_select(0, rows.flatten()).view(rows.shape).masked_fill(~there, -torch.inf)
    some = (each.detach() != -torch.inf).any(-1)
    finite = torch.where(some[..., None], each, 0)
    total = torch.logsumexp(finite, -1)
    share = torch.where(some[..., None], (finite - total[..., None]).exp(), 0)
    merged = (found * share[..., None].to(found.dtype)).sum(-2)
    return merged.to(out.dtype), torch.where(some, total, -torch.inf)
