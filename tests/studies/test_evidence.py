import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from regard.studies import evidence

values = st.lists(st.integers(-5, 5), min_size=3, max_size=30)


@given(values, st.integers(0, 2**16))
def test_spearman_is_scipys_with_ties(a, seed):
    b = np.random.default_rng(seed).integers(-5, 5, len(a))
    ours = evidence.spearman(a, b)
    if len(set(a)) == 1 or len(set(b.tolist())) == 1:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_refuses_nan_and_unequal_lengths():
    with pytest.raises(ValueError, match="NaN"):
        evidence.spearman([1.0, float("nan")], [1.0, 2.0])
    with pytest.raises(ValueError, match="same number"):
        evidence.spearman([1.0, 2.0, 3.0], [1.0, 2.0])


def test_bootstrap_interval_covers_the_mean_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for draw in range(200):
        low, high = evidence.bootstrap(generator.normal(1.0, 1.0, 40), draws=300, seed=draw)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_difference_sees_what_unpaired_noise_would_hide():
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 10, 50)
    mean, low, high = evidence.paired_difference(noise + 0.5 + generator.normal(0, 0.1, 50), noise)
    assert 0 < low < mean < high < 1


def test_bootstrap_refuses_what_is_undefined():
    with pytest.raises(ValueError, match="undefined"):
        evidence.bootstrap([1.0, 2.0], lambda x: float("nan"))
    with pytest.raises(ValueError, match="at least one"):
        evidence.bootstrap([])


def _aligned(target):
    return lambda series: float(np.mean([a[t].mean() for a, t in zip(series, target, strict=True)]))


def test_shift_test_finds_alignment_and_nothing_else():
    generator = np.random.default_rng(2)
    peaks = [generator.random(200) < 0.1 for _ in range(6)]
    aligned = [generator.normal(0, 1, 200) + p for p in peaks]
    p, chance = evidence.shift_test(_aligned(peaks), aligned)
    assert p < 0.05
    assert abs(chance) < 0.5
    # Under the null p is uniform: it is small about as often as it says.
    small = 0
    for draw in range(100):
        noise = [generator.normal(0, 1, 200) for _ in peaks]
        small += evidence.shift_test(_aligned(peaks), noise, shifts=50, seed=draw)[0] < 0.1
    assert small <= 22


def test_random_equal_draws_sets_of_the_size_without_repetition():
    pool = [(layer, head) for layer in range(3) for head in range(4)]
    draws = evidence.random_equal(pool, 5, seed=3)
    assert len(draws) == 5
    assert all(len(set(d)) == 5 and set(d) <= set(pool) for d in draws)
    assert draws == evidence.random_equal(pool, 5, seed=3) != evidence.random_equal(pool, 5, seed=4)
    with pytest.raises(ValueError, match="12 members, 13"):
        evidence.random_equal(pool, 13)


def test_local_maxima_are_peaks_among_the_largest_and_never_beside_a_gap():
    nan = float("nan")
    assert np.flatnonzero(evidence.local_maxima([0, 5, 0, 1, 0, 6, 6, 0, 0, 0], 0.5)).tolist() == [1, 3, 6]
    assert np.flatnonzero(evidence.local_maxima([0, 5, 0, 1, 0, 6, 6, 0, 0, 0], 0.2)).tolist() == [6]
    assert not evidence.local_maxima([nan, 5, nan, 1, nan], 1.0).any()
    assert not evidence.local_maxima([1, 2]).any()


def test_seeds_and_items_spreads_over_both():
    rng = np.random.default_rng(0)
    alike = rng.normal(0, 1, (4, 500))
    low, high = evidence.seeds_and_items(alike)
    assert high - low < 0.25
    apart = alike + np.array([[-1.0], [0.0], [0.5], [1.0]])
    wide_low, wide_high = evidence.seeds_and_items(apart)
    assert wide_high - wide_low > 4 * (high - low)
    assert wide_low < apart.mean() < wide_high
    one_low, one_high = evidence.seeds_and_items(alike[:1])
    assert one_low < alike[0].mean() < one_high
    with pytest.raises(ValueError, match=r"must be \[seeds, items\]"):
        evidence.seeds_and_items([1.0, 2.0])
