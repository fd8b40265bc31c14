"""Chosen pairs, bands and patterns against dense float64 attention."""

from inspect import unwrap  # the shape checks of the tests would answer first

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels import stats
from regard.patterns import Causal, Segments, Sinks, Window
from tests.kernels.problems import PATTERNS, assert_close, problems
from tests.oracles import attention as oracle


def full_lse(q, k, kwargs):
    (lse,) = stats.tile_pass(q, k, [stats.Lse()], **kwargs)
    return lse


@given(problems(normaliser=False))
def test_pair_weights(problem):
    q, k, kwargs, _, g = problem
    weights, _, _ = oracle.attention(q, k, **kwargs)
    i = torch.randint(0, q.shape[2], (50,), generator=g)
    j = torch.randint(0, k.shape[2], (50,), generator=g)
    assert_close(stats.pair_weights(q, k, full_lse(q, k, kwargs), i, j, **kwargs), weights[:, :, i, j])


@given(problems(normaliser=False), st.integers(-9, 9), st.integers(1, 12), st.sampled_from([1, 5, 256]))
def test_band_weights(problem, lo, width, tile):
    q, k, kwargs, start, _ = problem
    weights, _, _ = oracle.attention(q, k, **kwargs)
    want = torch.zeros(*q.shape[:3], width, dtype=torch.float64)
    for row in range(q.shape[2]):
        for c in range(width):
            key = row + start - (lo + c)
            if 0 <= key < k.shape[2]:
                want[:, :, row, c] = weights[:, :, row, key]
    got = torch.zeros_like(want)
    for rows, part in stats.band_weights(q, k, full_lse(q, k, kwargs), lo, lo + width, tile=tile, **kwargs):
        got[:, :, rows] = part.double()
    assert_close(got, want)


@given(problems(normaliser=False), st.sampled_from(PATTERNS), st.sampled_from([1, 7, 128]))
def test_pattern_mass(problem, pattern, tile):
    q, k, kwargs, start, _ = problem
    kwargs.pop("pattern", None)
    weights, _, _ = oracle.attention(q, k, **kwargs)
    i, j = torch.arange(q.shape[2])[:, None] + start, torch.arange(k.shape[2])[None]
    got = stats.pattern_mass(q, k, full_lse(q, k, kwargs), pattern, tile=tile, **kwargs)
    assert_close(got, (weights * pattern.allows(i, j)).sum(-1), 2e-5)


def test_pattern_mass_touches_only_what_the_pattern_keeps(monkeypatch):
    touched = []
    real = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, *a, **kw: touched.append(x.numel()) or real(x, *a, **kw))
    q = torch.randn(1, 1, 4096, 8, generator=torch.Generator().manual_seed(0))
    lse = full_lse(q, q, {"is_causal": True})
    mass = stats.pattern_mass(q, q, lse, (Window(31) & Causal()) | Sinks(4), is_causal=True)
    assert sum(touched) <= 4096 * (32 + 4 + 128)
    assert 0 < mass.min() <= mass.max() <= 1 + 1e-5


def test_segments_as_a_pattern():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 12, 8, generator=g)
    pattern = Segments((0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 1))
    weights, lse, _ = oracle.attention(q, q)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None]
    assert_close(stats.pattern_mass(q, q, lse.float(), pattern), (weights * pattern.allows(i, j)).sum(-1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda q, lse: unwrap(stats.pair_weights)(q, q, lse, torch.tensor([5]), torch.tensor([0])),
            IndexError,
            "q_idx must lie",
        ),
        (
            lambda q, lse: unwrap(stats.pair_weights)(q, q, lse, torch.tensor([0]), torch.tensor([-1])),
            IndexError,
            "kv_idx must lie",
        ),
        (
            lambda q, lse: unwrap(stats.pair_weights)(q, q, lse[:, :, :2], torch.tensor([0]), torch.tensor([0])),
            ValueError,
            "lse must be",
        ),
        (lambda q, lse: unwrap(stats.band_weights)(q, q, lse, 3, 3), ValueError, "lo must be < hi"),
        (lambda q, lse: unwrap(stats.band_weights)(q, q, lse * torch.nan, 0, 3), ValueError, "lse holds NaN"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(error, match=message):
        call(q, full_lse(q, q, {}))
