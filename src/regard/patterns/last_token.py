"""Patterns of arithmetic read late and by the last token alone (arXiv 2509.09650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Index, StaticPattern, need_int, one_interval

__all__ = ["LastTokenPeek", "SelfAnd"]


@dataclass(frozen=True)
class SelfAnd(StaticPattern):
    """A query meets its own key and those of `keep` before it: ``k = q, or k in keep and k <= q``.

    Attributes:
        keep: absolute positions, kept sorted; by default the first token, without which heads that attend to it when
            they have nothing to read would be changed too.
    """

    keep: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for position in self.keep:
            need_int("keep", position, 0)
        object.__setattr__(self, "keep", tuple(sorted(set(self.keep))))

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k = q, or k in keep and k <= q``."""
        kept = torch.zeros_like(kv_idx, dtype=torch.bool)
        for position in self.keep:
            kept = kept | (kv_idx == position)
        return (kv_idx == q_idx) | (kept & (kv_idx < q_idx))

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Where a kept key comes into sight."""
        return torch.tensor([p for p in self.keep if a < p < b], dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[a, b)`` and the kept keys up to a; all these keys, and ``[a, b)`` where it is one query."""
        before = torch.tensor([(p, p + 1) for p in self.keep], dtype=torch.long, device=q0.device).reshape(1, -1, 2)
        before = torch.where(before[..., :1] <= q0[:, None, None], before, 0)
        alone = q1 - q0 == 1
        own = one_interval(q0, q1, kv_len, q0)
        only = one_interval(q0, torch.where(alone, q1, q0), kv_len, q0)
        return Rows(iv.union(before, own, kv_len), iv.union(before, only, kv_len))


@dataclass(frozen=True)
class LastTokenPeek(StaticPattern):
    """Query `last` meets all keys up to its own; every other one its own and those of `keep` before it.

    The same pairs as ``SelfAnd(keep) | (Causal() & Queries([(last, last + 1)]))``. In cached decoding `last` moves: a
    pattern is made for each step.

    Attributes:
        last: absolute position of the query that reads.
        keep: as in `SelfAnd`.
    """

    last: int
    keep: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        need_int("last", self.last, 0)
        object.__setattr__(self, "keep", SelfAnd(self.keep).keep)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k <= q where q = last; else k = q, or k in keep and k <= q``."""
        return SelfAnd(self.keep).allows(q_idx, kv_idx) | ((q_idx == self.last) & (kv_idx <= q_idx))

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Where a kept key comes into sight, and both ends of the query that reads."""
        places = {*self.keep, self.last, self.last + 1}
        return torch.tensor(sorted(p for p in places if a < p < b), dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, last + 1)`` for that query, else as in `SelfAnd`."""
        some = SelfAnd(self.keep).rows(q0, q1, kv_len)
        seen = one_interval(0, torch.where(q0 == self.last, self.last + 1, 0), kv_len, q0)
        return Rows(iv.union(some.any, seen, kv_len), iv.union(some.all, seen, kv_len))
