"""How much of the attention a pattern keeps, and what it is to be compared with: three choices of equal width.

A route that only beats random blocks may still lose to the nearest ones; the oracle says how much there was to be had.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.attend import attend
from regard.kernels.blocked_routed import into_slots
from regard.kernels.routed_kinds import ABSENT, Kinds, Places
from regard.patterns.candidates import candidates
from regard.patterns.decided import Routed, both
from regard.patterns.pattern import Pattern
from regard.patterns.select import best, to_index

__all__ = ["kept_mass", "local_blocks", "oracle_blocks", "random_blocks"]

SCORES = 1 << 24  # weights that the oracle looks at once


def kept_mass(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    pattern: Pattern,
    *,
    within: Pattern | None = None,
    q_start: int | None = None,
    scale: float | int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len"]:
    """The mass that a pattern keeps of each query's attention within another: ``exp(lse_pattern - lse_within)``.

    Exact, in [0, 1], from two fused calls. What the pattern allows outside of ``within`` counts for nothing. A query
    that ``within`` gives no key has nothing to lose: 1.

    Args:
        pattern: static or a `Routed`.
        within: what it is a part of, as ``Causal()``; None: all pairs, or what a `Routed` was decided within.
        q_start, scale, backend: as in `attend`.
    """
    if isinstance(pattern, Routed):
        within = pattern.within if within is None else within
        if pattern.within != within:
            pattern = replace(pattern, within=both(pattern.within, within))
    elif within is not None:
        pattern = pattern & within
    lse = [
        attend(q, k, k, each, q_start=q_start, scale=scale, return_lse=True, backend=backend)[1]
        for each in (pattern, within)
    ]
    some = lse[1].detach() > -torch.inf
    return torch.where(some, lse[0] - torch.where(some, lse[1], 0), 0).exp().clamp(max=1)


def random_blocks(like: Routed, generator: torch.Generator) -> Routed:
    """As many blocks in each row as `like` lists, drawn from those it could have listed.

    Under the same ``within``, beside the same ``keep``: blocks that ``keep`` does not cover are drawn first, the others
    only where there are not enough. A row with fewer candidates than `like` lists has them all. The two other controls
    choose from the same.
    """
    may, free = _choice(like)
    order = torch.rand(may.shape, generator=generator, device=generator.device).to(may.device)
    return _chosen(like, may, free, order)


def local_blocks(like: Routed) -> Routed:
    """As many blocks in each row as `like` lists, the nearest: by the distance of the centres, in slots where ordered.

    Of two at the same distance the lower index. See `random_blocks`.
    """
    may, free = _choice(like)
    at = 0 if like.ordered else like.q_start
    rows, columns = (
        (torch.arange(n, device=may.device, dtype=torch.float64) + 0.5) * size
        for n, size in zip(may.shape[2:], like.block, strict=True)
    )
    near = -(at + rows[:, None] - columns).abs()
    return _chosen(like, may, free, near.expand(may.shape))


def oracle_blocks(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    like: Routed,
    *,
    scale: float | int | None = None,
) -> Routed:
    """As many blocks in each row as `like` lists, those of the largest true mass: what no route of its form exceeds.

    The mass of the pairs within ``within``, summed over the queries of the row and the heads and samples that share the
    decision; what ``keep`` holds anyway is left out. All pairs are computed, some rows at a time. See `random_blocks`.
    """
    may, free = _choice(like)
    with torch.no_grad():
        mass = _block_mass(q, k, like, 1 / math.sqrt(q.shape[3]) if scale is None else float(scale))
    return _chosen(like, may, free, mass)


def _chosen(like: Routed, may: Tensor, free: Tensor, order: Tensor) -> Routed:
    """The highest by `order`, what is free before the rest; no cost and no score."""
    assert like.count is not None
    place = order.sort(stable=True, dim=-1, descending=True).indices
    values = torch.arange(order.shape[-1], 0, -1, device=order.device, dtype=torch.float64)
    rank = torch.empty_like(order, dtype=torch.float64).scatter_(-1, place, values.expand(order.shape))
    score = torch.where(free, rank + order.shape[-1], rank).masked_fill(~may, -torch.inf)
    index, count = to_index(best(score, like.count[..., None].long()))
    return replace(like, index=index, count=count, score=None, cost=0)


def _choice(like: Routed) -> tuple[Bool[Tensor, "batch decisions rows columns"], Tensor]:
    """Blocks with an allowed pair, and those with one that ``keep`` does not hold."""
    if like.index is None or like.repeats != "error":
        raise ValueError(f"like must list blocks or tokens, got {like!r}; spans and groups have no such control")
    may = _candidates(like, like.within)
    return may, may if like.keep is None else _candidates(like, both(like.within, ~like.keep))


def _candidates(like: Routed, pattern: Pattern | None) -> Tensor:
    lead = (like.batch, like.decisions)
    if not like.ordered:
        found = candidates(
            pattern, like.q_len, like.kv_len, like.block, q_start=like.q_start, decisions=like.decisions,
            device=like.device,
        )  # fmt: skip
        found = found if found.shape[0] in lead[:1] else found.any(0, keepdim=True)
        return found.expand(*lead, -1, -1)
    if pattern is not None and (pattern.heads or pattern.samples):
        raise ValueError("controls of an ordered route take within and keep alike for all heads and samples")
    q = Places.of(like.q_order, like.q_len, like.block[0], like.q_start)
    k = Places.of(like.kv_order, like.kv_len, like.block[1])
    rows, cols = torch.meshgrid(torch.arange(like.n_rows), torch.arange(like.n_columns), indexing="ij")
    of_rows, of_cols = (
        torch.zeros(lead, dtype=torch.long)
        if x is None
        else torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]).expand(lead)
        for x in (like.q_order, like.kv_order)
    )
    i = of_rows[..., None, None] * like.n_rows + rows
    j = of_cols[..., None, None] * like.n_columns + cols
    kinds = Kinds(q, k, None, like.kv_len)
    found = torch.from_numpy(kinds.of(pattern, i.reshape(-1).numpy(), j.reshape(-1).numpy()) != ABSENT)
    return found.view(i.shape).to(like.device)


def _block_mass(q: Tensor, k: Tensor, like: Routed, scale: float) -> Tensor:
    """``[batch|1, decisions, rows, columns]``: mass of each block that ``keep`` does not hold."""
    batch, heads = q.shape[:2]
    lse = attend(q, k, k, like.within, q_start=like.q_start, scale=scale, return_lse=True)[1]
    work = lse.dtype
    q, k = q.to(work), k.to(work).repeat_interleave(heads // k.shape[1], 1)
    q_at, q_there = _tokens(like.q_order, like.q_len, like.block[0], heads, q.device)
    k_at, k_there = _tokens(like.kv_order, like.kv_len, like.block[1], heads, q.device)
    q, k = into_slots(q, q_at, heads), into_slots(k, k_at, heads)
    lse = into_slots(lse[..., None], q_at, heads)
    head = torch.arange(heads, device=q.device)[:, None, None]
    sample = torch.arange(batch, device=q.device)[:, None, None, None]
    found = q.new_zeros(batch, heads, like.n_rows, like.n_columns)
    step = max(1, SCORES // max(1, batch * heads * k.shape[2] * like.block[0]))
    for row in range(0, like.n_rows, step):
        at = slice(row * like.block[0], (row + step) * like.block[0])
        i, j = q_at[:, :, at, None] + like.q_start, k_at[:, :, None]
        there = q_there[:, :, at, None] & k_there[:, :, None]
        for part, keep in ((like.within, True), (like.keep, False)):
            if part is not None:
                there = there & (part.allows(i, j, head, sample) == keep)
        scores = (q[:, :, at] @ k.mT) * scale - lse[:, :, at]
        weights = torch.where(there, scores, -torch.inf).exp()
        found[:, :, row : row + step] = (
            weights.unflatten(3, (-1, like.block[1])).sum(4).unflatten(2, (-1, like.block[0])).sum(3)
        )
    found = found.unflatten(1, (like.decisions, -1)).sum(2)
    return found if like.batch > 1 else found.sum(0, keepdim=True)


def _tokens(order: Tensor | None, length: int, block: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token in each slot of whole blocks ``[batch|1, heads, slots]``, 0 where there is none, and where there is."""
    places = Places.of(order, length, block)
    lead = (1, 1) if order is None else order.shape[:2]
    each = (x.view(*lead, -1).repeat_interleave(heads // lead[1], 1).to(device) for x in (places.tokens, places.there))
    at, there = each
    return at, there
