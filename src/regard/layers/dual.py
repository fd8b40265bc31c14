"""Dual attention: windows over space, then groups of channels over everything (DaViT, arXiv 2204.03645)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.block import Block
from regard.layers.channel import ChannelAttention, Scale
from regard.layers.grid import windowed
from regard.layers.refuse import need_length, refuse


class DualAttention(nn.Module):
    """A spatial and a channel block on tokens in row-major order, each

        x = x + DWConv3x3(x);  x = x + Attn(LN x);  x = x + DWConv3x3(x);  x = x + MLP(LN x)

    with non-overlapping windows, no shift and no relative bias, then `ChannelAttention`. Windows that the map does not
    fill hold what is there (the release lets zero padding into their softmax; here it is left out).

    Args:
        dim: width.
        heads: of the windows; must divide dim.
        shape: (height, width).
        window: tokens a side, 7 in the paper.
        groups: of channels, as many as heads unless told otherwise.
        conv: the depthwise convolutions. They reach over the borders of windows.
        scale: of the channel scores, see `ChannelAttention`.
        mlp_ratio: 4 in the paper.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        window: int = 7,
        groups: int | None = None,
        conv: bool = True,
        scale: Scale = "head",
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"shape must be (height, width), got {tuple(shape)}")
        self.shape = tuple(shape)
        side = self.shape if conv else None
        self.spatial = Block(dim, windowed(dim, heads, self.shape, window), mlp_ratio, side)
        channels = ChannelAttention(dim, heads if groups is None else groups, scale)
        self.channel = Block(dim, channels, mlp_ratio, side)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """Both blocks; ``context``, ``pattern`` and ``state`` are refused."""
        refuse(self, context=context, pattern=pattern, state=state)
        need_length(self, x.shape[1], self.shape)
        return self.channel(self.spatial(x))
