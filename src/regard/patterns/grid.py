"""Patterns on grids: a pair is allowed where every axis allows its coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.axes import Neighborhood1d
from regard.patterns.boxes import axis_rows, flat_intervals, run_boxes
from regard.patterns.order import per_axis
from regard.patterns.pattern import Pattern, Rows, resolve_q_start
from regard.patterns.static import Allowed, Index

if TYPE_CHECKING:
    from regard.patterns.tiled import Tiled

__all__ = ["Grid", "Neighborhood"]


@dataclass(frozen=True, init=False)
class Grid(Pattern):
    """Tokens of an n-D grid, row-major; a pair is allowed iff every axis allows its coordinates.

    An axis is any 1-D pattern. `Neighborhood1d` brings its length; where an axis does not, `shape` says it:
    ``Grid([Same(), Full()], shape=(8, 12))`` is attention along the rows of an 8 x 12 image,
    ``Grid([Congruent(4), Congruent(4)], shape=(16, 16))`` the grid attention of MaxViT.

    The pattern is bound to its shape: q_len = kv_len = prod(shape), q_start = 0.

    Attributes:
        axes: one pattern an axis.
        shape: coordinates along each axis; None: every axis brings its own length.
    """

    axes: tuple[Pattern, ...]
    shape: tuple[int, ...]

    def __init__(self, axes: Sequence[Pattern], shape: Sequence[int] | None = None) -> None:
        if not axes or not all(isinstance(a, Pattern) for a in axes):
            raise ValueError(f"axes must be one or more patterns, got {axes!r}")
        if apart := [a for a in axes if a.heads or a.samples]:
            raise ValueError(f"axes must be alike for all heads and samples (use per_head of grids), got {apart[0]!r}")
        own = [getattr(a, "length", None) for a in axes]
        if shape is None:
            if None in own:
                d = own.index(None)
                raise ValueError(f"shape must be given: {axes[d]!r} of axis {d} has no length of its own")
            shape = [n for n in own if n is not None]
        sides = per_axis("shape", shape, len(axes))
        if any(n is not None and n != m for n, m in zip(own, sides, strict=True)):
            raise ValueError(f"shape must agree with the axes' own lengths {own}, got {sides}")
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "shape", sides)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Whether every axis allows the pair's coordinates."""
        allowed, step = None, 1
        for d in reversed(range(len(self.axes))):
            q, k = (q_idx // step, kv_idx // step) if step > 1 else (q_idx, kv_idx)
            if d > 0:
                q, k = q % self.shape[d], k % self.shape[d]
            here = self.axes[d].allows(q, k, head, batch)
            allowed = here if allowed is None else allowed & here
            step *= self.shape[d]
        assert allowed is not None
        return allowed

    @property
    def span(self) -> int:
        """The tokens of the grid."""
        return prod(self.shape)

    def fits(self, q_len: int, kv_len: int, q_start: int | None = None) -> None:
        """Refuse other lengths than the grid's."""
        n = prod(self.shape)
        start = resolve_q_start(q_len, kv_len, q_start)
        if (q_len, kv_len, start) != (n, n, 0):
            raise ValueError(
                f"a grid of shape {self.shape} needs q_len = kv_len = {n} and q_start = 0, "
                f"got q_len={q_len}, kv_len={kv_len}, q_start={start}"
            )

    @property
    def closed_form(self) -> bool:
        """Whether every axis has one."""
        return all(axis.closed_form for axis in self.axes)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """Keys of runs of the row-major order: a run is a few boxes, a box's keys a product over the axes.

        any = union over the boxes of prod_d any_d, all = intersection over the boxes of prod_d all_d.
        """
        boxes, there = run_boxes(q0, q1, self.shape)
        run, box = there.nonzero().unbind(1)
        per_box = []
        for d, axis in enumerate(self.axes):
            span, back = boxes[run, box, d].unique(dim=0, return_inverse=True)
            rows = axis_rows(axis, span[:, 0], span[:, 1], self.shape[d])
            if rows is None:
                return None
            per_box.append((rows, back))
        exact = (all(r.exact[0] for r, _ in per_box), all(r.exact[1] for r, _ in per_box))
        n, slots = prod(self.shape), boxes.shape[1]

        def spread(sets: list[Tensor]) -> Tensor:
            flat = flat_intervals([of[back] for of, (_, back) in zip(sets, per_box, strict=True)], self.shape)
            out = flat.new_zeros(len(q0), slots, flat.shape[1], 2)
            out[run, box] = flat
            return out

        some = iv.clip(spread([rows.any for rows, _ in per_box]).flatten(1, 2), min(n, kv_len))
        each = spread([rows.all for rows, _ in per_box])
        absent = ~there[..., None, None]
        missing = [iv.complement(iv.clip(each[:, s], n), n).masked_fill(absent[:, s], 0) for s in range(slots)]
        every = iv.complement(iv.clip(torch.cat(missing, 1), n), n)
        return Rows(some, iv.clip(every, min(n, kv_len)), exact)

    def row_counts(self, q_len: int, kv_len: int, q_start: int | None = None) -> Int[Tensor, "{q_len}"]:
        """Keys of each query: the product of its keys along the axes."""
        self.fits(q_len, kv_len, q_start)
        counts = torch.ones(1, dtype=torch.long)
        for axis, n in zip(self.axes, self.shape, strict=True):
            counts = (counts[:, None] * axis.row_counts(n, n, 0)).flatten()
        return counts

    def tiled(self, q_tile: int | Sequence[int], kv_tile: int | Sequence[int] | None = None) -> Tiled:
        """The orders that make tiles contiguous, and the blocks of the grid in these orders (`kv_tile` None: `q_tile`).

        Exact, as a Kronecker product of the axes' own layouts: a block is listed iff every axis lists its tiles, full
        iff every axis covers them. Coordinates that a dilated or congruent axis keeps apart are sorted apart.
        """
        from regard.patterns.tiled import tile

        axes = len(self.axes)
        q_sides = per_axis("q_tile", q_tile, axes)
        return tile(self, q_sides, q_sides if kv_tile is None else per_axis("kv_tile", kv_tile, axes))

    def best_tiles(
        self, q_block: int = 128, kv_block: int = 128, overhead: int = 0
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sides (q_tile, kv_tile), of at most so many tokens, that compute the fewest pairs: see `best_tiles`."""
        from regard.patterns.tile_cost import best_tiles

        return best_tiles(self, q_block, kv_block, overhead)


@dataclass(frozen=True, init=False)
class Neighborhood(Grid):
    """Neighborhood attention on a 1-D, 2-D or 3-D grid: a window of the nearest keys along every axis.

    Along each axis as `Neighborhood1d`; a single number stands for all axes. Every query has exactly prod(window) keys
    unless an axis is causal, and a window as large as the grid is dense attention. With `stride` equal to `window`
    and a window that divides the axis, these are separate blocks.

    Attributes:
        shape: tokens along each axis, row-major.
        window: keys along each axis, the query's own included.
        stride: queries along each axis that share a window, 1..window.
        dilation: distance between neighbors along each axis; ``window * dilation <= shape``.
        causal: along which axes a query sees only keys up to its own.

    Papers: arXiv 2204.07143, 2209.15001 (dilation), 2403.04690, 2504.16922 (stride).
    """

    axes: tuple[Pattern, ...] = field(repr=False, compare=False)
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    def __init__(
        self,
        shape: Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> None:
        n = len(shape)
        sides = per_axis("shape", shape, n)
        causals = (causal,) * n if isinstance(causal, bool) else tuple(causal)
        if len(causals) != n or not all(isinstance(c, bool) for c in causals):
            raise ValueError(f"causal must be a bool or one for each of the {n} axes, got {causal!r}")
        named = {"window": window, "stride": stride, "dilation": dilation}
        values = {name: per_axis(name, value, n) for name, value in named.items()}
        axes = []
        for d, of in enumerate(zip(sides, *values.values(), causals, strict=True)):
            try:
                axes.append(Neighborhood1d(*of))
            except ValueError as wrong:
                raise ValueError(f"axis {d} of shape {sides}: {wrong}") from None
        super().__init__(axes, sides)
        for name, value in {**values, "causal": causals}.items():
            object.__setattr__(self, name, value)
