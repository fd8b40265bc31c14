"""Grids: pairs, runs and tile layouts against the definitions, over random shapes, windows, strides and dilations."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import (
    Causal,
    Congruent,
    Full,
    Grid,
    Neighborhood,
    Neighborhood1d,
    Same,
    Segments,
    TileOrder,
    Window,
)
from tests.oracles.grids import blocks, grid_mask, neighborhood_keys


@st.composite
def neighborhood_axis(draw, n):
    dilation = draw(st.integers(1, min(3, n)))
    window = draw(st.integers(1, n // dilation))
    stride, causal = draw(st.integers(1, window)), draw(st.booleans())
    axis = Neighborhood1d(n, window, stride, dilation, causal)
    return axis, lambda q, k: k in neighborhood_keys(q, n, window, stride, dilation, causal)


@st.composite
def any_axis(draw, n):
    kind = draw(st.sampled_from(["near", "near", "same", "congruent", "full", "causal", "window", "segments"]))
    if kind == "near":
        return draw(neighborhood_axis(n))
    if kind == "congruent":
        m = draw(st.integers(1, n + 1))
        return Congruent(m), lambda q, k: q % m == k % m
    if kind == "window":
        a, b = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        return Window(a, b), lambda q, k: q - a <= k <= q + b
    if kind == "segments":
        ids = tuple(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
        return Segments(ids), lambda q, k: ids[q] == ids[k]
    return {
        "same": (Same(), lambda q, k: q == k),
        "full": (Full(), lambda q, k: True),
        "causal": (Causal(), lambda q, k: k <= q),
    }[kind]


@st.composite
def grids(draw, axis=any_axis):
    shape = draw(st.sampled_from([(13,), (24,), (5, 7), (4, 9), (6, 6), (3, 4, 5), (2, 3, 3, 2), (1, 8), (7, 1)]))
    drawn = [draw(axis(n)) for n in shape]
    return Grid(tuple(a for a, _ in drawn), shape), grid_mask([rule for _, rule in drawn], shape)


@given(grids())
def test_pairs_and_counts(case):
    grid, want = case
    n = prod(grid.shape)
    i = torch.arange(n)
    assert torch.equal(grid.allows(i[:, None], i[None]), want)
    assert torch.equal(grid.row_counts(n, n), want.sum(1))
    assert grid.density(n, n) == pytest.approx(want.float().mean().item())


@given(grids(), st.data())
def test_runs_of_the_memory_order_are_exact(case, data):
    grid, want = case
    n = prod(grid.shape)
    edges = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=8))) if n > 1 else []
    q0, q1 = torch.tensor([0, *edges]), torch.tensor([*edges, n])
    rows = grid.rows(q0, q1, n)
    assert rows.exact == (True, True)
    for r, (a, b) in enumerate(zip(q0.tolist(), q1.tolist(), strict=True)):
        for got, true in ((rows.any[r], want[a:b].any(0)), (rows.all[r], want[a:b].all(0))):
            keys = torch.zeros(n, dtype=torch.bool)
            for lo, hi in got.tolist():
                keys[lo:hi] = True
            assert torch.equal(keys, true), (a, b)
            ends = got[got[:, 0] < got[:, 1]].flatten()
            assert (ends[1:] > ends[:-1]).all()


@given(grids(), st.data())
def test_layout_in_memory_order(case, data):
    grid, want = case
    n = len(want)
    block = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    some, every = grid.layout(n, n, block).dense()
    true_some, true_every = blocks(want, *block)
    assert torch.equal(some.view_as(true_some), true_some)
    assert torch.equal(every.view_as(true_every), true_every)


@given(grids(), st.data())
def test_layout_in_tile_order(case, data):
    """Listed and full blocks, the mask of every block, and the predicate, where padding is never a key."""
    grid, want = case
    q_tile, kv_tile = ([data.draw(st.integers(1, n + 1)) for n in grid.shape] for _ in range(2))
    tiled = grid.tiled(q_tile, kv_tile)
    q, k = tiled.q_order.forward, tiled.kv_order.forward
    mask = want[q.clamp(min=0)][:, k.clamp(min=0)] & (k >= 0)
    real = mask & (q >= 0)[:, None]
    pos_q, pos_k = torch.arange(len(q)), torch.arange(len(k))
    assert torch.equal(tiled.allows(pos_q[:, None], pos_k[None]), real)
    bq, bk = prod(q_tile), prod(kv_tile)
    assert tiled.layout.block == (bq, bk)
    assert (tiled.layout.q_len, tiled.layout.kv_len) == (len(q), len(k))
    some, every = (x.view(len(q) // bq, len(k) // bk) for x in tiled.layout.dense())
    assert torch.equal(some, blocks(real, bq, bk)[0])
    assert torch.equal(every, blocks(mask | (q < 0)[:, None], bq, bk)[1] & some)
    i, j = some.nonzero().unbind(1)
    tiles = real.view(len(q) // bq, bq, len(k) // bk, bk)[i, :, j]
    assert torch.equal(tiled.mask(i, j), tiles)


@given(st.data())
def test_orders_are_permutations_with_padding(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tile = tuple(data.draw(st.integers(1, 4)) for _ in shape)
    groups = tuple(data.draw(st.integers(1, 3)) for _ in shape)
    order = TileOrder(shape, tile, groups)
    assert sorted(order.forward[order.forward >= 0].tolist()) == list(range(order.n))
    assert order.n_padded == prod(order.tiles) * prod(tile)
    x = torch.randn(2, order.n, 3)
    y = order.apply(x)
    assert y.shape == (2, order.n_padded, 3)
    assert torch.equal(order.undo(y), x)
    assert torch.equal(order.apply(x.mT, dim=-1), y.mT)
    assert not y[:, order.forward < 0].any()
    # every tile is a box: along each axis, one residue, consecutive steps of it
    cells = torch.stack(torch.unravel_index(order.forward.clamp(min=0), shape), -1).view(-1, prod(tile), len(shape))
    there = (order.forward >= 0).view(-1, prod(tile))
    for cell, real in zip(cells, there, strict=True):
        for d, g in enumerate(groups):
            along = cell[real][:, d].unique()
            if len(along):
                assert (along % g).unique().numel() == 1
                assert along[-1] - along[0] <= (tile[d] - 1) * g


def test_a_tile_order_written_out():
    order = TileOrder((2, 4), (2, 2))
    assert order.forward.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order.inverse.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert TileOrder((3,), 2).forward.tolist() == [0, 1, 2, -1]
    assert TileOrder((6,), 3, 2).forward.tolist() == [0, 2, 4, 1, 3, 5]


def test_named_grids():
    """A window as large as the grid is dense; stride = window are blocks; the grid attention of MaxViT is congruent."""
    n = 24
    i = torch.arange(n)
    assert Neighborhood((4, 6), (4, 6)).allows(i[:, None], i[None]).all()
    blocked = Neighborhood((4, 6), (2, 3), stride=(2, 3))
    ids = [(p // 6 // 2) * 2 + p % 6 // 3 for p in range(n)]
    assert torch.equal(blocked.allows(i[:, None], i[None]), Segments(tuple(ids)).allows(i[:, None], i[None]))
    assert Neighborhood((4, 6), 3).row_counts(n, n).tolist() == [9] * n
    assert Neighborhood((4, 6), 2) == Neighborhood((4, 6), (2, 2), (1, 1), 1, (False, False))
    assert hash(Neighborhood((4, 6), 2)) == hash(Neighborhood((4, 6), (2, 2)))
    assert Neighborhood((4, 6), 2) != Neighborhood((4, 6), 3)
    even = Neighborhood((8,), 4).allows(torch.tensor([[4]]), torch.arange(8)[None])
    assert even.nonzero()[:, 1].tolist() == [2, 3, 4, 5]  # the extra key is on the left
    grid = Grid([Congruent(2), Congruent(3)], shape=(4, 6)).tiled((2, 2))
    assert grid.layout.full.all()
    assert torch.equal(grid.layout.indices, torch.arange(6))  # every group is one dense tile


def test_a_million_tokens_in_tile_order():
    shape, window, tile = (64, 128, 128), (5, 9, 9), (4, 4, 8)
    layout = Neighborhood(shape, window).tiled(tile).layout
    listed = 1
    for n, w, t in zip(shape, window, tile, strict=True):
        near = [{k // t for q in range(a, a + t) for k in neighborhood_keys(q, n, w)} for a in range(0, n, t)]
        listed *= sum(map(len, near))
    assert len(layout.indptr) == 8193
    assert layout.n_blocks == listed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighborhood((4, 4), 5), r"axis 0 of shape \(4, 4\): window \* dilation must be <= length"),
        (lambda: Neighborhood((4, 8), (3, 3), dilation=(1, 3)), "axis 1 .* window=3, dilation=3"),
        (lambda: Neighborhood((4, 4), -1), "window must be an integer >= 1"),
        (lambda: Neighborhood((4, 4), (3, 3, 3)), "one for each of the 2 axes"),
        (lambda: Neighborhood((4, 4), 3, stride=4), "stride must be an integer from 1 to window=3, got 4"),
        (lambda: Neighborhood((4, 4), 3, causal=(True,)), "causal must be a bool or one for each of the 2 axes"),
        (lambda: Neighborhood1d(0, 1), "length must be an integer >= 1"),
        (lambda: Neighborhood1d(4, 2).row_counts(3, 4, 1), "needs q_len = kv_len = 4"),
        (lambda: Congruent(0), "period must be an integer >= 1"),
        (lambda: Grid([Same(), Full()]), "shape must be given: Same"),
        (lambda: Grid([Same(), Neighborhood1d(5, 2)], shape=(3, 4)), "must agree with the axes' own lengths"),
        (lambda: Grid([]), "axes must be one or more patterns"),
        (lambda: Grid([Same()], shape=(3, 4)), "one for each of the 1 axes"),
        (lambda: Neighborhood((4, 4), 3).row_counts(8, 16), "needs q_len = kv_len = 16 and q_start = 0"),
        (lambda: Neighborhood((4, 4), 3).tiled((2, 2, 2)), "q_tile must be an integer >= 1 or one for each"),
        (lambda: Neighborhood((4, 4), 3).tiled((2, 2), 0), "kv_tile must be an integer >= 1"),
        (lambda: TileOrder((4, 4), 2).apply(torch.ones(15, 2)), "x must have 16 entries along dim -2"),
        (lambda: TileOrder((3, 4), 2).undo(torch.ones(12, 2)), "y must have 16 entries along dim -2"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()
