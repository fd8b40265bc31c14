"""A line between two lists of tokens: each token of one meets its counterpart in the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Index, StaticPattern, need_int, one_interval

__all__ = ["Line"]


class Line(StaticPattern):
    """Query ``queries[i]`` meets the keys at most ``width`` from ``keys[i]``; other queries meet none.

    Where both lists are stretches of a text, the pairs lie on a diagonal beside the main one: the skewed line that
    attention draws between two lists of graph nodes (arXiv 2505.02130).

    Args:
        queries: positions of one list, strictly ascending.
        keys: positions of the other, as many, in the order of their counterparts.
        width: keys on each side of the counterpart.
    """

    def __init__(
        self, queries: Sequence[int] | Int[Tensor, "n"], keys: Sequence[int] | Int[Tensor, "n"], width: int = 0
    ):
        need_int("width", width, 0)
        q, k = (torch.as_tensor(x).detach().cpu().reshape(-1) for x in (queries, keys))
        if (q.is_floating_point() and q.numel()) or (q[:1] < 0).any() or (q[1:] <= q[:-1]).any():
            raise ValueError(f"queries must be integers >= 0, strictly ascending, got {queries!r}")
        if (k.is_floating_point() and k.numel()) or (k < 0).any() or len(k) != len(q):
            raise ValueError(f"keys must be {len(q)} integers >= 0, one for each query, got {keys!r}")
        self.queries, self.keys, self.width = tuple(q.long().tolist()), tuple(k.long().tolist()), width

    @cached_property
    def _key(self) -> Tensor:
        """The counterpart of each position up to the last query, -1 for none; one more position that has none."""
        table = torch.full(((self.queries[-1] if self.queries else -1) + 2,), -1)
        table[list(self.queries)] = torch.tensor(self.keys, dtype=torch.long)
        return table

    def _counterpart(self, idx: Tensor) -> Tensor:
        table = self._key.to(idx.device)
        return torch.where(idx < 0, -1, table[idx.clamp(0, len(table) - 1).long()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Line) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    @property
    def _value(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return self.queries, self.keys, self.width

    def __repr__(self) -> str:
        return f"Line({len(self.queries)} pairs, width={self.width})"

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``|k - keys[i]| <= width`` for the i with ``q == queries[i]``."""
        key = self._counterpart(q_idx)
        return (key >= 0) & ((kv_idx - key).abs() <= self.width)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Before and after each query of the list."""
        edges = torch.tensor(sorted({x + d for x in self.queries for d in (0, 1)}), dtype=torch.long)
        return edges[(edges > a) & (edges < b)]

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[keys[i] - width, keys[i] + width + 1)`` for a query of the list, else nothing."""
        key = self._counterpart(q0)
        there = key >= 0
        lo = torch.where(there, key - self.width, 0).clamp(min=0)
        keys = one_interval(lo, torch.where(there, key + self.width + 1, 0), kv_len, q0)
        return Rows(keys, keys)
