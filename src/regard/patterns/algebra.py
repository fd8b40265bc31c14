"""Patterns made of patterns: intersection, union, complement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals
from regard.patterns import states as st
from regard.patterns.pattern import Pattern, Rows
from regard.patterns.wrapped import Wrapped, alike, smaller

__all__ = ["And", "Not", "Or"]


@dataclass(frozen=True)
class _Two(Pattern):
    """Two patterns put together."""

    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        alike((self.left, self.right), "heads")
        alike((self.left, self.right), "samples")

    @property
    def heads(self) -> int | None:
        """Heads that either part tells apart."""
        return alike((self.left, self.right), "heads")

    @property
    def samples(self) -> int | None:
        """Samples that either part tells apart."""
        return alike((self.left, self.right), "samples")

    @property
    def span(self) -> int | None:
        """The smaller of the parts' spans."""
        return smaller((self.left, self.right))

    @property
    def closed_form(self) -> bool:
        """Whether both parts have one."""
        return self.left.closed_form and self.right.closed_form

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """Both parts of one head of one sample."""
        return type(self)(self.left.of(head, sample), self.right.of(head, sample))

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Both parts must fit."""
        self.left.fits(q_len, kv_len, q_start)
        self.right.fits(q_len, kv_len, q_start)

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

    def states(self, frame: st.Frame, first: int, last: int) -> st.States:
        """Open where both parts are partial: they may have no pair in common."""
        return st.combine(self.left.states(frame, first, last), self.right.states(frame, first, last), st.AND)


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

    def states(self, frame: st.Frame, first: int, last: int) -> st.States:
        """Open where both parts are partial: together they may fill the block."""
        return st.combine(self.left.states(frame, first, last), self.right.states(frame, first, last), st.OR)


@dataclass(frozen=True)
class Not(Wrapped):
    """Pairs that the part forbids."""

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

    def states(self, frame: st.Frame, first: int, last: int) -> st.States:
        """Absent where the part is full, and the reverse."""
        return st.complement(self.part.states(frame, first, last))

    def __invert__(self) -> Pattern:
        return self.part


def _combine(left: Pattern, right: Pattern, q0: Tensor, q1: Tensor, kv_len: int, meet: bool) -> Rows | None:
    a, b = left.rows(q0, q1, kv_len), right.rows(q0, q1, kv_len)
    if a is None or b is None:
        return None
    join = intervals.intersect if meet else intervals.union
    single = bool((q1 - q0 <= 1).all())
    some_exact = a.exact[0] and b.exact[0] and (single or not meet)
    every_exact = a.exact[1] and b.exact[1] and (single or meet)
    return Rows(join(a.any, b.any, kv_len), join(a.all, b.all, kv_len), (some_exact, every_exact))
