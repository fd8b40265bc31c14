"""Neighborhood attention: every token attends to the window of tokens nearest to it (arXiv 2204.07143, 2403.04690)."""

from __future__ import annotations

from collections.abc import Sequence

from regard.layers.grid import GridAttention
from regard.patterns import Neighborhood


class NeighborhoodAttention(GridAttention):
    """`GridAttention` under `Neighborhood`: in 1, 2 or 3 dimensions each token sees ``prod window`` tokens.

    At the borders the window is pushed inside, so a window as large as the map is dense attention.

    Args:
        dim: width.
        heads: must divide dim.
        shape: sides of the map.
        window: keys a side, the token's own included; one number or one a side.
        stride: tokens a side that share a window (arXiv 2504.16922).
        dilation: tokens between neighbors.
        causal: along which sides only earlier tokens are seen.
        bias: of the q, k, v projection.

    Raises:
        ValueError: a window times dilation larger than its side, a stride larger than the window.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        bias: bool = True,
    ):
        window, stride, dilation = (v if isinstance(v, int) else tuple(v) for v in (window, stride, dilation))
        along = causal if isinstance(causal, bool) else tuple(causal)
        grid = Neighborhood(tuple(shape), window=window, stride=stride, dilation=dilation, causal=along)
        super().__init__(dim, heads, grid, bias=bias)
