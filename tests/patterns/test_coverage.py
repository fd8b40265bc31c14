"""Reach, depth, gaps, influence and centers against products of dense masks; golden values of the specification."""

from math import comb, exp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.patterns import (
    Blocks,
    Causal,
    Columns,
    Congruent,
    Full,
    Grid,
    Neighborhood,
    Pattern,
    PowerOfTwo,
    Prefix,
    Queries,
    Segments,
    Sinks,
    Window,
    centers,
    depth,
    first_gap,
    influence,
    per_head,
    reach,
)
from tests.oracles.rollout import center_tokens, reached, reached_from, rollout

LENGTH = 24


class Odd(Pattern):
    """A pattern that knows its pairs only."""

    def allows(self, q_idx, kv_idx, head=None, batch=None):
        return (q_idx * 5 + kv_idx * 3) % 7 < 2


ONE = st.sampled_from(
    [
        Causal(),
        Causal(future=True),
        Window(3),
        Window(2, 1),
        Window(0, 4),
        Prefix(5),
        Blocks(5),
        Sinks(2),
        Full(),
        Odd(),
        PowerOfTwo(2, 2, 0),
        Segments(tuple((p // 3) % 4 for p in range(LENGTH))),
        Neighborhood((4, 6), 3),
        Neighborhood((LENGTH,), 4, dilation=3),
        Grid([Blocks(2), Blocks(3)], shape=(4, 6)),
        Grid([Congruent(2), Congruent(3)], shape=(4, 6)),
        Window(4, 4) & Causal(),
        (Window(2) | Sinks(1)) & Causal(),
        ~Window(5, 5),
        (Window(3) & Columns(((2, 9),))) | (Blocks(4) & ~Window(1)),
        Queries(((3, 9),)) & Causal(),
    ]
)
STACK = st.lists(ONE, min_size=1, max_size=4)


def dense(pattern):
    i = torch.arange(LENGTH)
    return pattern.allows(i[:, None], i[None]).expand(LENGTH, LENGTH)


def members(found):
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    for lo, hi in found.tolist():
        assert lo < hi
        inside[lo:hi] = True
    ends = found.flatten()
    assert (ends[1:] > ends[:-1]).all()
    return inside


@given(STACK, st.integers(0, LENGTH - 1))
def test_reach_of_layers(patterns, query):
    want = reached([dense(p) for p in patterns], query)
    assert torch.equal(members(reach(patterns, len(patterns), query, LENGTH)), want)
    missing = [d for d in range(query + 1) if not want[query - d]]
    assert first_gap(patterns, len(patterns), query, LENGTH) == (missing[0] if missing else None)


@given(ONE, st.integers(0, 4), st.integers(0, LENGTH - 1))
def test_reach_and_depth_of_one_pattern(pattern, layers, query):
    mask = dense(pattern)
    by_depth = [torch.arange(LENGTH) == query]
    for _ in range(3 * LENGTH):
        by_depth.append(reached_from(mask, by_depth[-1]))
    assert torch.equal(members(reach(pattern, layers, query, LENGTH)), by_depth[layers])
    for whole in (False, True):
        full = [n for n, row in enumerate(by_depth) if row[: LENGTH if whole else query + 1].all()]
        assert depth(pattern, query, LENGTH, whole=whole) == (full[0] if full else None)


@given(STACK, st.integers(0, LENGTH - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_influence_of_layers(patterns, query, residual):
    masks = [dense(p) for p in patterns]
    got = influence(patterns, len(patterns), query, LENGTH, residual=residual)
    torch.testing.assert_close(got, rollout(masks, query, residual), rtol=0, atol=1e-14)
    if not residual:
        for n in range(1, len(patterns) + 1):
            assert not got[n - 1][~reached(masks[-n:], query)].any(), "what is not reached has no influence"


@given(st.integers(0, LENGTH), st.integers(0, LENGTH - 1), st.sampled_from([0.0, 0.2, 3.0]), st.integers(1, 5))
def test_influence_of_a_decay(left, query, decay, layers):
    for pattern in (Window(left), Causal(), Window(left, 3) & Causal()):
        want = rollout([dense(pattern)] * layers, query, 0.25, decay)
        got = influence(pattern, layers, query, LENGTH, decay=decay, residual=0.25)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-18)


@given(ONE)
def test_centers(pattern):
    assert torch.equal(members(centers(pattern, LENGTH)), center_tokens(dense(pattern)))


def test_heads_are_united_and_averaged():
    pair = per_head([Window(2), Window(0, 1)])
    masks = [dense(Window(2)), dense(Window(0, 1))]
    both = masks[0] | masks[1]
    assert torch.equal(members(reach(pair, 3, 7, LENGTH)), reached([both] * 3, 7))
    row = torch.eye(LENGTH, dtype=torch.float64)[7]
    mean = sum(m / m.sum(1, keepdim=True) for m in (x.double() for x in masks)) / 2
    torch.testing.assert_close(influence(pair, 2, 7, LENGTH)[1], row @ mean @ mean, rtol=0, atol=1e-14)
    assert torch.equal(members(centers(pair, LENGTH)), center_tokens(both))


@pytest.mark.parametrize(("window", "start"), [(1, 2), (5, 4)])
def test_powers_of_two_have_no_hole_before_their_first_gap(window, start):
    """Every distance below 2^(L+1) - 1 after L layers; with a window of 5 below 2^(L+2) - 3."""
    pattern = PowerOfTwo(1, window, 0)
    for layers in range(1, 7):
        gap = start * 2**layers - (1 if window == 1 else 3)
        assert first_gap(pattern, layers, 999, 1000) == gap


def test_mass_moves_to_the_first_token():
    mass = influence(Causal(), 16, 255, 256)
    assert mass[[0, 1, 3, 7, 15], 0].tolist() == pytest.approx([0.0039, 0.0239, 0.1707, 0.7181, 0.9966], abs=5e-5)
    torch.testing.assert_close(mass.sum(1), torch.ones(16, dtype=torch.float64))


def test_a_decay_without_normalisation_is_binomial():
    """Far from the border the norms are all equal: ``binom(t + x, x) e^(-m x)`` times ``(1 - e^-m)^(t + 1)``."""
    m, layers, query = 0.5, 6, 3000
    row = influence(Causal(), layers, query, query + 1, decay=m)
    for t in range(layers):
        for x in (0, 1, 5, 40):
            want = comb(t + x, x) * exp(-m * x) * (1 - exp(-m)) ** (t + 1)
            assert row[t, query - x].item() == pytest.approx(want, rel=1e-12)


def test_blocks_then_grid_of_maxvit():
    """Both axes need windows at least as large as the number of windows: 49 = 7 * 7 is the last full one."""
    for n, share in ((42, 1.0), (49, 1.0), (56, 0.765625)):
        block, grid = (Grid([axis, axis], shape=(n, n)) for axis in (Blocks(7), Congruent(n // 7)))
        seen = []
        for q in (0, 3 * n + 5, n * n - 1, n * n // 2 + n // 2):
            found = reach([block, grid], 2, q, n * n)
            seen.append(int((found[:, 1] - found[:, 0]).sum()) / n**2)
        assert max(seen) == 1 if share == 1 else min(seen) < 1


def test_a_million_tokens():
    assert depth(Window(1023), 999_999, 1_000_000) == 978
    assert centers(Causal(), 1_000_000).tolist() == [[0, 1]]
    assert reach(Window(1023, 5), 3, 500_000, 1_000_000).tolist() == [[500_000 - 3 * 1023, 500_000 + 16]]
    video = Neighborhood((64, 128, 128), (5, 9, 9))
    found = reach(video, 2, 0, 1 << 20)
    assert int((found[:, 1] - found[:, 0]).sum()) == 7 * 13 * 13


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reach(Causal(), 2, 5, 5), "query must lie in"),
        (lambda: reach(Causal(), -1, 2, 5), "layers must be >= 0"),
        (lambda: reach([Causal()], 2, 2, 5), "layers must be the number of patterns, 1, got 2"),
        (lambda: reach([], 0, 2, 5), "pattern must be a Pattern or a list"),
        (lambda: reach(Neighborhood((4, 4), 2), 1, 2, 5), "needs q_len = kv_len = 16"),
        (lambda: influence(Causal(), 1, 2, 5, residual=1.5), "residual must be in"),
        (lambda: influence(Causal(), 1, 2, 5, decay=-1.0), "decay must be >= 0"),
        (lambda: influence(Causal(), 1, 2, 5, weights="decay"), "weights must be 'uniform', or 'decay' with"),
        (lambda: influence(Window(1, 1), 1, 2, 5, decay=1.0), "decay takes causal windows"),
        (lambda: centers(Causal(), 0), "query must lie in"),
    ],
)
def test_errors_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()
