"""Patterns of fixed geometry, with their rows in closed form.

``rows(q0, q1, kv_len)`` gives, for runs of queries ``[q0, q1)``, the keys that some query of the run may see
(``any``) and the keys that every query of it may see (``all``), as intervals. Row counts and the spans of tiles
follow from it without evaluating pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows

__all__ = [
    "Causal",
    "Columns",
    "Diagonals",
    "Full",
    "Segments",
    "Sinks",
    "StaticPattern",
    "Window",
]


class StaticPattern(Pattern):
    """A pattern whose rows are intervals of keys."""

    @abstractmethod
    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """Keys of the runs of queries ``[q0, q1)``, none of which crosses one of `cuts`."""


def _one(lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    return iv.clip(torch.stack([lo, hi], dim=-1)[:, None], kv_len)


def _need_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclass(frozen=True)
class Full(StaticPattern):
    """Every pair."""

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Always true."""
        return (q_idx == q_idx) & (kv_idx == kv_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, kv_len)``."""
        keys = _one(torch.zeros_like(q0), torch.full_like(q0, kv_len), kv_len)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Causal(StaticPattern):
    """``k <= q``; with ``future=True`` ``k >= q``."""

    future: bool = False

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``k <= q`` (``k >= q`` with ``future``)."""
        return kv_idx >= q_idx if self.future else kv_idx <= q_idx

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[0, b)``, all ``[0, a + 1)``; with ``future`` ``[a, kv_len)`` and ``[b - 1, kv_len)``."""
        if self.future:
            end = torch.full_like(q0, kv_len)
            return Rows(_one(q0, end, kv_len), _one(q1 - 1, end, kv_len))
        zero = torch.zeros_like(q0)
        return Rows(_one(zero, q1, kv_len), _one(zero, q0 + 1, kv_len))


@dataclass(frozen=True)
class Window(StaticPattern):
    """``q - left <= k <= q + right``: the query itself, ``left`` keys before it and ``right`` after."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        hint = "; Window counts keys beside the query's own, so Window(0) is the diagonal"
        for name, value in (("left", self.left), ("right", self.right)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}{hint}")

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``q - left <= k <= q + right``."""
        return (kv_idx >= q_idx - self.left) & (kv_idx <= q_idx + self.right)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[a - left, b + right)``, all ``[b - 1 - left, a + right + 1)``."""
        return Rows(
            _one(q0 - self.left, q1 + self.right, kv_len), _one(q1 - 1 - self.left, q0 + self.right + 1, kv_len)
        )


@dataclass(frozen=True)
class Columns(StaticPattern):
    """Every query meets the keys of these half-open intervals, ``((lo, hi), ...)``."""

    intervals: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        pairs = tuple(self.intervals)
        for pair in pairs:
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                raise ValueError(f"intervals must be pairs (lo, hi) with 0 <= lo < hi, got {pair!r} in {pairs!r}")
        object.__setattr__(self, "intervals", tuple((int(lo), int(hi)) for lo, hi in pairs))

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Whether the key lies in an interval."""
        inside = torch.zeros_like(kv_idx, dtype=torch.bool)
        for lo, hi in self.intervals:
            inside = inside | ((kv_idx >= lo) & (kv_idx < hi))
        return inside & (q_idx == q_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """The intervals, for every run."""
        keys = torch.tensor(self.intervals, dtype=torch.long, device=q0.device).reshape(1, -1, 2)
        keys = iv.clip(keys.expand(len(q0), -1, 2), kv_len)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Sinks(StaticPattern):
    """Every query meets the first ``n`` keys."""

    n: int

    def __post_init__(self) -> None:
        _need_int("n", self.n, 1)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``k < n``."""
        return (kv_idx < self.n) & (q_idx == q_idx)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, n)``, for every run."""
        keys = _one(torch.zeros_like(q0), torch.full_like(q0, self.n), kv_len)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Diagonals(StaticPattern):
    """Parallel diagonals: ``|q - k - m * period| <= width`` for some integer m; with ``causal`` also ``k <= q``."""

    period: int
    width: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        _need_int("period", self.period, 1)
        _need_int("width", self.width, 0)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``((q - k + width) mod period) <= 2 width``."""
        near = torch.remainder(q_idx - kv_idx + self.width, self.period) <= 2 * self.width
        return near & (kv_idx <= q_idx) if self.causal else near

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """One interval a diagonal: any ``[a - mp - w, b - mp + w)``, all ``[b - 1 - mp - w, a - mp + w + 1)``."""
        if 2 * self.width + 1 >= self.period:  # the diagonals touch: all keys
            keys = Full().rows(q0, q1, kv_len)
        else:
            last = int(q1.max()) if len(q1) else 0
            first = int(q0.min()) if len(q0) else 0
            m = torch.arange((first - kv_len - self.width) // self.period, (last + self.width) // self.period + 1)
            shift = m.to(q0) * self.period
            centre0, centre1 = q0[:, None] - shift, q1[:, None] - shift
            some = torch.stack([centre0 - self.width, centre1 + self.width], -1)
            every = torch.stack([centre1 - 1 - self.width, centre0 + self.width + 1], -1)
            keys = Rows(iv.clip(some, kv_len), iv.clip(every, kv_len))
        if not self.causal:
            return keys
        before = Causal().rows(q0, q1, kv_len)
        # Exact only for single queries: a diagonal and the causal edge may cut a run at different queries.
        exact = bool((q1 - q0 <= 1).all())
        return Rows(
            iv.intersect(keys.any, before.any, kv_len), iv.intersect(keys.all, before.all, kv_len), (exact, True)
        )


@dataclass(frozen=True)
class Segments(StaticPattern):
    """Pairs of equal segment id; ``ids[p]`` is the segment of position p (a segment need not be contiguous)."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = self.ids.tolist() if isinstance(self.ids, Tensor) else self.ids
        object.__setattr__(self, "ids", tuple(int(x) for x in ids))
        if not self.ids:
            raise ValueError("ids must name the segment of each position, got an empty tuple")

    def _lookup(self, idx: Tensor, name: str) -> Tensor:
        if idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= len(self.ids)):
            raise ValueError(
                f"{name} must lie in [0, {len(self.ids)}), the positions that ids covers; "
                f"got {int(idx.min())} to {int(idx.max())}"
            )
        return torch.tensor(self.ids, device=idx.device)[idx.long()]

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``ids[q] == ids[k]``."""
        return self._lookup(q_idx, "q_idx") == self._lookup(kv_idx, "kv_idx")

    def _runs(self) -> Tensor:
        ids = torch.tensor(self.ids)
        edge = (ids[1:] != ids[:-1]).nonzero().flatten() + 1
        return torch.cat([torch.zeros(1, dtype=torch.long), edge, torch.tensor([len(ids)])])

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Where the id changes."""
        edges = self._runs()
        return edges[(edges > a) & (edges < b)]

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """The pieces of the run's own segment."""
        if kv_len > len(self.ids):
            raise ValueError(f"kv_len must be <= {len(self.ids)}, the number of ids, got {kv_len}")
        edges = self._runs()
        ids = torch.tensor(self.ids)
        piece_id = ids[edges[:-1]]
        mine = self._lookup(q0, "q0").cpu()
        own = mine[:, None] == piece_id[None]
        most = int(own.sum(1).max()) if own.numel() else 0
        order = own.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        there = own.gather(1, order)
        pieces = torch.stack([edges[:-1], edges[1:]], -1)[order]
        keys = iv.clip(torch.where(there[..., None], pieces, 0), kv_len).to(q0.device)
        return Rows(keys, keys)
