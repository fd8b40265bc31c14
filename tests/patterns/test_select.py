"""Selects against loops over rows, with ties; blocks pooled by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import HilbertOrder, above, mass, pool_blocks, ratio, three_way, topk
from regard.patterns.select import best, checked, join_rows, pieces, to_index

LEVELS = (-math.inf, -1.0, 0.0, 0.5, 0.5, 2.0)
rows = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from(LEVELS), min_size=n, max_size=n), min_size=1, max_size=4)
)


def ranked(row):
    """Candidates, best first; ties to the lower index."""
    return sorted((j for j, s in enumerate(row) if s > -math.inf), key=lambda j: (-row[j], j))


def by_hand(select, row):
    best = ranked(row)
    n = len(best)
    match select:
        case topk():
            return best[: select.k]
        case ratio():
            return best[: max(1, math.floor(select.r * n + 1e-9))]
        case above():
            return [j for j in best if row[j] > select.t]
        case mass():
            weights = [math.exp(row[j]) for j in best]
            summed, k = 0.0, 1
            for w in weights:
                summed += w / sum(weights)
                k += summed <= select.p
            return best[: max(k, select.at_least)]
        case three_way():
            high = max(1, math.floor(select.kh * n + 1e-9))
            low = min(math.floor(select.kl * n + 1e-9), max(n - high, 0))
            return {1: best[:high], 0: best[high : n - low], -1: best[max(n - low, high) :]}[select.part]


SELECTS = st.one_of(
    st.builds(topk, st.integers(1, 10)),
    st.builds(ratio, st.sampled_from([0, 0.1, 0.3, 0.5, 1])),
    st.builds(above, st.sampled_from([-2, 0.0, 0.5, 3])),
    st.builds(mass, st.sampled_from([0, 0.31, 0.7, 1.0]), st.integers(1, 3)),
    st.builds(three_way, st.sampled_from([0.05, 0.3]), st.sampled_from([0, 0.1, 0.6]), st.sampled_from([1, 0, -1])),
)


@given(rows, SELECTS)
def test_against_loops(scores, select):
    index, count = select(torch.tensor(scores, dtype=torch.float64))
    want = [sorted(by_hand(select, row)) for row in scores]
    assert count.tolist() == [len(row) for row in want]
    assert [row[:n] for row, n in zip(index.tolist(), count.tolist(), strict=True)] == want
    assert (index[torch.arange(index.shape[1]) >= count[:, None]] == -1).all()
    assert index.dtype == count.dtype == torch.int32
    assert index.shape[1] == max(map(len, want))


@given(rows)
def test_three_classes_are_all_candidates(scores):
    select = three_way(0.3, 0.4)
    x = torch.tensor(scores)
    classes = select.classes(x)
    assert torch.equal(classes == -2, x == -math.inf)
    for part, chosen in ((1, select), (0, select.marginal), (-1, select.negligible)):
        assert torch.equal(chosen.mask(x), classes == part)


def test_leading_axes_and_gradients():
    scores = torch.randn(2, 3, 4, 7, requires_grad=True)
    index, count = topk(3)(scores)
    assert index.shape == (2, 3, 4, 3)
    assert count.shape == (2, 3, 4)
    assert not index.requires_grad
    nothing, none = topk(3)(torch.full((2, 5), -math.inf))
    assert nothing.shape == (2, 0)
    assert none.tolist() == [0, 0]


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"scores must be numbers.*got NaN at \[0, 1\]"):
        topk(1)(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match=r"got \+inf at \[1\]"):
        above(0)(torch.tensor([0.0, torch.inf]))
    for make in (lambda: topk(0), lambda: topk(True), lambda: ratio(1.5), lambda: mass(-0.1), lambda: mass(0.5, 0)):
        with pytest.raises(ValueError, match="must"):
            make()
    with pytest.raises(ValueError, match="part must be 1"):
        three_way(0.1, 0.1, 2)


def test_infinite_scores_take_part_only_where_they_are_not_checked():
    scores = torch.tensor([[0.0, torch.inf, -torch.inf, 2.0]])
    with pytest.raises(ValueError, match=r"got \+inf at \[0, 1\]"):
        checked(scores)
    with pytest.raises(ValueError, match="got NaN"):
        checked(torch.tensor([torch.nan, torch.inf]))
    assert best(scores, 2).tolist() == [[False, True, False, True]]
    assert best(scores, 3).tolist() == [[True, True, False, True]]
    assert best(scores[:, 2:3], 1).tolist() == [[False]]


def test_pieces_cover_all_rows_and_join_again():
    assert [(s.start, s.stop) for s in pieces(10, 1 << 18)] == [(0, 4), (4, 8), (8, 10)]
    assert [(s.start, s.stop) for s in pieces(3, 1 << 21)] == [(0, 1), (1, 2), (2, 3)]
    index = torch.arange(12).view(2, 3, 2)
    joined = join_rows([index[:, :1, :1], index[:, 1:]])
    assert joined.tolist() == [[[0, -1], [2, 3], [4, 5]], [[6, -1], [8, 9], [10, 11]]]


def test_to_index():
    index, count = to_index(torch.tensor([[True, False, True], [False, False, False]]))
    assert index.tolist() == [[0, 2], [-1, -1]]
    assert count.tolist() == [2, 0]


@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_pool_blocks(length, size, dtype):
    g = torch.Generator().manual_seed(length)
    x = torch.randn(2, 3, length, 4, generator=g).to(dtype)
    found = pool_blocks(x, size)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.stack([part.double().mean(2) for part in x.split(size, 2)], 2)
    assert torch.allclose(found.double(), want, atol=1e-6)


def test_pool_blocks_of_an_order():
    order = HilbertOrder((3, 5), prefix=2, block=4)
    x = torch.randn(1, 2, 17, 3)
    found = pool_blocks(x, 4, order=order)
    for n, block in enumerate(order.forward.view(-1, 4).tolist()):
        own = [t for t in block if t >= 0]
        want = x[:, :, own].mean(2) if own else torch.zeros(1, 2, 3)
        assert torch.allclose(found[:, :, n], want, atol=1e-6)
    with pytest.raises(ValueError, match="size must be an integer >= 1"):
        pool_blocks(x, 0)
