"""Multi-axis attention: windows, then a strided grid (MaxViT, arXiv 2204.01697)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from regard.layers.block import Block
from regard.layers.conv import MBConv
from regard.layers.grid import windowed
from regard.layers.maps import as_sequence
from regard.layers.refuse import need_length, refuse


class MultiAxis(nn.Module):
    """A MaxViT block on tokens in row-major order, windows first and the grid second (the order matters for reach):

        x = MBConv(x)                                        with conv
        x = x + BlockAttn(LN x);  x = x + MLP(LN x)          windows of P x P tokens
        x = x + GridAttn(LN x);   x = x + MLP(LN x)          G x G tokens, side / G apart

    Every token reaches every other in one block where ``P >= side / G``. Where it is less, further blocks reach on (56
    and 7: two blocks) unless P divides ``side / G``: then windows hold the same residues and no depth is enough.

    Args:
        dim: width.
        heads: must divide dim.
        shape: (height, width).
        window: P = G, 7 in the paper; must divide both sides.
        conv: the MBConv in front.
        rel_bias: learned relative biases ``[heads, 2P - 1, 2P - 1]`` in both attentions.
        mlp_ratio: 4 in the paper.

    Raises:
        ValueError: a window that does not divide a side (padding would change the strides).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shape: Sequence[int],
        window: int = 7,
        conv: bool = True,
        rel_bias: bool = True,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"shape must be (height, width), got {tuple(shape)}")
        if window < 1 or any(n % window for n in shape):
            raise ValueError(f"window must divide both sides of {tuple(shape)}, got {window}")
        self.shape = height, width = tuple(shape)
        self.conv: nn.Module = as_sequence(MBConv(dim), height, width) if conv else nn.Identity()
        self.window = Block(dim, windowed(dim, heads, self.shape, window, "plain", rel_bias), mlp_ratio)
        self.grid = Block(dim, windowed(dim, heads, self.shape, window, "grid", rel_bias), mlp_ratio)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, context: Any = None, pattern: Any = None, state: Any = None
    ) -> Float[Tensor, "batch length dim"]:
        """The block; ``context``, ``pattern`` and ``state`` are refused."""
        refuse(self, context=context, pattern=pattern, state=state)
        need_length(self, x.shape[1], self.shape)
        return self.grid(self.window(self.conv(x)))
