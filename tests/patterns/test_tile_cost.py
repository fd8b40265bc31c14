"""The tile simulator against the paper's table and against counted tiles."""

from math import ceil, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import Blocks, Congruent, Full, Grid, Neighborhood, Same, Window
from regard.patterns.tile_cost import best_strides, best_tiles, end_to_end, tile_cost
from tests.oracles.grids import neighborhood_keys

VIDEO, WINDOW, Q_TILE, KV_TILE = (30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8)
BOUNDS = {
    (1, 1, 1): 3.27,
    (2, 1, 1): 3.60,
    (1, 1, 8): 5.45,
    (2, 1, 8): 6.00,
    (1, 8, 8): 9.09,
    (2, 8, 8): 10.00,
    (16, 8, 8): 11.11,
}


@pytest.mark.parametrize("stride", BOUNDS)
def test_bounds_of_the_paper(stride):
    """HunyuanVideo in the GNA paper: the bound is the busiest tile's."""
    cost = tile_cost(Neighborhood(VIDEO, WINDOW, stride), Q_TILE, KV_TILE)
    assert cost.worst == pytest.approx(BOUNDS[stride], abs=0.005)
    assert cost.flop == pytest.approx(prod(VIDEO) / prod(WINDOW))
    assert cost.full == (stride == (16, 8, 8))
    if stride == (1, 1, 1):
        assert cost.mean == pytest.approx(5.24, abs=0.005)


def test_bounds_of_an_image():
    for stride, bound in (((1, 1), 6.10), ((16, 1), 8.53), ((16, 16), 10.24)):
        cost = tile_cost(Neighborhood((256, 256), 80, stride), 16, (16, 8))
        assert cost.worst == pytest.approx(bound, abs=0.005)
        assert cost.full == (stride == (16, 16))


def test_flat_blocks_gain_nothing_from_a_stride():
    for stride in (1, 16):
        cost = tile_cost(Neighborhood((256, 256), 80, stride), 16, (16, 8), tiling="flat")
        assert cost.worst == pytest.approx(3.20, abs=0.005)


@pytest.mark.parametrize("q_tile", [128, 256])
def test_smallest_stride_without_partial_blocks(q_tile):
    full = [s for s in (1, 64, 127, 128, 129, 192, 255, 256) if _one(s, q_tile).full]
    assert full == [256]


def _one(stride, q_tile):
    return tile_cost(Neighborhood((32768,), 2048, stride), q_tile, 128)


def axis_visits(n, w, s, d, causal, t, u, dynamic):
    """Visits of each query tile, and how many key tiles there are, one group of the dilation after the other."""
    visits, tiles = [], 0
    for residue in range(d):
        own = list(range(residue, n, d))
        place = {k: j for j, k in enumerate(own)}
        tiles += ceil(len(own) / u)
        for a in range(0, len(own), t):
            keys = {place[k] for q in own[a : a + t] for k in neighborhood_keys(q, n, w, s, d, causal)}
            span = max(keys) - min(keys) + 1
            visits.append(ceil(span / u) if dynamic else len({j // u for j in keys}))
    return visits, tiles


@given(st.data(), st.booleans())
def test_visits_are_counted(data, dynamic):
    """worst and mean are products over the axes of the tiles that each query tile meets."""
    axes = data.draw(st.integers(1, 3))
    shape, window, stride, dilation, causal, q_tile, kv_tile, want = [], [], [], [], [], [], [], []
    for _ in range(axes):
        n = data.draw(st.integers(1, 20))
        d = data.draw(st.integers(1, min(2, n)))
        w = data.draw(st.integers(1, n // d))
        of = n, w, data.draw(st.integers(1, w)), d, data.draw(st.booleans())
        sides = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
        want.append(axis_visits(*of, *sides, dynamic))
        for name, value in zip((shape, window, stride, dilation, causal, q_tile, kv_tile), (*of, *sides), strict=True):
            name.append(value)
    grid = Neighborhood(shape, window, stride, dilation, causal)
    cost = tile_cost(grid, q_tile, kv_tile, kv="dynamic" if dynamic else "static")
    every = prod(tiles for _, tiles in want)
    assert cost.worst == pytest.approx(every / prod(max(v) for v, _ in want))
    assert cost.mean == pytest.approx(every / prod(sum(v) / len(v) for v, _ in want))
    assert cost.flop == pytest.approx(1 / grid.density(prod(shape), prod(shape)))
    if not dynamic and not any(n % u for n, u in zip(shape, kv_tile, strict=True)) and dilation == [1] * axes:
        assert cost.full == bool(grid.tiled(q_tile, kv_tile).layout.full.all())


def test_flat_tiles_are_those_of_the_layout():
    grid = Neighborhood((6, 10), (3, 4))
    layout = grid.layout(60, 60, (8, 4))
    cost = tile_cost(grid, (2, 4), (2, 2), tiling="flat")
    assert cost.worst == 15 / int(layout.counts.max())
    assert cost.mean == pytest.approx(15 * 8 / layout.n_blocks)


def test_dynamic_tiles_start_at_the_window():
    """A query tile as wide as the stride sees one window, so dynamic tiles of the window's side are visited once."""
    grid = Neighborhood((32,), 8, 4)
    assert tile_cost(grid, 4, 8).worst == 2
    cost = tile_cost(grid, 4, 8, kv="dynamic")
    assert (cost.worst, cost.full) == (4, True)
    assert not tile_cost(Neighborhood((32,), 8, 2), 4, 8, kv="dynamic").full


def test_strides_that_pay():
    found = best_strides(VIDEO, WINDOW, Q_TILE, KV_TILE)
    strides = [stride for stride, _ in found]
    assert set(strides) >= {(1, 1, 1), (16, 8, 8)}
    assert [cost.worst for _, cost in found] == sorted(cost.worst for _, cost in found)
    assert found[0][0] == (1, 1, 1)
    assert found[-1][1].worst == pytest.approx(11.11, abs=0.005)


@given(st.data())
def test_no_smaller_stride_reaches_a_best_one(data):
    shape = [data.draw(st.integers(4, 9)) for _ in range(2)]
    window = [data.draw(st.integers(2, 4)) for _ in range(2)]
    tiles = data.draw(st.sampled_from([(2, 2), (3, 2), (2, 3)]))
    by = data.draw(st.sampled_from(["worst", "mean"]))
    bound = {
        (s, t): getattr(tile_cost(Neighborhood(shape, window, (s, t)), tiles, tiles), by)
        for s in range(1, window[0] + 1)
        for t in range(1, window[1] + 1)
    }
    want = {
        (s, t)
        for s, t in bound
        if not any(bound[u, v] >= bound[s, t] - 1e-9 for u, v in bound if u <= s and v <= t and (u, v) != (s, t))
    }
    assert {stride for stride, _ in best_strides(shape, window, tiles, tiles, by=by)} == want


@pytest.mark.parametrize(
    ("grid", "want"),
    [
        (Grid([Blocks(7), Blocks(7)], shape=(56, 56)), ((7, 7), (7, 7))),
        (Grid([Congruent(8), Congruent(8)], shape=(56, 56)), ((7, 7), (7, 7))),
        (Grid([Same(), Full()], shape=(64, 128)), ((1, 128), (1, 128))),
    ],
)
def test_best_tiles_of_separate_windows(grid, want):
    """Where groups of tokens never meet others, the best tiles are the groups."""
    assert best_tiles(grid, prod(want[0]), prod(want[0])) == want


def test_best_tiles_compute_the_least():
    grid = Neighborhood((24, 32), (7, 5))
    q_tile, kv_tile = grid.best_tiles(64, 32)
    assert 32 < prod(q_tile) <= 64
    assert 16 < prod(kv_tile) <= 32
    least = grid.tiled(q_tile, kv_tile).layout
    for q, k in (((8, 8), (8, 4)), ((8, 8), (4, 8)), ((4, 16), (4, 8)), ((64 // 32, 32), (1, 32))):
        other = grid.tiled(q, k).layout
        assert least.n_blocks * prod(least.block) <= other.n_blocks * prod(other.block)
    small = Neighborhood((2, 3), (2, 2))
    assert best_tiles(small) == ((2, 3), (2, 3))


def test_end_to_end():
    paper = [1.73, 1.78, 1.98, 2.02, 2.18, 2.20, 2.23]
    got = [end_to_end(tile_cost(Neighborhood(VIDEO, WINDOW, s), Q_TILE, KV_TILE).worst, 0.607) for s in BOUNDS]
    assert got == pytest.approx(paper, abs=0.006)
    assert end_to_end(5.0, 0.0) == 1
    assert end_to_end(5.0, 1.0) == 5


def test_a_table_of_strides_without_pairs():
    """No pair is evaluated: a million tokens cost as much as their axes."""
    cost = tile_cost(Neighborhood((64, 128, 128), (18, 24, 24), (16, 8, 8)), (4, 8, 8), (2, 8, 8))
    assert cost.worst == pytest.approx(32 * 16 * 16 / (10 * 3 * 3))  # [15, 33) touches 10 tiles of 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tile_cost(Neighborhood((4, 4), 2), 2, (2, 2, 2)), "kv_tile must be an integer >= 1 or one for each"),
        (lambda: tile_cost(Neighborhood((4, 4), 2), 2, 2, tiling="flat", kv="dynamic"), "kv must be 'static'"),
        (lambda: best_strides((4, 4), 5, 2, 2), "window \\* dilation must be <= length"),
        (lambda: best_tiles(Neighborhood((4, 4), 2), 0), "q_block must be an integer >= 1"),
        (lambda: end_to_end(0.0, 0.5), "speedup must be > 0"),
        (lambda: end_to_end(2.0, 1.5), "share in"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dynamic_tiles_of_other_axes():
    grid = Grid([Window(2, 1), Full()], shape=(8, 6))
    cost = tile_cost(grid, (2, 3), (2, 4), kv="dynamic")
    assert cost.worst == (4 * 2) / (3 * 2)
    assert torch.isfinite(torch.tensor(cost[:3])).all()
