"""Routed patterns on the blocked backend: rows of queries with the keys that they were given, no layout of all heads.

Where a route has orders, tokens are put into slots before and out of them after; in between slots are all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import TypeGuard

import torch
from torch import Tensor

from regard.kernels.combine import merge
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
    batch, heads, _, width = out.shape
    lse = None if routed.repeats == "mean" else lse
    device = out.device
    parts, back = routed.once(("slots", batch, heads, device), lambda: _found_in(routed, batch, heads, device))
    flat, sums = out.reshape(-1, width), None if lse is None else lse.reshape(-1)
    found = [_joined(flat, sums, rows, routed.repeats == "mean") for rows in parts]
    if back is None:
        o, s = found[0]
    else:
        o = torch.cat([x for x, _ in found]).index_select(0, back)
        s = None if sums is None else torch.cat([x for _, x in found if x is not None]).index_select(0, back)
    shape = (batch, heads, routed.q_len)
    return o.view(*shape, width), None if s is None else s.view(shape)


def _found_in(routed: Routed, batch: int, heads: int, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """Rows ``[tokens, c]`` of the flat slots of the tokens that have c of them, for each c: so none is copied for
    nothing; and where each token's is among all, or None where all have as many and stand in order."""
    assert routed.q_order is not None
    at = listed.places(routed.q_order.to(device), routed.q_len)  # [b, r, q_len, most]
    rows = _rows(at, batch, heads, routed.q_order.shape[2]).view(-1, at.shape[-1])
    counts = (at >= 0).sum(-1).repeat_interleave(heads // at.shape[1], 1).expand(batch, -1, -1).flatten()
    order = counts.argsort(stable=True)
    parts = [
        rows.index_select(0, tokens)[:, :c]
        for c, tokens in enumerate(order.split(torch.bincount(counts).tolist()))
        if len(tokens)
    ]
    if len(parts) == 1:
        return parts, None
    return parts, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))


def _joined(out: Tensor, lse: Tensor | None, rows: Tensor, mean: bool) -> tuple[Tensor, Tensor | None]:
    """Of tokens that have the slots ``rows [tokens, c]``; -inf and 0 for those without."""
    n, c = rows.shape
    if c == 0:
        return out.new_zeros(n, out.shape[-1]), None if lse is None else lse.new_full((n,), -torch.inf)
    o = out.index_select(0, rows.flatten()).view(n, c, -1)
    s = None if lse is None else lse.index_select(0, rows.flatten()).view(n, c)
    if c == 1:
        return o[:, 0], None if s is None else s[:, 0]
    if s is None:
        return (o.mean(1) if mean else o.sum(1)), None
    return merge(o.unbind(1), s.unbind(1))
