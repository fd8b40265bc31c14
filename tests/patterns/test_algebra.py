"""Transposes, snapped blocks, other orders, one pattern a head: each against the evaluation of every pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard.patterns as rp
from regard.patterns import Causal, Grid, Neighborhood1d, Pattern, Sinks, Window, per_head, per_sample
from tests.oracles import layout as oracle
from tests.patterns import catalogue
from tests.patterns.test_layout import check

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


class Even(Pattern):
    """A pattern that only knows its pairs; head h adds h to them."""

    @property
    def heads(self):
        return 2

    def allows(self, q_idx, kv_idx, head=None, batch=None):
        return (q_idx + kv_idx + head) % 2 == 0


def bound(pattern):
    """Lengths that a pattern takes at any rate."""
    n = pattern.span or 23
    return (n, n, 0) if catalogue.fits(pattern, n, n, 0) else (0, 0, 0)


@given(catalogue.cases(per_head=True))
def test_transpose(case):
    pattern, *size, block = case
    turned = pattern.transpose()
    size = size if catalogue.fits(turned, *size) else bound(pattern)
    check(turned, *size, block)
    q_len, kv_len, start = size
    for h in range(pattern.heads or 1):
        for b in range(pattern.samples or 1):
            want = oracle.pairs(pattern.of(h, b), kv_len, q_len + start, 0)[:, start:].T
            assert torch.equal(oracle.pairs(turned.of(h, b), *size), want)
            assert torch.equal(turned.of(h, b).row_counts(*size), want.sum(1))


def test_transposes_that_have_a_name():
    assert Causal().transpose() == Causal(future=True)
    assert Window(3, 1).transpose() == Window(1, 3)
    assert (Window(3, 1) & ~Sinks(2)).transpose() == Window(1, 3) & ~rp.Queries(((0, 2),))
    assert per_head([Causal(), Window(1)]).transpose() == per_head([Causal(True), Window(0, 1)])
    grid = Grid([Causal(), rp.Same()], (3, 4))
    assert grid.transpose() == Grid([Causal(True), rp.Same()], (3, 4))
    odd = Grid([Neighborhood1d(5, 2), rp.Same()], (5, 4))
    assert odd.transpose().transpose() == odd


@given(catalogue.cases(), st.tuples(*[st.integers(1, 9)] * 2), st.sampled_from([0, 0.25, 0.7]))
def test_snap(case, block, min_fill):
    pattern, *size, layout_block = case
    snapped = pattern.snap(block, min_fill)
    check(snapped, *size, layout_block)
    (bq, bk), (q_len, kv_len, start) = block, size
    end = pattern.span or 10**6  # what exists of the last blocks
    n_q, n_k = min(-(-(start + q_len) // bq) * bq, end), min(-(-kv_len // bk) * bk, end)
    allowed = oracle.pairs(pattern, n_q, n_k, 0)
    want = torch.zeros_like(allowed)
    for i in range(0, n_q, bq):
        for j in range(0, n_k, bk):
            want[i : i + bq, j : j + bk] = allowed[i : i + bq, j : j + bk].double().mean() > min_fill
    want = want[start : start + q_len, :kv_len]
    assert torch.equal(oracle.pairs(snapped, *size), want)
    assert torch.equal(snapped.row_counts(*size), want.sum(1))


def test_snapped_blocks_are_all_full():
    layout = (Window(300) | Sinks(5)).snap(64).layout(1024, 1024, 64)
    assert layout.full.all()
    assert torch.equal(layout.indices, (Window(300) | Sinks(5)).layout(1024, 1024, 64).indices)
    heads = per_head([Causal(), Window(9)]).snap(16, 0.5)
    check(heads, 40, 40, 0, 8)


@given(st.data())
def test_permute(data):
    n = data.draw(st.integers(1, 30))
    pattern = data.draw(catalogue.leaf(n))
    if not catalogue.fits(pattern, n, n, 0) or pattern.span not in (None, n):
        pattern = Causal()
    forward = data.draw(st.permutations(list(range(n)) + [-1] * data.draw(st.integers(0, 3))))
    moved = pattern.permute(forward)
    m = len(forward)
    check(moved, m, m, 0, data.draw(st.integers(1, 9)))
    want = torch.zeros(m, m, dtype=torch.bool)
    here = [p for p in range(m) if forward[p] >= 0]
    tokens = [forward[p] for p in here]
    want[torch.tensor(here)[:, None], torch.tensor(here)] = oracle.pairs(pattern, n, n, 0)[tokens][:, tokens]
    assert torch.equal(oracle.pairs(moved, m, m, 0), want)
    assert not moved.closed_form


@pytest.mark.parametrize("dilation", [1, 2])
def test_orders_with_a_closed_form(dilation):
    grid = rp.Neighborhood((9, 10), (3, 4), dilation=dilation)
    order = rp.TileOrder(grid.shape, (4, 3), (dilation, dilation))
    moved = grid.permute(order)
    assert moved.closed_form
    check(moved, order.n_padded, order.n_padded, 0, 12)  # blocks of a tile: a product
    check(moved, order.n_padded, order.n_padded, 0, 7)  # other blocks are evaluated
    rings = rp.Rings(6, 7).permute(rp.RingOrder(6, 7))
    assert isinstance(rings, rp.StepCausal)
    forward = rp.RingOrder(6, 7).forward
    assert torch.equal(oracle.pairs(rings, 42, 42), oracle.pairs(rp.Rings(6, 7), 42, 42)[forward][:, forward])


def test_heads_and_samples():
    pattern = per_sample([per_head([Causal(), Window(2)]), per_head([Window(1), Sinks(1)])]) & ~Sinks(1)
    assert (pattern.heads, pattern.samples) == (2, 2)
    layout = check(pattern, 9, 9, 0, 4)
    assert (layout.heads, layout.samples) == (2, 2)
    assert pattern.of(1, 0) == Window(2) & ~Sinks(1)
    assert pattern.flops(9, 9, 4, 6) == 2 * 10 * sum(
        int(pattern.of(h, b).row_counts(9, 9).sum()) for h in (0, 1) for b in (0, 1)
    )
    assert per_head([Causal(), ~Causal()]).density(8, 8) == 0.5
    check(Even() & Causal(), 9, 12, 1, (4, 3))
    assert Even().of(1).row_counts(2, 3).tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"row_counts\(\) takes a pattern alike for all heads"):
        pattern.row_counts(9, 9)
    with pytest.raises(ValueError, match="the same number of heads apart, got \\[2, 3\\]"):
        per_head([Causal()] * 2) & per_head([Causal()] * 3)
    with pytest.raises(ValueError, match="each of patterns must be alike for all heads"):
        per_head([per_head([Causal()])])
    with pytest.raises(ValueError, match="at least one Pattern"):
        per_head([])
    with pytest.raises(ValueError, match="head must be given: this pattern differs between heads"):
        per_head([Causal()]).allows(torch.tensor(0), torch.tensor(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Causal().snap(0), "block must be an integer >= 1 or a pair"),
        (lambda: Causal().snap(8, 1.0), r"min_fill must lie in \[0, 1\), got 1.0"),
        (lambda: Causal().permute([0, 2]), "order must hold each index from 0 to n - 1 once"),
        (lambda: rp.Rings(2, 2).permute([0, 1]), "order must be of the pattern's 4 positions, got one of 2"),
        (lambda: Causal().permute([1, 0]).layout(3, 3, 2), "the order has 2 positions"),
        (lambda: Causal().layout(4, 4, (2, 0)), "block must be an integer >= 1 or a pair"),
        (lambda: rp.Rings(2, 2).layout(5, 5, 2), "kv_len must be 4"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()
