"""Attention over each listed block of a route by itself: outputs and lses a slot, to be merged or gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.attend import attend
from regard.patterns.decided import Routed

__all__ = ["attend_slots", "slot"]

TILE = 1 << 22  # numbers of gathered keys at a time


def slot(routed: Routed, n: int) -> Routed:
    """The same decision with the n-th block or span of each row alone, without ``keep``; ``within`` holds.

    Raises:
        ValueError: a route that lists neither blocks nor spans, or has fewer than n + 1.
    """
    if not 0 <= n < _width(routed):
        raise ValueError(f"n must be in 0..{_width(routed) - 1}, the slots of the route, got {n}")
    score = None if routed.score is None else routed.score[..., n : n + 1]
    alone: dict[str, Any] = {"score": score, "keep": None, "cost": 0}
    if routed.index is not None:
        assert routed.count is not None
        count = (routed.count > n).to(routed.count.dtype)
        return replace(routed, index=routed.index[..., n : n + 1], count=count, **alone)
    assert routed.start is not None
    assert routed.stop is not None
    return replace(routed, start=routed.start[..., n : n + 1], stop=routed.stop[..., n : n + 1], **alone)


def attend_slots(
    q: Float[Tensor, "batch heads q_len head_dim"] | Sequence[Float[Tensor, "batch heads q_len head_dim"]],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    routed: Routed,
    *,
    scale: float | int | None = None,
    backend: str = "auto",
) -> tuple[list[Float[Tensor, "batch heads q_len v_dim"]], list[Float[Tensor, "batch heads q_len"]]]:
    """``(outs, lses)``: for every slot n, attention of each query over its n-th listed block alone.

    `regard.kernels.combine` puts them together: `merge` gives attention over all of them where they do not overlap,
    `gate` weighs them otherwise. A query with fewer blocks has zeros and lse = -inf in the slots it lacks. Where each
    query has a decision of its own the listed keys are gathered, some queries at a time and once more in the backward
    pass; where queries share decisions each slot is a call of `attend`.

    Args:
        q: queries, or as many as there are slots where a query stands elsewhere for each (renumbered positions).
        k, v, scale: as in `attend`.
        routed: of blocks or spans; its ``keep`` is left out.
        backend: of `attend`, where queries share decisions.

    Raises:
        ValueError: as `slot`; as many q as there are not slots; a route for other lengths, heads or samples.
    """
    width = _width(routed)
    if not isinstance(q, Tensor) and len(q) != width:
        raise ValueError(f"q must be one tensor, or one for each of the {width} slots, got {len(q)}")
    each = [q] * width if isinstance(q, Tensor) else list(q)
    if not width:
        return [], []
    if routed.block[0] == 1:
        return _gathered(each, k, v, routed, each[0].shape[3] ** -0.5 if scale is None else float(scale))
    found = [
        attend(x, k, v, slot(routed, n), q_start=routed.q_start, scale=scale, return_lse=True, backend=backend)
        for n, x in enumerate(each)
    ]
    return [out for out, _ in found], [lse for _, lse in found]


def _width(routed: Routed) -> int:
    table = routed.index if routed.index is not None else routed.start
    if table is None or routed.ordered:
        raise ValueError("slots are of blocks or spans of tokens in order; this route chooses patterns or groups")
    return table.shape[3]


def _gathered(q: list[Tensor], k: Tensor, v: Tensor, routed: Routed, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """Every query with the keys of its slots, gathered."""
    (batch, heads, q_len, dim), kv_len = q[0].shape, k.shape[2]
    routed.fits(q_len, kv_len, routed.q_start)
    for name, told, here in (("heads", routed.heads, heads), ("samples", routed.samples, batch)):
        if told is not None and told != here:
            raise ValueError(f"routed is of {told} {name}, got q with {here}")
    start, stop = _ends(routed)
    share = heads // start.shape[1]
    start, stop = (x.long().repeat_interleave(share, 1).expand(batch, heads, *x.shape[2:]) for x in (start, stop))
    most = max(1, int((stop - start).max()))
    each = max(1, TILE // max(1, batch * heads * len(q) * most * max(dim, v.shape[3])))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*q, k, v))
    outs, lses = [], []
    for a in range(0, q_len, each):
        rows = slice(a, min(a + each, q_len))
        some = torch.stack([x[:, :, rows] for x in q], 3)
        keys = start[:, :, rows, :, None] + torch.arange(most, device=k.device)
        there = keys < stop[:, :, rows, :, None]
        keys = torch.where(there, keys, 0)
        if routed.within is not None:
            at = torch.arange(rows.start, rows.stop, device=k.device)[:, None, None] + routed.q_start
            head = torch.arange(heads, device=k.device)[:, None, None, None]
            sample = torch.arange(batch, device=k.device)[:, None, None, None, None]
            there = there & routed.within.allows(at, keys, head, sample)
        given = (some, k, v, keys, there, scale)
        out, lse = checkpoint(_tile, *given, use_reentrant=False) if grad else _tile(*given)
        outs.append(out)
        lses.append(lse)
    return list(torch.cat(outs, 2).unbind(3)), list(torch.cat(lses, 2).unbind(3))


def _ends(routed: Routed) -> tuple[Tensor, Tensor]:
    """Start and stop of the keys of each slot ``[samples, decisions, rows, width]``; both 0 where there is none."""
    if routed.index is None:
        assert routed.start is not None
        assert routed.stop is not None
        return routed.start, routed.stop
    size, some = routed.block[1], routed.index >= 0
    start = torch.where(some, routed.index * size, 0)
    return start, torch.where(some, (start + size).clamp(max=routed.kv_len), 0)


def _tile(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, there: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q ``[batch, heads, rows, slots, dim]``, keys and which are there ``[batch, heads, rows, slots, most]``."""
    batch, heads = q.shape[:2]
    work = torch.promote_types(q.dtype, torch.float32)
    lists = torch.arange(batch * heads, device=k.device) // (heads // k.shape[1])  # of (sample, kv head)
    at = keys + lists.view(batch, heads, 1, 1, 1) * k.shape[2]
    score = (k.flatten(0, 2)[at].to(work) @ q.to(work)[..., None])[..., 0] * scale
    score = score.masked_fill(~there, -torch.inf)
    some = there.any(-1)
    finite = torch.where(some[..., None], score, 0)
    lse = torch.where(some, finite.logsumexp(-1), -torch.inf)
    weights = finite.softmax(-1) * some[..., None]
    out = (weights[..., None, :] @ v.flatten(0, 2)[at].to(work))[..., 0, :]
    return out.to(q.dtype), lse
