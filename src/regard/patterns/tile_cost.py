"""What a grid's tiles cost: how many key tiles a kernel visits, which strides pay, which tiles are best.

The simulator of GNA (arXiv 2504.16922), in closed form: the visits of a query tile are a product over the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil, prod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns.axes import Neighborhood1d
from regard.patterns.boxes import axis_rows
from regard.patterns.grid import Grid, Neighborhood
from regard.patterns.order import per_axis
from regard.patterns.pattern import Pattern
from regard.patterns.tiled import AxisTiles, axis_groups, axis_tiles

__all__ = ["TileCost", "best_strides", "best_tiles", "end_to_end", "tile_cost"]

Sides = int | Sequence[int]


class TileCost(NamedTuple):
    """Upper bounds of the speedup over dense attention, all >= 1 but for padding.

    flop: all pairs over allowed pairs.
    worst: key tiles over those that the busiest query tile visits (the figure of the GNA paper).
    mean: key tiles over those visited in the mean (what the throughput of many tiles follows).
    full: no visited tile needs a mask, judged on the keys that exist.
    """

    flop: float
    worst: float
    mean: float
    full: bool


def tile_cost(
    grid: Grid,
    q_tile: Sides,
    kv_tile: Sides,
    tiling: Literal["tiles", "flat"] = "tiles",
    kv: Literal["static", "dynamic"] = "static",
) -> TileCost:
    """The bounds that tiling sets to the speedup of a grid pattern over dense attention.

    A query tile ``[a, b)`` of an axis visits ``(hi(b-1) - 1)//t - lo(a)//t + 1`` key tiles of side t, and
    the product of that over the axes. With ``kv="dynamic"`` key tiles start at ``lo(a)``, and it visits
    ``ceil((hi(b-1) - lo(a)) / t)``.

    Args:
        grid: the pattern.
        q_tile, kv_tile: tile sides, one an axis or one for all; with ``tiling="flat"`` only their products matter.
        tiling: "tiles" are n-D boxes of the tile order; "flat" are runs of the row-major memory order.
        kv: where key tiles start; "dynamic" needs ``tiling="tiles"``.

    Raises:
        ValueError: an unknown tiling or kv, sides that do not fit the axes, flat dynamic tiles.
    """
    axes, n = len(grid.axes), prod(grid.shape)
    q_sides, kv_sides = per_axis("q_tile", q_tile, axes), per_axis("kv_tile", kv_tile, axes)
    if tiling not in ("tiles", "flat") or kv not in ("static", "dynamic"):
        raise ValueError(f"tiling must be 'tiles' or 'flat' and kv 'static' or 'dynamic', got {tiling!r} and {kv!r}")
    flop = 1 / grid.density(n, n)
    if tiling == "flat":
        if kv == "dynamic":
            raise ValueError("kv must be 'static' with tiling='flat', got 'dynamic'")
        layout = grid.layout(n, n, (prod(q_sides), prod(kv_sides)), 0)
        visits, every, full = layout.counts, layout.n_kv_blocks, bool(layout.full.all())
        return TileCost(flop, every / int(visits.max()), every / visits.double().mean().item(), full)
    count = _dynamic if kv == "dynamic" else _static
    each = [count(*of) for of in zip(grid.axes, grid.shape, q_sides, kv_sides, strict=True)]
    every = prod(tiles for _, tiles, _ in each)
    worst, mean = (prod(f(visits) for visits, _, _ in each) for f in (lambda v: int(v.max()), _mean))
    return TileCost(flop, every / worst, every / mean, all(full for _, _, full in each))


def _mean(visits: Tensor) -> float:
    return visits.double().mean().item()


def _static(axis: Pattern, length: int, q_side: int, kv_side: int) -> tuple[Int[Tensor, "q_tiles"], int, bool]:
    """Visits of each query tile of an axis, how many key tiles there are, and whether all visited are full."""
    tiles = axis_tiles(axis, length, q_side, kv_side, padding=False)
    return tiles.indptr.diff(), tiles.kv_tiles, bool(tiles.full.all())


def _dynamic(axis: Pattern, length: int, q_side: int, kv_side: int) -> tuple[Int[Tensor, "q_tiles"], int, bool]:
    visits, tiles, full = [], 0, True
    for inner, n in axis_groups(axis, length):
        first = torch.arange(0, n, q_side)
        rows = axis_rows(inner, first, (first + q_side).clamp(max=n), n)
        if rows is None or not rows.exact[0]:
            raise ValueError(f"kv='dynamic' needs axes whose keys are known as intervals, got {inner!r}")
        size = rows.any[..., 1] - rows.any[..., 0]
        visits.append((-(-size // kv_side)).sum(1))
        tiles += -(-n // kv_side)
        even = (size % kv_side == 0) | (rows.any[..., 1] == n)
        same = rows.any.shape == rows.all.shape and torch.equal(rows.any, rows.all)
        full = full and same and bool(even.all())
    return torch.cat(visits), tiles, full


def best_strides(
    shape: Sequence[int],
    window: Sides,
    q_tile: Sides,
    kv_tile: Sides,
    *,
    dilation: Sides = 1,
    causal: bool | Sequence[bool] = False,
    by: Literal["worst", "mean"] = "worst",
    kv: Literal["static", "dynamic"] = "static",
) -> list[tuple[tuple[int, ...], TileCost]]:
    """The strides of a neighborhood that pay: those whose bound no smaller stride reaches.

    A larger stride is coarser (queries share windows), so it is worth its quality only where it visits fewer tiles
    than every stride that is smaller or equal along all axes. Visits being a product over the axes, these are the
    products of each axis's own record strides.

    Args:
        shape, window, dilation, causal: as `Neighborhood`.
        q_tile, kv_tile, kv: as `tile_cost`.
        by: the bound to compare, of the busiest tile or of the mean one.

    Returns:
        (stride, its cost), by ascending bound.
    """
    if by not in ("worst", "mean"):
        raise ValueError(f"by must be 'worst' or 'mean', got {by!r}")
    plain = Neighborhood(shape, window, 1, dilation, causal)  # checks the arguments
    count, figure = _dynamic if kv == "dynamic" else _static, (lambda v: int(v.max())) if by == "worst" else _mean
    n = len(plain.shape)
    q_sides, kv_sides = per_axis("q_tile", q_tile, n), per_axis("kv_tile", kv_tile, n)
    records: list[list[int]] = []
    for d, (length, w) in enumerate(zip(plain.shape, plain.window, strict=True)):
        least, good = float("inf"), list[int]()
        for stride in range(1, w + 1):
            axis = Neighborhood1d(length, w, stride, plain.dilation[d], plain.causal[d])
            visits = figure(count(axis, length, q_sides[d], kv_sides[d])[0])
            if visits < least:
                least = visits
                good.append(stride)
        records.append(good)
    found = []
    for strides in product(*records):
        grid = Neighborhood(plain.shape, plain.window, strides, plain.dilation, plain.causal)
        found.append((strides, tile_cost(grid, q_sides, kv_sides, kv=kv)))
    return sorted(found, key=lambda of: (getattr(of[1], by), of[0]))


def best_tiles(
    grid: Grid, q_block: int = 128, kv_block: int = 128, overhead: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tile sides of queries and keys that compute the fewest pairs, padding included.

    Tries every product of powers of two and of divisors of the axes that lies in (block / 2, block]. The cost is
    ``visited blocks * (bq * bk + overhead)``; among equals the one with the most full blocks, then the largest tiles.

    Args:
        grid: the pattern.
        q_block, kv_block: the most tokens of a tile.
        overhead: what a visited block costs beside its pairs, in pairs.

    Returns:
        (q_tile, kv_tile).
    """
    lengths = [ceil(n / getattr(axis, "groups", 1)) for axis, n in zip(grid.axes, grid.shape, strict=True)]
    q_tiles, kv_tiles = _candidates("q_block", lengths, q_block), _candidates("kv_block", lengths, kv_block)
    table = [
        {
            (t, u): _size(axis_tiles(axis, n, t, u))
            for t in {tile[d] for tile in q_tiles}
            for u in {tile[d] for tile in kv_tiles}
        }
        for d, (axis, n) in enumerate(zip(grid.axes, grid.shape, strict=True))
    ]

    def cost(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, int, int]:
        q_tile, kv_tile = pair
        sizes = [axis[t, u] for axis, t, u in zip(table, q_tile, kv_tile, strict=True)]
        blocks, full = prod(s[0] for s in sizes), prod(s[1] for s in sizes)
        area = prod(q_tile) * prod(kv_tile)
        return blocks * (area + overhead), -full * area, -area

    return min(product(q_tiles, kv_tiles), key=cost)


def _size(tiles: AxisTiles) -> tuple[int, int]:
    return len(tiles.indices), int(tiles.full.sum())


def _candidates(name: str, lengths: list[int], block: int) -> list[tuple[int, ...]]:
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {block!r}")
    sides = [
        sorted({t for t in range(1, n + 1) if n % t == 0 or t & (t - 1) == 0 if t <= block} | {min(n, block)})
        for n in lengths
    ]
    found = [tile for tile in product(*sides) if prod(tile) <= block]
    most = max(prod(tile) for tile in found)
    return [tile for tile in found if 2 * prod(tile) > most]


def end_to_end(speedup: float, share: float) -> float:
    """Speedup of a whole model whose attention, `share` of its time, runs `speedup` times as fast (Amdahl's law).

    ``1 / (1 - share + share / speedup)``.
    """
    if not speedup > 0 or not 0 <= share <= 1:
        raise ValueError(f"speedup must be > 0 and share in [0, 1], got {speedup} and {share}")
    return 1 / (1 - share + share / speedup)
