"""Dual triangle attention: half of each head's dimensions look back, half look forward."""

from __future__ import annotations

from typing import Any

from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.patterns import Causal, per_head

__all__ = ["DualTriangleAttention"]


class DualTriangleAttention(MultiHead):
    """Bidirectional attention that knows order without positions (arXiv 2604.18603).

    The d dimensions of a head are split in two halves with a softmax each: half 0 of head h sees keys ``k <= q``, half
    1 keys ``k >= q`` (the query's own key is in both, so no row is empty), ``scale = 1 / sqrt(d / 2)``. The halves are
    put together again and projected. In one call: ``2 heads`` sub-heads of ``d / 2`` in the order
    ``(h, half) -> 2 h + half``, which is how the projection's features lie, so it has the parameters of ordinary
    attention and weights move between the two. Padding: ``pattern=Columns(...)`` of the valid keys.

    Args:
        dim: of x and y.
        heads: heads of ``dim / heads`` dimensions, an even number.
        rope: rotary positions of each half by itself, ``Rope(dim / heads / 2)`` (rotating before the split would
            leave one half the high frequencies alone); None: no positions.
        bias: whether the projections have one.

    Raises:
        ValueError: ``dim / heads`` is not whole and even, or rope is for another size than half of it.
    """

    def __init__(self, dim: int, heads: int, rope: Rope | None = None, bias: bool = False) -> None:
        if heads < 1 or dim % (2 * heads):
            raise ValueError(f"dim must be a multiple of 2 heads = {2 * heads}, so that heads split in two, got {dim}")
        half = dim // (2 * heads)
        if rope is not None and rope.head_dim != half:
            raise ValueError(f"rope must be for half heads, Rope({half}), got Rope({rope.head_dim})")
        both = per_head([Causal(), Causal(future=True)] * heads)
        super().__init__(dim, 2 * heads, position=rope, pattern=both, bias=bias)

    def new_state(self) -> Any:
        """Refused: half of every head looks forward.

        Raises:
            ValueError: always.
        """
        raise ValueError("state must be None: half of every head of DualTriangleAttention sees keys that come later")
