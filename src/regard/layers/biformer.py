"""Bi-level routing attention: regions choose regions, tokens attend to the tokens of the chosen ones (BiFormer)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.layers.maps import to_map, to_sequence
from regard.layers.refuse import need_heads, need_length, refuse
from regard.patterns.block_topk import BlockTopK
from regard.patterns.order import TileOrder
from regard.patterns.routed import Routed
from regard.patterns.select import topk as highest

__all__ = ["BiLevelAttention", "Scale"]

Scale = Literal["head", "dim"]


class BiLevelAttention(nn.Module):
    """BiFormer's attention (arXiv 2303.08810): every region of the map picks its k best regions, for all heads at once.

    The map is cut into ``regions`` x ``regions`` tiles. With ``Q_r``, ``K_r`` the means of q and k over tile r, all
    heads concatenated and without gradient, region r picks the k regions of the highest ``Q_r . K_r'`` (its own is not
    forced, ties go to the lower one). A token of r attends to all tokens of those regions, and a depthwise convolution
    of v is added before the projection:

        y = W_o (concat_h softmax(s q_h K_h^T) V_h + DWConv_lce(v)).

    q and k learn through the attention alone. Sides that ``regions`` does not divide are padded right and below;
    padding enters no mean and is no key (in the released code it is one). For a map of n tokens the cost is
    ``O(n^(4/3))`` with ``regions`` of about ``n^(1/3)`` a side.

    Args:
        dim: width.
        heads: must divide dim.
        shape: (height, width) of the map.
        regions: a side, 7 in the paper; tiles are ``ceil(side / regions)`` tokens, so there may be fewer.
        topk: regions picked, 1, 4, 16 and all by stage in the paper; None: all, which is dense attention.
        lce: side of the depthwise convolution of v, odd (5 in the paper); None: no convolution.
        scale: of the scores: "head", ``(dim / heads)^-1/2`` (our reading of the paper), or "dim", ``dim^-1/2`` (the
            released models).
        bias: of the q, k, v projection.
        backend: of `attend`.

    Raises:
        ValueError: heads that do not divide dim, a map without two sides, fewer than one region, an even convolution.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        regions: int = 7,
        topk: int | None = 4,
        lce: int | None = 5,
        *,
        scale: Scale = "head",
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        need_heads(dim, heads)
        if len(shape) != 2:
            raise ValueError(f"shape must be (height, width), got {tuple(shape)}")
        if regions < 1:
            raise ValueError(f"regions must be at least 1 a side, got {regions}")
        if lce is not None and (lce < 1 or lce % 2 == 0):
            raise ValueError(f"lce must be odd and at least 1, or None, got {lce}")
        if scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
        self.heads, self.shape, self.backend = heads, (shape[0], shape[1]), backend
        self.scale = (dim // heads if scale == "head" else dim) ** -0.5
        order = TileOrder(self.shape, tuple(-(-n // regions) for n in self.shape))
        self.route = (
            None
            if topk is None
            else BlockTopK(prod(order.tile), order=order, select=highest(topk), heads="all", scale=self.scale)
        )
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)
        self.lce = None if lce is None else nn.Conv2d(dim, dim, lce, padding=lce // 2, groups=dim)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """y of the formula, tokens row-major; ``context``, ``pattern`` and ``state`` are refused."""
        refuse(self, context=context, pattern=pattern, state=state)
        need_length(self, x.shape[1], self.shape)
        q, k, v = self._heads(x)
        y = attend(q, k, v, self._routed(q, k), q_start=0, scale=self.scale, backend=self.backend)
        assert isinstance(y, Tensor)  # no lse was asked for
        y = y.transpose(1, 2).flatten(2)
        if self.lce is not None:
            y = y + to_sequence(self.lce(to_map(v.transpose(1, 2).flatten(2), self.shape)))
        return self.proj(y)

    def routed(self, x: Float[Tensor, "batch length dim"]) -> Routed | None:
        """Which regions each region picks for this x, in tile order; None where all are."""
        need_length(self, x.shape[1], self.shape)
        return self._routed(*self._heads(x)[:2])

    def _heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _routed(self, q: Tensor, k: Tensor) -> Routed | None:
        return None if self.route is None else self.route(q.detach(), k.detach(), q_start=0)
