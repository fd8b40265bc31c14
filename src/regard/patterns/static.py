"""Patterns of fixed geometry, with their rows in closed form: the simplest ones.

``rows(q0, q1, kv_len)`` gives, for runs of queries ``[q0, q1)``, the keys that some query of the run may see
(``any``) and the keys that every query of it may see (``all``), as intervals. Row counts, layouts and the spans of
tiles follow from it without evaluating pairs. Below, ``a`` and ``b`` are a run's ends and ``K`` is kv_len.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows

__all__ = ["Causal", "Columns", "Full", "Prefix", "Queries", "Sinks", "StaticPattern", "Window"]

Index = Int[Tensor, "..."]  # absolute indices, broadcasting against each other
Allowed = Bool[Tensor, "..."]


class StaticPattern(Pattern):
    """A pattern whose rows are intervals of keys."""

    @abstractmethod
    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """Keys of the runs of queries ``[q0, q1)``, none of which crosses one of `cuts`."""


def one_interval(lo: Tensor | int, hi: Tensor | int, kv_len: int, like: Tensor) -> Tensor:
    """One interval a run, clipped to ``[0, kv_len)``; numbers stand for every run of `like`."""
    ends = [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (lo, hi)]
    return iv.clip(torch.stack(ends, dim=-1)[:, None], kv_len)


def multiples(period: int, a: int, b: int) -> Int[Tensor, "multiples"]:
    """The multiples of `period` strictly inside ``(a, b)``."""
    first = (a // period + 1) * period
    return torch.arange(first, max(b, first), period)


def need_int(name: str, value: object, least: int, hint: str = "") -> None:
    """Refuse what is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}{hint}")


def need_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def need_shape(pattern: Pattern, n: int, q_len: int, kv_len: int, q_start: int | None) -> None:
    """Refuse lengths that are not those of a pattern bound to n tokens; queries may be some of them."""
    start = kv_len - q_len if q_start is None else q_start
    if kv_len != n or start < 0 or start + q_len > n:
        raise ValueError(
            f"{pattern} covers {n} tokens: kv_len must be {n} and the queries lie in [0, {n}), "
            f"got kv_len={kv_len}, queries [{start}, {start + q_len})"
        )


@dataclass(frozen=True)
class Full(StaticPattern):
    """Every query meets every key."""

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Always true."""
        return (q_idx == q_idx) & (kv_idx == kv_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, K)``."""
        keys = one_interval(0, kv_len, kv_len, q0)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Causal(StaticPattern):
    """A query meets its own key and all before it, ``k <= q``; with ``future=True`` all after it, ``k >= q``."""

    future: bool = False

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k <= q`` (``k >= q`` with ``future``)."""
        return kv_idx >= q_idx if self.future else kv_idx <= q_idx

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[0, b)``, all ``[0, a + 1)``; with ``future`` ``[a, K)`` and ``[b - 1, K)``."""
        if self.future:
            return Rows(one_interval(q0, kv_len, kv_len, q0), one_interval(q1 - 1, kv_len, kv_len, q0))
        return Rows(one_interval(0, q1, kv_len, q0), one_interval(0, q0 + 1, kv_len, q0))


@dataclass(frozen=True)
class Window(StaticPattern):
    """A query meets its own key, ``left`` keys before it and ``right`` after: ``q - left <= k <= q + right``."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        hint = "; Window counts keys beside the query's own, so Window(0) is the diagonal"
        need_int("left", self.left, 0, hint)
        need_int("right", self.right, 0, hint)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``q - left <= k <= q + right``."""
        return (kv_idx >= q_idx - self.left) & (kv_idx <= q_idx + self.right)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[a - left, b + right)``, all ``[b - 1 - left, a + right + 1)``."""
        some = one_interval(q0 - self.left, q1 + self.right, kv_len, q0)
        return Rows(some, one_interval(q1 - 1 - self.left, q0 + self.right + 1, kv_len, q0))


@dataclass(frozen=True)
class _OfIntervals(StaticPattern):
    """A set of positions given as half-open intervals, ``((lo, hi), ...)``."""

    intervals: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        pairs = tuple(self.intervals) if isinstance(self.intervals, Iterable) else (self.intervals,)
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                raise ValueError(f"intervals must be pairs (lo, hi) with 0 <= lo < hi, got {pair!r} in {pairs!r}")
        object.__setattr__(self, "intervals", tuple((int(lo), int(hi)) for lo, hi in pairs))

    def _inside(self, idx: Tensor) -> Tensor:
        inside = torch.zeros_like(idx, dtype=torch.bool)
        for lo, hi in self.intervals:
            inside = inside | ((idx >= lo) & (idx < hi))
        return inside


@dataclass(frozen=True)
class Columns(_OfIntervals):
    """Every query meets the keys of these half-open intervals, ``((lo, hi), ...)``."""

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Whether the key lies in an interval."""
        return self._inside(kv_idx) & (q_idx == q_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """The intervals, for every run."""
        keys = torch.tensor(self.intervals, dtype=torch.long, device=q0.device).reshape(1, -1, 2)
        keys = iv.clip(keys, kv_len).expand(len(q0), -1, 2)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Queries(_OfIntervals):
    """The queries of these half-open intervals, ``((lo, hi), ...)``, meet every key; the others meet none."""

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Whether the query lies in an interval."""
        return self._inside(q_idx) & (kv_idx == kv_idx)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The ends of the intervals."""
        return torch.tensor(sorted({x for pair in self.intervals for x in pair if a < x < b}), dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, K)`` inside an interval, else nothing."""
        keys = one_interval(0, self._inside(q0).to(q0) * kv_len, kv_len, q0)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Sinks(StaticPattern):
    """Every query meets the first ``n`` keys."""

    n: int

    def __post_init__(self) -> None:
        need_int("n", self.n, 1)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k < n``."""
        return (kv_idx < self.n) & (q_idx == q_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, n)``, for every run."""
        keys = one_interval(0, self.n, kv_len, q0)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Prefix(StaticPattern):
    """The first ``c`` keys are met by every query, the others causally: ``k < c or k <= q`` (prefix-LM).

    As in the prefix mask of multi-hop question answering (arXiv 2505.11754): the prompt sees all of itself.
    """

    c: int

    def __post_init__(self) -> None:
        need_int("c", self.c, 1)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k < c or k <= q``."""
        return (kv_idx < self.c) | (kv_idx <= q_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[0, max(b, c))``, all ``[0, max(a + 1, c))``."""
        some = one_interval(0, q1.clamp(min=self.c), kv_len, q0)
        return Rows(some, one_interval(0, (q0 + 1).clamp(min=self.c), kv_len, q0))
