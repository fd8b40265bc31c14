"""A grid in tile order: its layout as a Kronecker product of the axes' layouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.grid import Grid
from regard.patterns.layout import BlockLayout
from regard.patterns.order import TileOrder
from regard.patterns.pattern import Pattern

__all__ = ["AxisTiles", "Tiled", "axis_groups", "axis_tiles", "tile"]

CHUNK = 1 << 16  # listed blocks worked on at once


class AxisTiles(NamedTuple):
    """Which key tiles each query tile of one axis meets: CSR over query tiles."""

    indptr: Int[Tensor, "q_tiles_1"]
    indices: Int[Tensor, "listed"]
    full: Bool[Tensor, "listed"]
    kv_tiles: int


@dataclass(frozen=True, eq=False)
class Tiled:
    """A grid in tile order.

    Query block i is the i-th tile of `q_order`, key block j the j-th of `kv_order`; both may hold padding, and a block
    with padded keys is partial.

    Attributes:
        grid: the pattern.
        q_order: order of the queries.
        kv_order: order of the keys.
        layout: the blocks, over the padded orders.
    """

    grid: Grid
    q_order: TileOrder
    kv_order: TileOrder
    layout: BlockLayout

    def allows(self, q_pos: Int[Tensor, "..."], kv_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether each pair of positions of the two orders is allowed; never where one is padding."""
        q, k = self.q_order.forward.to(q_pos.device)[q_pos], self.kv_order.forward.to(kv_pos.device)[kv_pos]
        return self.grid.allows(q.clamp(min=0), k.clamp(min=0)) & (q >= 0) & (k >= 0)

    def mask(self, q_tiles: Int[Tensor, "n"], kv_tiles: Int[Tensor, "n"]) -> Bool[Tensor, "n bq bk"]:
        """The pairs of n blocks: a product of the axes' own masks, so each axis is evaluated once."""
        out = None
        q_size, kv_size = self.q_order.tiles, self.kv_order.tiles
        axes, left_q, left_k = len(q_size), q_tiles, kv_tiles
        for d in reversed(range(axes)):
            i, j = left_q % q_size[d], left_k % kv_size[d]
            left_q, left_k = left_q // q_size[d], left_k // kv_size[d]
            pairs, back = (i * kv_size[d] + j).unique(return_inverse=True)
            table = self._axis_mask(d, pairs // kv_size[d], pairs % kv_size[d])[back]
            view = [len(q_tiles)] + [1] * (2 * axes)
            view[1 + d], view[1 + axes + d] = table.shape[1:]
            out = table.view(view) if out is None else out & table.view(view)
        assert out is not None
        return out.flatten(axes + 1).flatten(1, axes)

    def _axis_mask(self, d: int, i: Tensor, j: Tensor) -> Tensor:
        q_side, kv_side = self.q_order.tile[d], self.kv_order.tile[d]
        q = self.q_order.along[d].to(i.device).view(-1, q_side)[i][:, :, None]
        k = self.kv_order.along[d].to(i.device).view(-1, kv_side)[j][:, None, :]
        return self.grid.axes[d].allows(q.clamp(min=0), k.clamp(min=0)) & (q >= 0) & (k >= 0)


def axis_groups(axis: Pattern, length: int) -> list[tuple[Pattern, int]]:
    """The parts of an axis that never meet, as patterns of their own with their lengths; one where all may meet."""
    groups = min(getattr(axis, "groups", 1), length)
    return [axis.group(length, r) for r in range(groups)] if groups > 1 else [(axis, length)]  # type: ignore[attr-defined]


def axis_tiles(axis: Pattern, length: int, q_side: int, kv_side: int, padding: bool = True) -> AxisTiles:
    """The layout of one axis over its tiles; axes with groups are block diagonal over them.

    With `padding` a tile with padded keys is partial; without, tiles are judged on the keys that exist.
    """
    parts: dict[int, AxisTiles] = {}
    sequence = []
    for inner, n in axis_groups(axis, length):
        if n not in parts:
            found = inner.layout(n, n, (q_side, kv_side), 0)
            last = -(-n // kv_side) - 1
            full = found.full & (found.indices != last) if padding and n % kv_side else found.full
            parts[n] = AxisTiles(found.indptr, found.indices, full, last + 1)
        sequence.append(parts[n])
    return sequence[0] if len(sequence) == 1 else _diagonal(sequence)


def _diagonal(parts: list[AxisTiles]) -> AxisTiles:
    indptr, indices, start, listed = [parts[0].indptr[:1]], [], 0, 0
    for part in parts:
        indptr.append(part.indptr[1:] + listed)
        indices.append(part.indices + start)
        start, listed = start + part.kv_tiles, listed + len(part.indices)
    return AxisTiles(torch.cat(indptr), torch.cat(indices), torch.cat([p.full for p in parts]), start)


def kronecker(outer: AxisTiles, inner: AxisTiles) -> AxisTiles:
    """Tiles of two axes: listed iff both list them, full iff both cover them; the inner axis runs fastest."""
    counts = (outer.indptr.diff()[:, None] * inner.indptr.diff()[None]).flatten()
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    listed, n_inner = int(indptr[-1]), len(inner.indptr) - 1
    indices, full = torch.empty(listed, dtype=torch.int32), torch.empty(listed, dtype=torch.bool)
    for start in range(0, listed, CHUNK):
        entry = torch.arange(start, min(start + CHUNK, listed))
        row = torch.searchsorted(indptr, entry, right=True) - 1
        nth, j = entry - indptr[row], row % n_inner
        width = inner.indptr[j + 1] - inner.indptr[j]
        a, b = outer.indptr[row // n_inner] + nth // width, inner.indptr[j] + nth % width
        indices[start : start + CHUNK] = outer.indices[a] * inner.kv_tiles + inner.indices[b]
        full[start : start + CHUNK] = outer.full[a] & inner.full[b]
    return AxisTiles(indptr, indices, full, outer.kv_tiles * inner.kv_tiles)


def tile(grid: Grid, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> Tiled:
    """See `Grid.tiled`."""
    groups = tuple(getattr(axis, "groups", 1) for axis in grid.axes)
    q_order, kv_order = TileOrder(grid.shape, q_tile, groups), TileOrder(grid.shape, kv_tile, groups)
    each = [axis_tiles(*of) for of in zip(grid.axes, grid.shape, q_tile, kv_tile, strict=True)]
    indptr, indices, full, _ = reduce(kronecker, each)
    layout = BlockLayout(indptr, indices, full, q_order.n_padded, kv_order.n_padded, (prod(q_tile), prod(kv_tile)))
    return Tiled(grid, q_order, kv_order, layout)
