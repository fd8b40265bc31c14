"""Rotary positions on a grid of several axes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.rotary import turn

__all__ = ["GridRope"]


class GridRope(nn.Module):
    """Rotary embedding (arXiv 2104.09864) over the axes of a grid, each axis turning pairs of its own.

    Axis a turns ``pairs[a]`` pairs by ``p_a * theta^(-i / pairs[a])``, i = 0..pairs[a]-1; pair j of a vector is its
    dimensions j and j + head_dim / 2. Scores then depend on the differences of coordinates alone, at any grid.

    Args:
        head_dim: even; the pairs are ``head_dim / 2`` in all.
        pairs: of each axis.
        theta: base of the wavelengths; small, as axes are short.
    """

    def __init__(self, head_dim: int, pairs: tuple[int, ...], theta: float | int = 100.0) -> None:
        super().__init__()
        if 2 * sum(pairs) != head_dim:
            raise ValueError(f"pairs must add to head_dim / 2 = {head_dim / 2:g}, got {pairs}")
        if not theta > 0:
            raise ValueError(f"theta must be above 0, got {theta}")
        self.head_dim, self.pairs, self.theta = head_dim, tuple(pairs), float(theta)

    def angles(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> Float[Tensor, "tokens half"]:
        """The angle of every pair at every token of a grid in row-major order."""
        if len(shape) != len(self.pairs):
            raise ValueError(f"shape must have {len(self.pairs)} axes, got {tuple(shape)}")
        axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
        where = torch.meshgrid(*axes, indexing="ij")
        turned = []
        for position, n in zip(where, self.pairs, strict=True):
            frequency = self.theta ** (-torch.arange(n, dtype=torch.float32, device=device) / n)
            turned.append(position.reshape(-1, 1) * frequency)
        return torch.cat(turned, 1)

    def forward(
        self, x: Float[Tensor, "batch heads tokens head_dim"], angles: Float[Tensor, "tokens half"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Each vector turned by its angles, in float32 at least."""
        return turn(x, angles)

    def extra_repr(self) -> str:
        """Pairs and base."""
        return f"{self.head_dim}, pairs={self.pairs}, theta={self.theta:g}"
