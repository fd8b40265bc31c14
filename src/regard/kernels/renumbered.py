"""Attention over chosen chunks that are put side by side: their positions are renumbered to follow on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels.combine import merge
from regard.kernels.slots import attend_slots
from regard.patterns.decided import Routed

__all__ = ["renumbered"]


def renumbered(
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    v: Float[Tensor, "batch kv_heads kv_len v_dim"],
    routed: Routed,
    turn: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float | int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch heads q_len v_dim"], Float[Tensor, "batch heads q_len"]]:
    """``(out, lse)`` where the n chunks that a query reads stand at 0, l, .., (n - 1) l, its own last (LongHeads).

    A key at t in the chunk of slot s is at position ``s l + t % l``, the query at ``(n - 1) l + t % l``: no position
    passes that of a text of n chunks. Exact and cheap: only differences of positions count, so keys are rotated once,
    inside their chunk, and for slot s the query is rotated to ``(n - 1 - s) l + t % l``; slots merge by their lse.

    Args:
        q, k: **before** rotation.
        v: values.
        routed: blocks ``(1, l)`` of each query, of which the last is its own; `regard.patterns.chunks.ChunkRoute`.
        turn: ``turn(x, positions)`` rotates, positions broadcasting to the rows of x.
        scale, backend: as in `attend`.

    Raises:
        ValueError: a route of other blocks.
    """
    if routed.index is None or routed.count is None or routed.block[0] != 1:
        raise ValueError(f"routed must list blocks (1, chunk) of each query, got a route with block {routed.block}")
    size = routed.block[1]
    at = torch.arange(routed.q_start, routed.q_start + q.shape[2], device=q.device)
    local = turn(k, torch.arange(k.shape[2], device=k.device) % size)
    slots = range(routed.index.shape[3])
    moved = [turn(q, (routed.count - 1 - s) * size + at % size) for s in slots]
    return merge(*attend_slots(moved, local, v, routed, scale=scale, backend=backend))
