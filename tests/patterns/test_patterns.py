"""Patterns against their definitions, pair by pair, and their rows against the pairs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import Causal, Columns, Diagonals, Full, Pattern, Segments, Sinks, Window

LENGTH = 40
IDS = tuple((p // 3) % 5 for p in range(LENGTH))


def small(low=0, high=12):
    return st.integers(low, high)


# Each strategy gives a pattern and, independently of it, the plain definition of its pairs.
SIMPLE = st.one_of(
    st.just((Full(), lambda q, k: True)),
    st.just((Causal(), lambda q, k: k <= q)),
    st.just((Causal(future=True), lambda q, k: k >= q)),
    st.builds(lambda a, b: (Window(a, b), lambda q, k: q - a <= k <= q + b), small(), small()),
    st.builds(lambda n: (Sinks(n), lambda q, k: k < n), small(1)),
    st.builds(
        lambda a, b, c: (Columns(((a, a + b), (c, c + 2))), lambda q, k: a <= k < a + b or c <= k < c + 2),
        small(),
        small(1),
        small(),
    ),
    st.builds(
        lambda p, w, causal: (
            Diagonals(p, w, causal),
            lambda q, k: any(abs(q - k - m * p) <= w for m in range(-60, 61)) and (k <= q or not causal),
        ),
        small(1),
        small(0, 5),
        st.booleans(),
    ),
    st.just((Segments(IDS), lambda q, k: IDS[q] == IDS[k])),
)
ANY = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda a, b: (a[0] & b[0], lambda q, k: a[1](q, k) and b[1](q, k)), inner, inner),
        st.builds(lambda a, b: (a[0] | b[0], lambda q, k: a[1](q, k) or b[1](q, k)), inner, inner),
        st.builds(lambda a: (~a[0], lambda q, k: not a[1](q, k)), inner),
    ),
    max_leaves=4,
)


def pairs(rule, q_len, kv_len, start):
    return torch.tensor([[rule(i, j) for j in range(kv_len)] for i in range(start, start + q_len)]).view(q_len, kv_len)


@st.composite
def sizes(draw):
    kv_len = draw(st.integers(1, LENGTH))
    q_len = draw(st.integers(1, LENGTH))
    start = draw(st.integers(0, LENGTH - q_len))
    return q_len, kv_len, start


@given(ANY, sizes())
def test_allows_counts_and_density(case, size):
    pattern, rule = case
    q_len, kv_len, start = size
    want = pairs(rule, q_len, kv_len, start)
    i, j = torch.arange(start, start + q_len)[:, None], torch.arange(kv_len)[None]
    assert torch.equal(pattern.allows(i, j).expand(q_len, kv_len), want)
    assert torch.equal(pattern.row_counts(q_len, kv_len, start), want.sum(1))
    assert pattern.density(q_len, kv_len, start) == pytest.approx(want.float().mean().item())
    lines = str(pattern.show(q_len, kv_len, start)).split("\n")
    assert [[c == "█" for c in line] for line in lines] == want.tolist()


@given(ANY, sizes(), st.integers(1, 9))
def test_rows_of_runs(case, size, step):
    """`any` and `all` of runs of several queries: exact where they say so, and safe bounds otherwise."""
    pattern, rule = case
    q_len, kv_len, start = size
    want = pairs(rule, q_len, kv_len, start)
    end = start + q_len
    edges = sorted({*range(start, end, step), end, *pattern.cuts(start, end).tolist()})
    q0, q1 = torch.tensor(edges[:-1]), torch.tensor(edges[1:])
    rows = pattern.rows(q0, q1, kv_len)
    for n, (a, b) in enumerate(pairwise(edges)):
        some = torch.zeros(kv_len, dtype=torch.bool)
        every = some.clone()
        for lo, hi in rows.any[n].tolist():
            some[lo:hi] = True
        for lo, hi in rows.all[n].tolist():
            every[lo:hi] = True
        true_some, true_every = want[a - start : b - start].any(0), want[a - start : b - start].all(0)
        assert torch.equal(some, true_some) if rows.exact[0] else not (true_some & ~some).any()
        assert torch.equal(every, true_every) if rows.exact[1] else not (every & ~true_every).any()
        ends = rows.any[n][rows.any[n, :, 0] < rows.any[n, :, 1]].flatten()
        assert (ends[1:] > ends[:-1]).all(), "intervals must be sorted, disjoint and merged where they abut"


def test_a_pattern_that_only_knows_its_pairs():
    class Even(Pattern):
        def allows(self, q_idx, kv_idx, head=None, batch=None):
            return (q_idx + kv_idx) % 2 == 0

    assert Even().row_counts(5, 8).tolist() == [4] * 5
    assert (Even() & Causal()).row_counts(5, 5).tolist() == [1, 1, 2, 2, 3]
    assert (~Even()).rows(torch.tensor([0]), torch.tensor([1]), 4) is None


def test_values():
    assert Window(3) == Window(3)
    assert hash(Window(3) & Sinks(2)) == hash(Window(3) & Sinks(2))
    assert Window(3) != Window(4)
    assert ~~Causal() == Causal()
    with pytest.raises(AttributeError):
        Window(3).left = 4
    assert Causal().row_counts(3, 10).tolist() == [8, 9, 10]  # the queries are the last ones
    assert Full().density(0, 5) == 0.0


def test_picture():
    assert str(((Window(1) & Causal()) | Sinks(1)).show(4)) == "█···\n██··\n███·\n█·██"


def test_a_million_tokens():
    """Counts come from intervals: all pairs would be 10^12."""
    counts = (Window(1023) & Causal()).row_counts(1_000_000, 1_000_000)
    assert counts[0] == 1
    assert counts[-1] == 1024
    assert counts.sum() == 1024 * 1_000_000 - 1023 * 1024 // 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-1), "left must be an integer >= 0, got -1"),
        (lambda: Window(2, -3), "right must be an integer >= 0, got -3"),
        (lambda: Sinks(0), "n must be an integer >= 1, got 0"),
        (lambda: Columns(((4, 2),)), "0 <= lo < hi"),
        (lambda: Diagonals(0), "period must be an integer >= 1"),
        (lambda: Segments(()), "empty tuple"),
        (lambda: Segments((0, 1)).row_counts(3, 3), r"got 0 to 2|kv_len must be <= 2"),
        (lambda: Causal().row_counts(-1, 3), "must be >= 0"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_algebra_refuses_other_things():
    with pytest.raises(TypeError):
        Causal() & torch.ones(2)
