"""The pre-norm transformer block around any attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.conv import ConvPosition


class Mlp(nn.Sequential):
    """``W2 GELU(W1 x)``, the middle ``ratio * dim`` wide."""

    def __init__(self, dim: int, ratio: float = 4.0):
        middle = max(1, round(dim * ratio))
        super().__init__(nn.Linear(dim, middle), nn.GELU(), nn.Linear(middle, dim))


class Block(nn.Module):
    """``x = x + mixer(LN(x)); x = x + MLP(LN(x))``; ``conv_shape`` puts a 3x3 convolution before both.

    Args:
        dim: width.
        mixer: a layer ``[batch, length, dim] -> same``.
        mlp_ratio: width of the MLP's middle over dim.
        conv_shape: (height, width) of the map that the tokens form: ``x + DWConv(x)`` before both halves (DaViT).
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        conv_shape: Sequence[int] | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.mixer, self.mlp = mixer, Mlp(dim, mlp_ratio)
        self.conv1: nn.Module = nn.Identity() if conv_shape is None else ConvPosition(dim, conv_shape)
        self.conv2: nn.Module = nn.Identity() if conv_shape is None else ConvPosition(dim, conv_shape)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """The block; ``context``, ``pattern`` and ``state`` go to the mixer, which may refuse them."""
        given = {"context": context, "pattern": pattern, "state": state}
        x = self.conv1(x)
        x = x + self.mixer(self.norm1(x), **{k: v for k, v in given.items() if v is not None})
        x = self.conv2(x)
        return x + self.mlp(self.norm2(x))
