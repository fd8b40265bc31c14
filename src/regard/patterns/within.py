"""A pattern on a stretch of the tokens, with positions counted from its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows

__all__ = ["Within"]


@dataclass(frozen=True)
class Within(Pattern):
    """``pattern`` among the tokens ``[start, stop)``, whose first is its position 0; no other pair is allowed.

    A padded sample is a stretch of real tokens: ``Within(pattern, padding, length)``. A start below 0 stands for keys
    that are no longer held: index 0 is then position ``-start``.
    """

    pattern: Pattern
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.stop < max(self.start, 0):
            raise ValueError(f"stop must be >= start and >= 0, got start={self.start}, stop={self.stop}")

    @property
    def heads(self) -> int | None:
        """Heads that the pattern tells apart."""
        return self.pattern.heads

    @property
    def samples(self) -> int | None:
        """Samples that the pattern tells apart."""
        return self.pattern.samples

    @property
    def closed_form(self) -> bool:
        """Whether the pattern has one."""
        return self.pattern.closed_form

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """The same stretch for one head of one sample."""
        return Within(self.pattern.of(head, sample), self.start, self.stop)

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """The pattern must fit the queries and keys of the stretch."""
        first, last = max(q_start, self._first), min(q_start + q_len, self.stop)
        self.pattern.fits(max(0, last - first), max(0, min(kv_len, self.stop) - self.start), first - self.start)

    @property
    def _first(self) -> int:
        return max(self.start, 0)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``pattern.allows(q - start, k - start)`` where both lie in the stretch."""
        q_in = (q_idx >= self._first) & (q_idx < self.stop)
        k_in = (kv_idx >= self._first) & (kv_idx < self.stop)
        # outside the stretch the pattern is asked about a position it knows, and the answer is not used
        q = torch.where(q_in, q_idx, self._first) - self.start
        k = torch.where(k_in, kv_idx, self._first) - self.start
        if self._first == self.stop:
            return q_in & k_in
        return self.pattern.allows(q, k, head, batch) & q_in & k_in

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The ends of the stretch, and the pattern's cuts inside it."""
        lo, hi = max(a, self._first), min(b, self.stop)
        ends = torch.tensor([x for x in (self._first, self.stop) if a < x < b], dtype=torch.long)
        inner = self.pattern.cuts(lo - self.start, hi - self.start) + self.start if lo < hi else ends[:0]
        return torch.cat([ends, inner]).unique()

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """The pattern's rows, moved; empty outside the stretch."""
        inside = (q0 >= self._first) & (q1 <= self.stop)
        end = min(kv_len, self.stop)
        if not bool(inside.any()) or end <= self._first:
            nothing = torch.zeros(len(q0), 0, 2, dtype=torch.long, device=q0.device)
            return Rows(nothing, nothing) if self.closed_form else None
        found = self.pattern.rows(q0[inside] - self.start, q1[inside] - self.start, end - self.start)
        if found is None:
            return None
        some, every = (self._moved(keys, inside, end) for keys in (found.any, found.all))
        return Rows(some, every, found.exact)

    def _moved(self, keys: Tensor, inside: Tensor, end: int) -> Tensor:
        out = keys.new_zeros(len(inside), keys.shape[1], 2)
        there = keys[..., :1] < keys[..., 1:]
        out[inside] = torch.where(there, keys + self.start, 0)
        return iv.clip(out, end)
