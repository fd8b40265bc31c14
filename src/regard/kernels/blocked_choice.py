"""Which blocks a pattern is cut into, and the plans that follow, kept by value of the pattern."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.kernels.blocked_plan import FULL, OPEN, Batch, Blocks, make_batches
from regard.kernels.blocked_tiles import Axis
from regard.kernels.partial import partial_tiles
from regard.patterns.algebra import And, Not, Or
from regard.patterns.grid import Grid
from regard.patterns.layout import BlockLayout
from regard.patterns.pattern import Pattern
from regard.patterns.static import Causal, Full, Window
from regard.patterns.tiled import axis_tiles

__all__ = ["Plan", "make_plan"]

BASE = 64  # the finest block of tokens in a row; coarser ones are tried
COARSER = (1, 2, 3, 4, 6, 8, 12, 16)
COPY = 12  # a gathered key costs as much as so many pairs
CALL = 10_000  # a call of the kernel costs as much as so many pairs
PAIRS = 1 << 29  # in partial blocks whose masks are looked at beforehand; beyond, in each call
GRID_TILES = (32, 256)  # fewest and most queries of a tile of a grid
GRID_KEYS = (4, 16)  # fewest and most tokens that are gathered together


@dataclass(frozen=True, eq=False)
class Plan:
    """What is computed, tile by tile, for the heads of one pattern. Anchors: queries, or keys in the backward pass."""

    blocks: Blocks
    batches: list[Batch]
    anchor: Axis
    other: Axis
    place: Tensor | None  # position of each anchor token in the plan's order; None: as they come
    order: str

    @property
    def pairs(self) -> int:
        """Pairs that are computed, for one head."""
        return sum(len(b) * b.size * b.n for b in self.batches)

    @property
    def covers(self) -> bool:
        """Whether every anchor block is in some tile."""
        return sum(len(b) for b in self.batches) == -(-self.anchor.length // self.anchor.block)

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        tables = [t for t in (self.anchor.order, self.other.order, self.place, self.blocks.tiles) if t is not None]
        arrays = self.blocks.anchor.nbytes + self.blocks.other.nbytes + self.blocks.kind.nbytes
        return sum(b.nbytes for b in self.batches) + sum(t.numel() * t.element_size() for t in tables) + arrays


_KEPT: OrderedDict[Any, Plan] = OrderedDict()
_KEPT_BYTES = 1 << 28


def make_plan(
    pattern: Pattern, q_len: int, kv_len: int, q_start: int, keys: bool = False, layout: BlockLayout | None = None
) -> Plan:
    """The plan of a pattern that tells no heads and no samples apart; with `keys` the anchors are blocks of keys.

    Plans are kept by value of the pattern, the latest used of them, ``_KEPT_BYTES`` in all. A pattern that holds
    tensors has no hash, and is planned anew in each call.
    """
    try:
        key = (pattern, q_len, kv_len, q_start, keys, None if layout is None else layout.block)
        found = _KEPT.get(key)
    except TypeError:
        return _make(pattern, q_len, kv_len, q_start, keys, layout)
    if found is not None:
        _KEPT.move_to_end(key)
        return found
    found = _KEPT[key] = _make(pattern, q_len, kv_len, q_start, keys, layout)
    while len(_KEPT) > 1 and sum(x.nbytes for x in _KEPT.values()) > _KEPT_BYTES:
        _KEPT.popitem(last=False)
    return found


def _make(pattern: Pattern, q_len: int, kv_len: int, q_start: int, keys: bool, layout: BlockLayout | None) -> Plan:
    if layout is None:
        layout, cost = _best_layout(pattern, q_len, kv_len, q_start, keys)
        if isinstance(pattern, Grid) and len(pattern.shape) > 1:
            tiles, tiled_cost = _best_tiles(pattern, keys)
            if tiles is not None and tiled_cost < cost:
                return _tiled(pattern, *tiles, keys)
    blocks = _blocks(layout, pattern, q_start)
    anchor, other = Axis(layout.block[0], q_len), Axis(layout.block[1], kv_len)
    if keys:
        blocks, anchor, other = blocks.flip(), other, anchor
    return Plan(blocks, make_batches(blocks), anchor, other, None, "memory order")


def _tiled(grid: Grid, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], keys: bool) -> Plan:
    tiled = grid.tiled(q_tile, kv_tile)
    # In the layout a tile with padded queries may be full; here padding stands for token 0 and must count for nothing.
    padded = (tiled.q_order.forward < 0).view(-1, prod(q_tile)).any(1)
    layout = replace(tiled.layout, full=tiled.layout.full & ~padded[tiled.layout.rows])
    blocks = _blocks(layout, grid, 0, tiled.mask)
    first, second = tiled.q_order, tiled.kv_order
    if keys:
        blocks, first, second = blocks.flip(), second, first
    anchor, other = (Axis(prod(o.tile), o.n_padded, o.forward.clamp(min=0)) for o in (first, second))
    name = f"tiles of {'x'.join(map(str, first.tile))}"
    return Plan(blocks, make_batches(blocks, views=False), anchor, other, first.inverse, name)


def _blocks(
    layout: BlockLayout, pattern: Pattern, q_start: int, mask: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Blocks:
    """The listed blocks with their kinds, masks of partial blocks included."""
    (bq, bk), partial = layout.block, ~layout.full.numpy()
    rows, cols = layout.rows.numpy(), layout.indices.numpy().astype(np.int64)
    kind = np.full(len(cols), FULL, dtype=np.int64)
    if shifts(pattern) and mask is None:
        offset, which = np.unique((cols * bk - rows * bq)[partial], return_inverse=True)
        tiles, kind[partial] = _shifted(pattern, torch.from_numpy(offset), layout.block, q_start), which
    elif int(partial.sum()) * bq * bk <= PAIRS:
        tiles, numbers = partial_tiles(layout, pattern, q_start, mask)
        kind[partial] = numbers.numpy()
    else:
        tiles, kind[partial] = torch.zeros(0, bq, bk, dtype=torch.bool), OPEN

    def evaluate(i: Tensor, j: Tensor) -> Tensor:
        q = (i[:, None] * bq + torch.arange(bq)).clamp(max=layout.q_len - 1)[:, :, None] + q_start
        k = (j[:, None] * bk + torch.arange(bk)).clamp(max=layout.kv_len - 1)[:, None]
        return pattern.allows(q, k).expand(len(i), bq, bk)

    return Blocks(rows, cols, kind, tiles, (layout.q_len, layout.kv_len), layout.block, mask or evaluate)


def shifts(pattern: Pattern) -> bool:
    """Whether a pair's being allowed depends on ``q - k`` alone, by the pattern's type."""
    if isinstance(pattern, (And, Or)):
        return shifts(pattern.left) and shifts(pattern.right)
    if isinstance(pattern, Not):
        return shifts(pattern.part)
    return type(pattern) in (Full, Causal, Window)


def _shifted(pattern: Pattern, offset: Tensor, block: tuple[int, int], q_start: int) -> Tensor:
    """Masks of blocks whose first key stands ``offset`` after their first query, counted without q_start."""
    first = (offset - q_start).clamp(min=0)  # so that neither index is negative
    q = (first - offset + q_start)[:, None] + torch.arange(block[0])
    k = first[:, None] + torch.arange(block[1])
    return pattern.allows(q[:, :, None], k[:, None]).expand(len(offset), *block)


def _speed(size: float | int | np.ndarray, n: float | int | np.ndarray, keys: bool) -> np.ndarray:
    """Share of its best speed that the kernel reaches on tiles of `size` anchors by `n`.

    It cuts queries by 32 up to 191 of them, by 64 up to 767 and by 256 from there, and the larger products are faster.
    """
    queries, others = (n, size) if keys else (size, n)
    queries, others = np.asarray(queries, dtype=float), np.asarray(others, dtype=float)
    steps = np.where(queries >= 768, 1.0, np.where(queries >= 192, 0.9 if not keys else 0.8, 0.8 if not keys else 0.6))
    return np.asarray(steps * np.minimum(1, queries / 32) * np.minimum(1, 0.6 + others / 480))


def _best_layout(pattern: Pattern, q_len: int, kv_len: int, q_start: int, keys: bool) -> tuple[BlockLayout, float]:
    """The coarsening of the anchor axis that costs least, by the speeds of `_speed`."""
    fine = pattern.layout(q_len, kv_len, BASE, q_start)
    best, least = fine, float("inf")
    for factor in COARSER:
        if factor > 1 and (factor // 2) * BASE >= (kv_len if keys else q_len):
            break
        layout = fine if factor == 1 else fine.coarsen((1, factor) if keys else (factor, 1))
        groups = layout.indices.numpy() if keys else layout.rows.numpy()
        counts = np.bincount(groups) if len(groups) else np.zeros(0)
        n, size = counts[counts > 0] * BASE, BASE * factor
        cost = float((n * (size / _speed(size, n, keys) + COPY)).sum()) + CALL * len(np.unique(n))
        if cost < least * 0.98:
            best, least = layout, cost
    return best, least


def _best_tiles(grid: Grid, keys: bool) -> tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, float]:
    """Tiles of queries and of keys that cost least: pairs over all tiles are a product over the axes."""
    sides = [sorted({s for s in (1, 2, 4, 8, 16, 32, 64) if s <= n} | {n}) for n in grid.shape]
    small = [[s for s in (1, 2, 4) if s <= n] for n in grid.shape]
    met: dict[tuple[int, int, int], tuple[int, int]] = {}

    def axis(d: int, anchor: int, other: int) -> tuple[int, int]:
        """Anchor tiles of an axis, and tokens of the other side that they meet in all."""
        if (d, anchor, other) not in met:
            q, k = (other, anchor) if keys else (anchor, other)
            found = axis_tiles(grid.axes[d], grid.shape[d], q, k)
            tiles = found.kv_tiles if keys else len(found.indptr) - 1
            met[d, anchor, other] = (tiles, len(found.indices) * other)
        return met[d, anchor, other]

    best, least = None, float("inf")
    for other in product(*small):
        if not GRID_KEYS[0] <= prod(other) <= GRID_KEYS[1] and prod(grid.shape) > GRID_KEYS[0]:
            continue
        for anchor in product(*sides):
            size = prod(anchor)
            if not GRID_TILES[0] <= size <= GRID_TILES[1]:
                continue
            each = [axis(d, a, o) for d, (a, o) in enumerate(zip(anchor, other, strict=True))]
            tiles, tokens = prod(e[0] for e in each), prod(e[1] for e in each)
            speed = float(_speed(size, tokens / max(tiles, 1), keys))
            cost = tokens * (size / speed + COPY) + CALL
            if cost < least * 0.999:
                best, least = (anchor, other), cost
    if best is not None and keys:
        best = best[::-1]
    return best, least
