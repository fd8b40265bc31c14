"""A pattern: which queries may meet which keys.

An immutable value. Everything follows from one predicate over absolute indices, ``allows(q_idx, kv_idx)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals

__all__ = ["And", "Not", "Or", "Pattern", "Rows", "resolve_q_start"]

CHUNK = 1 << 22  # pairs evaluated at once when a pattern has no closed form


def resolve_q_start(q_len: int, kv_len: int, q_start: int | None) -> int:
    """The absolute index of the first query. ``None``: the queries are the last ones, as in decoding."""
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"q_len and kv_len must be >= 0, got q_len={q_len}, kv_len={kv_len}")
    return kv_len - q_len if q_start is None else q_start


class Rows(NamedTuple):
    """Keys of each run of queries, as disjoint sorted intervals ``[runs, m, 2]``, empties ``(0, 0)``.

    ``any``: keys that some query of the run may see; ``all``: keys that every query of it may see.
    ``exact[0]`` False: ``any`` may hold too much. ``exact[1]`` False: ``all`` may hold too little.
    """

    any: Tensor
    all: Tensor
    exact: tuple[bool, bool] = (True, True)


class Pattern(ABC):
    """Which (query, key) pairs are allowed. Immutable, comparable, hashable; combine with ``&``, ``|`` and ``~``.

    Indices are absolute, from 0. Where the queries are not the whole sequence, ``q_start`` is the index of
    the first one (``None``: they are the last ``q_len`` of ``kv_len``).
    """

    @abstractmethod
    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Whether each pair is allowed; the arguments broadcast against each other.

        ``head`` and ``batch`` matter only to patterns that differ between heads or samples.
        """

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Positions strictly inside ``(a, b)`` that no run of queries may cross in `rows`."""
        return torch.zeros(0, dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """Keys of the runs of queries ``[q0, q1)`` in closed form; None for a pattern that has none."""
        return None

    def row_counts(self, q_len: int, kv_len: int, q_start: int | None = None) -> Int[Tensor, "{q_len}"]:
        """How many keys each query may see: ``n_i = #{j : allows(i, j)}``.

        From the intervals of `rows`; a pattern without them is evaluated pair by pair, ``CHUNK`` at a time.
        """
        start = resolve_q_start(q_len, kv_len, q_start)
        first = torch.arange(start, start + q_len)
        rows = self.rows(first, first + 1, kv_len)
        if rows is not None:
            return intervals.length(rows.any)
        keys = torch.arange(kv_len)
        counts = torch.zeros(q_len, dtype=torch.long)
        step = max(1, CHUNK // max(kv_len, 1))
        for lo in range(0, q_len, step):
            queries = torch.arange(lo, min(lo + step, q_len)) + start
            allowed = self.allows(queries[:, None], keys[None])
            counts[lo : lo + step] = allowed.expand(len(queries), kv_len).sum(-1)
        return counts

    def density(self, q_len: int, kv_len: int, q_start: int | None = None) -> float:
        """Allowed pairs divided by all ``q_len * kv_len`` pairs, in [0, 1]; 0.0 where there is no pair."""
        pairs = q_len * kv_len
        return self.row_counts(q_len, kv_len, q_start).sum().item() / pairs if pairs else 0.0

    def show(self, q_len: int = 24, kv_len: int | None = None, q_start: int | None = None) -> str:
        """A picture in text: one line a query, ``█`` for an allowed pair, ``·`` for a forbidden one."""
        kv_len = q_len if kv_len is None else kv_len
        if q_len * kv_len > 1 << 16:
            raise ValueError(
                f"show() draws one character a pair and takes at most 65536 pairs, got {q_len} x {kv_len}; "
                "pass a smaller q_len and kv_len, with q_start to look further down"
            )
        start = resolve_q_start(q_len, kv_len, q_start)
        allowed = self.allows(torch.arange(start, start + q_len)[:, None], torch.arange(kv_len)[None])
        return "\n".join("".join("█" if x else "·" for x in row) for row in allowed.expand(q_len, kv_len).tolist())

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return self.part if isinstance(self, Not) else Not(self)


@dataclass(frozen=True)
class _Two(Pattern):
    """Two patterns put together."""

    left: Pattern
    right: Pattern

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The cuts of both parts."""
        return torch.cat([self.left.cuts(a, b), self.right.cuts(a, b)]).unique()


@dataclass(frozen=True)
class And(_Two):
    """Pairs that both parts allow."""

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``left & right``."""
        return self.left.allows(q_idx, kv_idx, head, batch) & self.right.allows(q_idx, kv_idx, head, batch)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """``all`` is exact, ``any`` may hold too much: keys that each part allows, but never to one query."""
        return _combine(self.left, self.right, q0, q1, kv_len, meet=True)


@dataclass(frozen=True)
class Or(_Two):
    """Pairs that at least one part allows."""

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``left | right``."""
        return self.left.allows(q_idx, kv_idx, head, batch) | self.right.allows(q_idx, kv_idx, head, batch)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """``any`` is exact, ``all`` may hold too little: keys that every query sees, through one part or the other."""
        return _combine(self.left, self.right, q0, q1, kv_len, meet=False)


@dataclass(frozen=True)
class Not(Pattern):
    """Pairs that the part forbids."""

    part: Pattern

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``~part``."""
        return ~self.part.allows(q_idx, kv_idx, head, batch)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The cuts of the part."""
        return self.part.cuts(a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """``any`` is what ``all`` of the part leaves out, and the reverse."""
        part = self.part.rows(q0, q1, kv_len)
        if part is None:
            return None
        some, every = intervals.complement(part.all, kv_len), intervals.complement(part.any, kv_len)
        return Rows(some, every, (part.exact[1], part.exact[0]))


def _combine(left: Pattern, right: Pattern, q0: Tensor, q1: Tensor, kv_len: int, meet: bool) -> Rows | None:
    a, b = left.rows(q0, q1, kv_len), right.rows(q0, q1, kv_len)
    if a is None or b is None:
        return None
    join = intervals.intersect if meet else intervals.union
    single = bool((q1 - q0 <= 1).all())
    some_exact = a.exact[0] and b.exact[0] and (single or not meet)
    every_exact = a.exact[1] and b.exact[1] and (single or meet)
    return Rows(join(a.any, b.any, kv_len), join(a.all, b.all, kv_len), (some_exact, every_exact))
