"""A small vision transformer with a pluggable attention layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.axial import AxialAttention
from regard.layers.block import Block
from regard.layers.channel import ChannelAttention
from regard.layers.ensemble import PhaseAverage
from regard.layers.grid import GridAttention, windowed
from regard.layers.maps import MapLayer, as_map, to_map, to_sequence
from regard.layers.neighborhood import NeighborhoodAttention
from regard.patterns import Full, Grid

ReadOut = Literal["pooled", "token", "features"]
Mixer = Callable[[int, int, tuple[int, int]], nn.Module]  # (dim, heads, shape) -> layer


def mixers(window: int) -> dict[str, Mixer]:
    """The attention layers that a ViT knows by name; ``window`` is their side where they have one."""
    return {
        "full": lambda dim, heads, shape: GridAttention(dim, heads, Grid((Full(), Full()), shape)),
        "window": lambda dim, heads, shape: windowed(dim, heads, shape, window),
        "shifted": lambda dim, heads, shape: windowed(dim, heads, shape, window, "shifted"),
        "grid": lambda dim, heads, shape: windowed(dim, heads, shape, window, "grid"),
        "neighborhood": lambda dim, heads, shape: NeighborhoodAttention(dim, heads, shape, window),
        "row": lambda dim, heads, shape: AxialAttention(dim, heads, shape, 1),
        "column": lambda dim, heads, shape: AxialAttention(dim, heads, shape, 0),
        "channel": lambda dim, heads, shape: ChannelAttention(dim, heads),
    }


class Body(MapLayer):
    """Learned positions, then the blocks. What `PhaseAverage` runs at each phase: positions move with the windows."""

    def __init__(self, dim: int, shape: tuple[int, int], blocks: Sequence[nn.Module], position_std: float):
        super().__init__()
        self.positions = nn.Parameter(position_std * torch.randn(dim, *shape)) if position_std > 0 else None
        self.blocks = nn.ModuleList(as_map(b) for b in blocks)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The map after every block."""
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return x


class ViT(nn.Module):
    """Patches -> embedding -> positions -> pre-norm blocks -> LayerNorm -> logits.

    Args:
        image: (height, width) in pixels.
        mixers: the attention layer of each block: a name of `mixers`, or a function (dim, heads, shape) -> layer.
        classes: outputs; with ``read_out="features"`` there is no classifier and None is taken.
        dim, heads: width and heads.
        channels: of the image.
        patch: side of a patch; must divide the image.
        window: of windowed, strided and neighborhood mixers.
        read_out: "pooled" (mean over tokens, then logits ``[batch, classes]``), "token" (logits of every token,
            ``[batch, classes, rows, columns]``) or "features" (the normed map ``[batch, dim, rows, columns]``).
        embed_std: standard deviation of the initial patch embedding, which then has no bias, so that a blank patch is
            its position alone; None: a convolution as PyTorch starts it, with a bias.
        position_std: standard deviation of the initial position embeddings, which are learned; 0: none.
        conv: 3x3 depthwise convolutions in the blocks (DaViT). They reach over the borders of windows.
        phases: shifts of `PhaseAverage` over positions and blocks, (0,) for a plain model.
        mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        image: tuple[int, int],
        mixers: Sequence[str | Mixer],
        classes: int | None,
        *,
        dim: int = 32,
        heads: int = 2,
        channels: int = 1,
        patch: int = 1,
        window: int = 4,
        read_out: ReadOut = "pooled",
        embed_std: float | None = None,
        position_std: float = 0.02,
        conv: bool = False,
        phases: Sequence[int | tuple[int, int]] = (0,),
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if read_out not in get_args(ReadOut):
            raise ValueError(f"read_out must be one of {get_args(ReadOut)}, got {read_out!r}")
        if (classes is None) != (read_out == "features"):
            raise ValueError(f"classes must be None with read_out='features' and a number otherwise, got {classes}")
        if patch < 1 or any(n % patch for n in image):
            raise ValueError(f"patch must divide both sides of the image {tuple(image)}, got {patch}")
        if not mixers:
            raise ValueError("mixers must name at least one attention layer, got none")
        self.image, self.read_out = tuple(image), read_out
        self.shape = shape = (image[0] // patch, image[1] // patch)
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch, bias=embed_std is None)
        if embed_std is not None:
            nn.init.normal_(self.embed.weight, std=embed_std)
        made = [_mixer(m, window)(dim, heads, shape) for m in mixers]
        body = Body(dim, shape, [Block(dim, m, mlp_ratio, shape if conv else None) for m in made], position_std)
        self.body: MapLayer = body if tuple(phases) == (0,) else PhaseAverage(body, phases)
        self.norm = nn.LayerNorm(dim)
        self.head: nn.Module = nn.Identity() if classes is None else nn.Linear(dim, classes)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The map after the blocks and the last norm."""
        if tuple(x.shape[2:]) != self.image:
            raise ValueError(f"x must be images of {self.image}, got {tuple(x.shape[2:])}")
        return to_map(self.norm(to_sequence(self.body(self.embed(x)))), self.shape)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out *place"]:
        """Logits, or features: see ``read_out``."""
        y = self.features(x)
        if self.read_out == "pooled":
            return self.head(y.mean((2, 3)))
        return to_map(self.head(to_sequence(y)), self.shape)


def _mixer(mixer: str | Mixer, window: int) -> Mixer:
    if not isinstance(mixer, str):
        return mixer
    known = mixers(window)
    if mixer not in known:
        raise ValueError(f"mixers must be functions or names among {', '.join(known)}, got {mixer!r}")
    return known[mixer]
