"""Orders of tokens: a permutation, maybe with padding, that makes what attends together contiguous."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Order", "TileOrder", "per_axis", "with_ends"]


def per_axis(name: str, value: int | Sequence[int], n: int, least: int = 1) -> tuple[int, ...]:
    """One integer an axis, all at least `least`; a single integer stands for every axis."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    if len(values) != n or any(not isinstance(x, int) or isinstance(x, bool) or x < least for x in values):
        raise ValueError(f"{name} must be an integer >= {least} or one for each of the {n} axes, got {value!r}")
    return values


class Order(ABC):
    """A new order of n tokens, in which some positions may be padding."""

    @property
    @abstractmethod
    def forward(self) -> Int[Tensor, "n_padded"]:
        """The original index at each position, -1 where the position is padding."""

    @property
    @abstractmethod
    def n(self) -> int:
        """How many tokens there are."""

    @property
    def n_padded(self) -> int:
        """How many positions there are, padding included."""
        return len(self.forward)

    @cached_property
    def inverse(self) -> Int[Tensor, "n"]:
        """The position of each original index."""
        inverse = torch.empty(self.n, dtype=torch.long)
        there = (self.forward >= 0).nonzero().flatten()
        inverse[self.forward[there]] = there
        return inverse

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """`x` in this order along `dim`; padding is zero.

        Raises:
            ValueError: `x` has not n entries along `dim`.
        """
        self._check("x", x, dim, self.n)
        forward = self.forward.to(x.device)
        y = x.index_select(dim, forward.clamp(min=0))
        if self.n_padded == self.n:
            return y
        shape = [1] * y.ndim
        shape[dim] = -1
        return y.masked_fill((forward < 0).view(shape), 0)

    def undo(self, y: Tensor, dim: int = -2) -> Tensor:
        """`y` back in the original order along `dim`, padding dropped: `undo(apply(x)) == x`.

        Raises:
            ValueError: `y` has not n_padded entries along `dim`.
        """
        self._check("y", y, dim, self.n_padded)
        return y.index_select(dim, self.inverse.to(y.device))

    def _check(self, name: str, x: Tensor, dim: int, n: int) -> None:
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != n:
            raise ValueError(f"{name} must have {n} entries along dim {dim}, got shape {tuple(x.shape)}")


@dataclass(frozen=True, init=False)
class TileOrder(Order):
    """Row-major tokens of a grid, reordered so that each n-D tile is contiguous.

    Tiles come in row-major order, and so do the tokens of a tile. Every axis is padded up to a multiple of its tile.
    With `groups[d] = g` the coordinates of axis d are first sorted by `coordinate mod g` (each residue padded to whole
    tiles), so that what a dilation of g keeps apart lies in different tiles.

    Attributes:
        shape: tokens along each axis; index = row-major.
        tile: tile side along each axis.
        groups: residues to sort each axis by; 1 keeps it as it is.
        prefix, suffix: tokens before and after those of the grid (CLS, text), which stay first and last, each padded to
            whole tiles: no tile holds tokens of both.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    groups: tuple[int, ...]
    prefix: int
    suffix: int

    def __init__(
        self,
        shape: Sequence[int],
        tile: int | Sequence[int],
        groups: int | Sequence[int] = 1,
        prefix: int = 0,
        suffix: int = 0,
    ) -> None:
        object.__setattr__(self, "shape", per_axis("shape", shape, len(shape)))
        object.__setattr__(self, "tile", per_axis("tile", tile, len(shape)))
        object.__setattr__(self, "groups", per_axis("groups", groups, len(shape)))
        for name, value in (("prefix", prefix), ("suffix", suffix)):
            object.__setattr__(self, name, per_axis(name, value, 1, least=0)[0])

    @property
    def n(self) -> int:
        """Tokens of the grid, and those before and after it."""
        return self.prefix + prod(self.shape) + self.suffix

    @cached_property
    def along(self) -> tuple[Tensor, ...]:
        """For each axis, the coordinate at each position of its padded, grouped order; -1 where there is none."""
        return tuple(_axis(n, t, g) for n, t, g in zip(self.shape, self.tile, self.groups, strict=True))

    @property
    def n_padded(self) -> int:
        """How many positions there are, padding included."""
        size = prod(self.tile)
        return prod(len(a) for a in self.along) + sum(-(-end // size) * size for end in (self.prefix, self.suffix))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(len(a) // t for a, t in zip(self.along, self.tile, strict=True))

    @cached_property
    def forward(self) -> Int[Tensor, "n_padded"]:
        """The original index at each position, -1 where the position is padding."""
        axes = len(self.shape)
        index, valid = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
        for d, (coordinate, n, t) in enumerate(zip(self.along, self.shape, self.tile, strict=True)):
            view = [1] * (2 * axes)
            view[d], view[axes + d] = -1, t
            index = index * n + coordinate.view(view)
            valid = valid & (coordinate >= 0).view(view)
        return with_ends(torch.where(valid, index, -1).flatten(), self.prefix, self.suffix, prod(self.tile))


def with_ends(grid: Tensor, prefix: int, suffix: int, block: int) -> Tensor:
    """An order of a grid's tokens with others before and after it; each of the three padded to whole blocks."""
    last = prefix + int((grid >= 0).sum())
    parts = torch.arange(prefix), torch.where(grid < 0, -1, grid + prefix), torch.arange(last, last + suffix)
    return torch.cat([torch.nn.functional.pad(part, (0, -len(part) % block), value=-1) for part in parts])


def _axis(n: int, tile: int, groups: int) -> Tensor:
    most = -(-n // groups)  # the longest group
    padded = -(-most // tile) * tile
    inside = torch.arange(padded)
    coordinate = inside[None] * groups + torch.arange(groups)[:, None]
    coordinate = torch.where(coordinate < n, coordinate, -1)
    short = (n - torch.arange(groups) + groups - 1) // groups  # a shorter group may need a tile less
    return coordinate[inside[None] < (-(-short // tile) * tile)[:, None]]
