"""The convolutions that vision blocks put beside attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.channel_gate import SE
from regard.layers.maps import MapLayer, to_map, to_sequence
from regard.layers.refuse import need_length


class ConvPosition(nn.Module):
    """``x + DWConv_kxk(x)`` on tokens of a map in row-major order: DaViT's position encoding.

    Its reach is ``k // 2`` tokens a layer, across the borders of windows too.
    """

    def __init__(self, dim: int, shape: Sequence[int], kernel: int = 3):
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"shape must be (height, width), got {tuple(shape)}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
        self.shape = tuple(shape)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """The tokens with what their neighbours say added."""
        need_length(self, x.shape[1], self.shape)
        return x + to_sequence(self.conv(to_map(x, self.shape)))


class MBConv(MapLayer):
    """MaxViT's inverted bottleneck (arXiv 2204.01697):

        x + W2 SE(act(BN(DW_3x3(act(BN(W1 BN(x)))))))

    with W1 from dim to ``expand * dim`` channels, SE narrowed to ``dim / 4``, W2 back to dim.

    Args:
        dim: channels.
        expand: how many times wider the middle is.
        act: after the two inner norms.
        gate_act: inside the squeeze-excite.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 4,
        act: Callable[[], nn.Module] = nn.GELU,
        gate_act: Callable[[], nn.Module] = nn.SiLU,
        eps: float = 1e-5,
    ):
        super().__init__()
        wide = expand * dim
        self.norm = nn.BatchNorm2d(dim, eps)
        self.widen = nn.Sequential(nn.Conv2d(dim, wide, 1, bias=False), nn.BatchNorm2d(wide, eps), act())
        self.mix = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide, eps), act()
        )
        self.gate = SE(wide, 4 * expand, act=gate_act)
        self.narrow = nn.Conv2d(wide, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The map of the formula."""
        return x + self.narrow(self.gate(self.mix(self.widen(self.norm(x)))))
