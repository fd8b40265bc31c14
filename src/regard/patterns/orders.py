"""Orders of grid tokens that keep neighbours together: one axis after the other, or along a Hilbert curve."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns.order import Order, per_axis, with_ends

__all__ = ["AxisOrder", "GridOrder", "HilbertOrder"]


@dataclass(frozen=True)
class GridOrder(Order):
    """A permutation of a row-major grid, with tokens before and after it that stay in place.

    Attributes:
        shape: tokens along each axis.
        prefix, suffix: tokens before and after those of the grid (CLS, text): first and last in the order too.
        block: prefix, grid and suffix are each padded to a multiple of it, so that no block of so many holds tokens of
            two of them; 1: no padding.
    """

    shape: tuple[int, ...]
    prefix: int
    suffix: int
    block: int

    def _set(self, shape: Sequence[int], prefix: int, suffix: int, block: int) -> None:
        object.__setattr__(self, "shape", per_axis("shape", shape, len(shape)))
        for name, value, least in (("prefix", prefix, 0), ("suffix", suffix, 0), ("block", block, 1)):
            object.__setattr__(self, name, per_axis(name, value, 1, least)[0])

    @property
    def n(self) -> int:
        """Tokens of the grid, and those before and after it."""
        return self.prefix + prod(self.shape) + self.suffix

    @property
    @abstractmethod
    def grid(self) -> Int[Tensor, "tokens"]:
        """The row-major index of the grid's tokens, in this order."""

    @cached_property
    def forward(self) -> Int[Tensor, "n_padded"]:
        """The original index at each position, -1 where the position is padding."""
        return with_ends(self.grid, self.prefix, self.suffix, self.block)


@dataclass(frozen=True, init=False)
class AxisOrder(GridOrder):
    """The grid with its axes in another order: ``axes[0]`` changes slowest, ``axes[-1]`` fastest.

    ``AxisOrder((frames, height, width), (1, 2, 0))`` puts the frames of each place together: six orders of a video
    (PAROAttention, arXiv 2506.16054).

    Attributes:
        axes: a permutation of the axes' numbers.
    """

    axes: tuple[int, ...]

    def __init__(
        self, shape: Sequence[int], axes: Sequence[int], prefix: int = 0, suffix: int = 0, block: int = 1
    ) -> None:
        self._set(shape, prefix, suffix, block)
        if sorted(axes) != list(range(len(self.shape))):
            raise ValueError(f"axes must be a permutation of the {len(self.shape)} axes of shape, got {tuple(axes)}")
        object.__setattr__(self, "axes", tuple(axes))

    @property
    def grid(self) -> Int[Tensor, "tokens"]:
        """The row-major index of the grid's tokens, in this order."""
        return torch.arange(prod(self.shape)).view(self.shape).permute(self.axes).flatten()


@dataclass(frozen=True, init=False)
class HilbertOrder(GridOrder):
    """The grid along a Hilbert curve: what is close in the order is close in the grid, in any number of dimensions.

    The curve of the smallest cube of side ``2^m`` that holds the grid, of which only the grid's tokens are kept; each
    step goes to a neighbour where all sides are ``2^m``. J. Skilling, Programming the Hilbert curve (2004).
    """

    def __init__(self, shape: Sequence[int], prefix: int = 0, suffix: int = 0, block: int = 1) -> None:
        self._set(shape, prefix, suffix, block)

    @property
    def grid(self) -> Int[Tensor, "tokens"]:
        """The row-major index of the grid's tokens, in this order."""
        sides = [torch.arange(n) for n in self.shape]
        at = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)
        return hilbert_index(at, max((max(self.shape) - 1).bit_length(), 1)).argsort()


def hilbert_index(at: Int[Tensor, "axes points"], bits: int) -> Int[Tensor, "points"]:
    """Where points with coordinates in ``[0, 2^bits)`` stand on the Hilbert curve of their cube."""
    x = [c.clone() for c in at]
    axes, top = len(x), 1 << (bits - 1)
    if axes * bits > 62:
        raise ValueError(f"shape must have axes * bits <= 62 for indices of 64 bits, got {axes} axes of {bits} bits")
    q = top
    while q > 1:
        low = q - 1
        for n in range(axes):
            high = (x[n] & q) != 0
            swap = torch.where(high, 0, (x[0] ^ x[n]) & low)
            x[0] = torch.where(high, x[0] ^ low, x[0] ^ swap)
            x[n] = x[n] ^ swap if n else x[0]
        q >>= 1
    for n in range(1, axes):  # Gray code
        x[n] = x[n] ^ x[n - 1]
    turn = torch.zeros_like(x[0])
    q = top
    while q > 1:
        turn = torch.where((x[-1] & q) != 0, turn ^ (q - 1), turn)
        q >>= 1
    found = torch.zeros_like(x[0])
    for bit in reversed(range(bits)):
        for n in range(axes):
            found = (found << 1) | (((x[n] ^ turn) >> bit) & 1)
    return found
