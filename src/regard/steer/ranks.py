"""Agreement of two orders: rank correlations and distances of top lists."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["kendall", "kendall_topk", "ranks", "spearman"]

Floats = NDArray[np.float64]


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, equal values sharing the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    first, second = _pair(a, b)
    x, y = ranks(first), ranks(second)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else float("nan")


def kendall(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b: concordant less discordant pairs over sqrt of the untied pairs of each side; NaN if constant.

    O(n^2) memory.
    """
    x, y = (np.sign(v[:, None] - v[None]) for v in _pair(a, b))
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 0 else float("nan")


def kendall_topk(a: ArrayLike, b: ArrayLike, k: int, *, penalty: float = 0.5) -> float:
    """Agreement of the two top-k lists in [-1, 1]: `1 - 2 K / most` (Fagin, Kumar & Sivakumar 2003).

    K counts pairs of items of the lists that the lists order differently; a pair of which both stand in one list and
    neither in the other counts `penalty`. `most` is K of disjoint lists, `k^2 + penalty k (k - 1)`. Equal values are
    taken in the order they come.

    Raises:
        ValueError: k is not in 1..n.
    """
    first, second = _pair(a, b)
    if not 1 <= k <= len(first):
        raise ValueError(f"k must be in 1..{len(first)}, the number of values, got {k}")
    place = []
    for v in (first, second):
        order = np.argsort(-v, kind="stable")[:k]
        where = np.full(len(v), k)  # k: not in the list
        where[order] = np.arange(k)
        place.append(where)
    union = np.flatnonzero((place[0] < k) | (place[1] < k))
    x, y = (np.sign(p[union][:, None] - p[union][None]) for p in place)
    upper = np.triu(np.ones((len(union), len(union)), dtype=bool), 1)
    opposed = (x * y < 0) & upper
    unknown = ((x == 0) | (y == 0)) & upper  # two items that one of the lists leaves out
    most = k * k + penalty * k * (k - 1)
    return float(1 - 2 * (opposed.sum() + penalty * unknown.sum()) / most)


def _pair(a: Any, b: Any) -> tuple[Floats, Floats]:
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"a and b need the same number of values, at least 2, got {first.shape} and {second.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a and b must not hold NaN")
    return first, second
