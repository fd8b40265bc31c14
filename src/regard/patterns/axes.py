"""Patterns along one axis of a grid: neighborhoods, the same coordinate, coordinates of equal residue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.diagonals import Diagonals
from regard.patterns.pattern import Pattern, Rows, resolve_q_start
from regard.patterns.static import Allowed, Full, Index, StaticPattern, Window, need_bool, need_int

__all__ = ["Congruent", "Neighborhood1d", "Same"]


@dataclass(frozen=True)
class Same(StaticPattern):
    """``k == q``: along this axis a query meets its own coordinate only."""

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k == q``."""
        return q_idx == kv_idx

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[a, b)``; all ``[a, b)`` of one query, else empty."""
        return Window(0).rows(q0, q1, kv_len)


@dataclass(frozen=True)
class Congruent(StaticPattern):
    """``q = k (mod period)``: a dilated, global axis, as in the grid attention of MaxViT (arXiv 2204.01697)."""

    period: int

    def __post_init__(self) -> None:
        need_int("period", self.period, 1)

    @property
    def groups(self) -> int:
        """How many sets of coordinates never meet: the residues."""
        return self.period

    def group(self, length: int, residue: int) -> tuple[Pattern, int]:
        """The pattern inside the coordinates of one residue, and how many they are on an axis of `length`."""
        return Full(), -(-(length - residue) // self.period)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``(q - k) mod period == 0``."""
        return torch.remainder(q_idx - kv_idx, self.period) == 0

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """Single keys, ``period`` apart, for each residue of the run."""
        return Diagonals(self.period, 0, causal=False).rows(q0, q1, kv_len)


@dataclass(frozen=True)
class Neighborhood1d(StaticPattern):
    """A window of the nearest keys, pushed inside at the borders: neighborhood attention along one axis.

    With stride s, the queries of a group of s share the window of their leader ``min((q//s) s + s//2, n - 1)``, which
    is ``[lo, lo + w)``, ``lo = clip(leader - w//2, 0, n - w)``: every query has exactly w keys, and an even window has
    its extra key on the left. Causal: the leader is the group's last query, keys ``[max(leader - w + 1, 0), q]``.
    Dilation d: coordinates of equal residue mod d are an axis of their own, of length ``ceil((n - residue) / d)``.

    Neighborhood attention (arXiv 2204.07143, 2403.04690), with the stride of GNA (arXiv 2504.16922).

    Attributes:
        length: n, coordinates of the axis.
        window: w, keys of a query, itself included; at most ``length // dilation``.
        stride: s, queries that share a window, at most w. 1 slides, w blocks.
        dilation: d, coordinates between two neighbors.
        causal: only keys up to the query's own.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "window", "dilation"):
            need_int(name, getattr(self, name), 1)
        need_bool("causal", self.causal)
        if self.window * self.dilation > self.length:
            raise ValueError(
                f"window * dilation must be <= length, the axis's {self.length} coordinates, "
                f"got window={self.window}, dilation={self.dilation}"
            )
        if not isinstance(self.stride, int) or not 1 <= self.stride <= self.window:
            raise ValueError(f"stride must be an integer from 1 to window={self.window}, got {self.stride!r}")

    @property
    def groups(self) -> int:
        """How many sets of coordinates never meet: the residues modulo the dilation."""
        return self.dilation

    def group(self, length: int, residue: int) -> tuple[Pattern, int]:
        """The pattern inside the coordinates of one residue, and how many they are."""
        n = -(-(self.length - residue) // self.dilation)
        return Neighborhood1d(n, self.window, self.stride, 1, self.causal), n

    def bounds(self, q: Int[Tensor, "..."]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
        """First key and end of the keys of each query, counted within the query's own dilation group."""
        i, residue = q, 0 * q
        if self.dilation > 1:
            i, residue = q // self.dilation, q % self.dilation
        n = (self.length - residue + self.dilation - 1) // self.dilation
        s, w = self.stride, self.window
        leader = torch.minimum(i // s * s + (s - 1 if self.causal else s // 2), n - 1)
        if self.causal:
            return (leader - w + 1).clamp(min=0), i + 1
        lo = torch.minimum((leader - w // 2).clamp(min=0), n - w)
        return lo, lo + w

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``lo(q) <= k < hi(q)``, and equal residues where dilated."""
        lo, hi = self.bounds(q_idx)
        if self.dilation == 1:
            return (kv_idx >= lo) & (kv_idx < hi)
        k = kv_idx // self.dilation
        return (k >= lo) & (k < hi) & ((q_idx - kv_idx) % self.dilation == 0)

    @property
    def span(self) -> int:
        """The coordinates."""
        return self.length

    def fits(self, q_len: int, kv_len: int, q_start: int | None = None) -> None:
        """Refuse other lengths than the axis's own."""
        start = resolve_q_start(q_len, kv_len, q_start)
        if (q_len, kv_len, start) != (self.length, self.length, 0):
            raise ValueError(
                f"Neighborhood1d of length {self.length} needs q_len = kv_len = {self.length} and q_start = 0, "
                f"got q_len={q_len}, kv_len={kv_len}, q_start={start}"
            )

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any ``[lo(a), hi(b-1))``, all ``[lo(b-1), hi(a))``; dilated, each residue's keys one by one."""
        d = self.dilation
        if d == 1:
            (lo_a, hi_a), (lo_z, hi_z) = self.bounds(q0), self.bounds(q1 - 1)
            some, every = torch.stack([lo_a, hi_z], -1), torch.stack([lo_z, hi_a], -1)
            return Rows(iv.clip(some[:, None], kv_len), iv.clip(every[:, None], kv_len))
        residue = torch.arange(d, device=q0.device)
        first = q0[:, None] + (residue - q0[:, None]) % d  # the run's first and last query of each residue
        last = q1[:, None] - 1 - (q1[:, None] - 1 - residue) % d
        there = first <= last
        low = self.bounds(first)[0] * d + residue  # and the first and last key of these
        high = torch.where(there, (self.bounds(last)[1] - 1) * d + residue, low - d)
        # Where every residue is there, keys from the highest low to the lowest high are one interval.
        a, b = low.amax(1, keepdim=True), high.amin(1, keepdim=True) + 1
        joint = there.all(1, keepdim=True) & (a < b)
        a, b = torch.where(joint, a, kv_len), torch.where(joint, b, kv_len)
        below = (torch.minimum(a, high + 1) - low + d - 1) // d
        above = torch.where(joint, (high - b) // d + 1, 0)
        left = _ladder(low, below, d)
        right = _ladder(high - (above - 1) * d, above, d)
        some = iv.clip(torch.cat([left, torch.stack([a, b], -1), right], 1), kv_len)
        return Rows(some, some * (q1 - q0 == 1)[:, None, None])


def _ladder(start: Tensor, count: Tensor, step: int) -> Tensor:
    """Single keys ``start, start + step, ...``, `count` of them for each residue of each run: ``[runs, m, 2]``."""
    nth = torch.arange(max(int(count.max()), 0) if count.numel() else 0, device=start.device)
    key = start[..., None] + nth * step
    keys = torch.stack([key, key + 1], -1)
    return (keys * (nth < count[..., None])[..., None]).flatten(1, 2)
