"""Patterns over tokens in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.grid import Grid
from regard.patterns.layout import BlockLayout, block_size
from regard.patterns.order import Order, TileOrder
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.rings import RingOrder, Rings
from regard.patterns.wrapped import Wrapped

__all__ = ["ListedOrder", "Permuted", "permute"]


@dataclass(frozen=True)
class ListedOrder(Order):
    """An order given position by position: the original index of each, -1 for padding."""

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        there = sorted(n for n in self.indices if n >= 0)
        if there != list(range(len(there))) or min(self.indices, default=0) < -1:
            raise ValueError(f"order must hold each index from 0 to n - 1 once, and -1 for padding, got {self.indices}")

    @property
    def n(self) -> int:
        """How many tokens there are."""
        return sum(i >= 0 for i in self.indices)

    @cached_property
    def forward(self) -> Int[Tensor, "n_padded"]:
        """The original index at each position, -1 where the position is padding."""
        return torch.tensor(self.indices, dtype=torch.long)


def permute(pattern: Pattern, order: Order | Sequence[int] | Int[Tensor, "n_padded"]) -> Pattern:
    """``pattern`` where position p holds the token ``order.forward[p]``; see `Pattern.permute`."""
    if not isinstance(order, Order):
        order = ListedOrder(tuple(torch.as_tensor(order).tolist()))
    if isinstance(pattern, Rings) and order == RingOrder(pattern.height, pattern.width):
        return order.pattern
    if pattern.span is not None and pattern.span != order.n:
        raise ValueError(f"order must be of the pattern's {pattern.span} positions, got one of {order.n}")
    return Permuted(pattern, order)


@dataclass(frozen=True)
class Permuted(Wrapped):
    """Position p holds token ``order.forward[p]`` of the part; padding meets nothing.

    A grid in `TileOrder`, in blocks as large as its tiles, has its layout in closed form; every other is evaluated.
    """

    order: Order

    @property
    def span(self) -> int:
        """The positions of the order."""
        return self.order.n_padded

    @property
    def closed_form(self) -> bool:
        """Whether this is a grid in its own tile order, whose layout in blocks of a tile is a product."""
        if not isinstance(self.part, Grid) or not isinstance(self.order, TileOrder):
            return False
        groups = tuple(getattr(axis, "groups", 1) for axis in self.part.axes)
        whole = self.order.n == prod(self.order.shape)
        return whole and (self.order.shape, self.order.groups) == (self.part.shape, groups)

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse queries or keys beyond the order, and an order that the part does not fit."""
        if kv_len > self.span or q_start < 0 or q_start + q_len > self.span:
            raise ValueError(
                f"the order has {self.span} positions, got kv_len={kv_len} and queries [{q_start}, {q_start + q_len})"
            )
        self.part.fits(self.order.n, self.order.n, 0)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``part.allows(forward[q], forward[k])``; never for padding or outside the order."""
        q, k = self._token(q_idx), self._token(kv_idx)
        return self.part.allows(q.clamp(min=0), k.clamp(min=0), head, batch) & (q >= 0) & (k >= 0)

    def _token(self, idx: Tensor) -> Tensor:
        inside = (idx >= 0) & (idx < self.span)
        return torch.where(inside, self.order.forward.to(idx.device)[idx.clamp(0, self.span - 1).long()], -1)

    def layout(self, q_len: int, kv_len: int, block: int | tuple[int, int], q_start: int | None = None) -> BlockLayout:
        """As a product of the axes' layouts where blocks are tiles (see `closed_form`), else evaluated pair by pair."""
        start, sizes = resolve_q_start(q_len, kv_len, q_start), block_size(block)
        if self.closed_form and (q_len, kv_len, start) == (self.span, self.span, 0):
            assert isinstance(self.part, Grid)
            assert isinstance(self.order, TileOrder)
            if sizes == (prod(self.order.tile),) * 2:
                return self.part.tiled(self.order.tile).layout
        return super().layout(q_len, kv_len, block, q_start)
