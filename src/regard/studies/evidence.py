"""The statistics that studies share: bootstrap intervals, rank correlation, the shift test, random draws of equal size.

"Better" in a study means that the 95% paired-bootstrap interval of the difference leaves out 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regard.steer.ranks import ranks, spearman

__all__ = [
    "auc",
    "bootstrap",
    "local_maxima",
    "paired_difference",
    "random_equal",
    "ranks",
    "shift_test",
    "spearman",
]

Floats = NDArray[np.float64]
Item = TypeVar("Item", bound=Hashable)


def bootstrap(
    items: ArrayLike, statistic: Callable[[Floats], float] = np.mean, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of the items, resampled with replacement along the first axis.

    Draws on which the statistic is undefined (NaN) are left out.

    Raises:
        ValueError: no items, or the statistic is undefined on more than half of the draws.
    """
    array = np.asarray(items, dtype=np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError("items must hold at least one item")
    generator = np.random.default_rng(seed)
    values = np.array([statistic(array[generator.integers(len(array), size=len(array))]) for _ in range(draws)])
    defined = values[~np.isnan(values)]
    if len(defined) < draws / 2:
        raise ValueError(f"the statistic is undefined on {draws - len(defined)} of {draws} resamples")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def seeds_and_items(values: ArrayLike, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of ``[seeds, items]``: seeds are resampled, then the items of each.

    Raises:
        ValueError: not two dimensions, or nothing in one of them.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"values must be [seeds, items] with at least one of each, got shape {array.shape}")
    generator = np.random.default_rng(seed)
    seeds, items = array.shape
    means = []
    for _ in range(draws):
        rows = generator.integers(seeds, size=(seeds, 1))
        means.append(array[rows, generator.integers(items, size=(seeds, items))].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(a: ArrayLike, b: ArrayLike, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b over the same items, and its 95% paired-bootstrap interval: (mean, low, high)."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be measured on the same items, got shapes {first.shape} and {second.shape}")
    difference = first - second
    return float(difference.mean()), *bootstrap(difference, draws=draws, seed=seed)


def shift_test(
    statistic: Callable[[list[Floats]], float], series: Sequence[ArrayLike], *, shifts: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Is a statistic of several series larger than when each series is shifted in a circle?

    A shift keeps the series' own rhythm and breaks its alignment with whatever the statistic compares it to.

    Args:
        statistic: of the list of series, each `[length]`.
        series: one array a sample.
        shifts: how many times every series is shifted, by an amount of its own in 1..length-1.
        seed: of the shifts.

    Returns:
        (p, mean over the shifts): p is the share of shifts with a statistic at least as large, the series itself
        counted as one of them, so never 0.
    """
    arrays = [np.asarray(s, dtype=np.float64) for s in series]
    if any(a.ndim != 1 or len(a) < 2 for a in arrays):
        raise ValueError(f"series must be 1-D with at least 2 values, got shapes {[a.shape for a in arrays]}")
    observed = statistic(arrays)
    generator = np.random.default_rng(seed)
    shifted = np.array(
        [statistic([np.roll(a, int(generator.integers(1, len(a)))) for a in arrays]) for _ in range(shifts)]
    )
    return float((1 + (shifted >= observed).sum()) / (1 + shifts)), float(shifted.mean())


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN without either."""
    yes = np.asarray(positive, dtype=bool)
    n, m = int(yes.sum()), int((~yes).sum())
    if not n or not m:
        return float("nan")
    return float((ranks(np.asarray(scores, dtype=np.float64))[yes].sum() - n * (n + 1) / 2) / (n * m))


def random_equal(pool: Sequence[Item], n: int, *, draws: int = 5, seed: int = 0) -> list[list[Item]]:
    """`draws` sets of n members of the pool, without repetition within a set.

    Raises:
        ValueError: the pool has fewer than n members.
    """
    if n > len(pool):
        raise ValueError(f"pool has {len(pool)} members, {n} were asked for")
    generator = np.random.default_rng(seed)
    return [[pool[i] for i in sorted(generator.choice(len(pool), size=n, replace=False))] for _ in range(draws)]


def local_maxima(values: ArrayLike, share: float = 0.2) -> NDArray[np.bool_]:
    """Peaks of a series: larger than both neighbours (the left may be equal) and among the largest `share` of values.

    The two ends are never peaks, nor are values beside a NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    peaks = np.zeros(len(array), dtype=bool)
    if len(array) < 3:
        return peaks
    middle = array[1:-1]
    peaks[1:-1] = (middle >= array[:-2]) & (middle > array[2:]) & (middle >= np.nanquantile(array, 1 - share))
    return peaks
