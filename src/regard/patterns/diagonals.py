"""Parallel diagonals: keys at every multiple of a distance, as bands or as single keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Causal, Full, Index, StaticPattern, need_bool, need_int, one_interval

__all__ = ["Diagonals", "Dilated", "Strided"]


@dataclass(frozen=True)
class Diagonals(StaticPattern):
    """Parallel diagonals: ``|q - k - m * period| <= width`` for some integer m; with ``causal`` also ``k <= q``."""

    period: int
    width: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        need_int("period", self.period, 1)
        need_int("width", self.width, 0)
        need_bool("causal", self.causal)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``((q - k + width) mod period) <= 2 width``."""
        near = torch.remainder(q_idx - kv_idx + self.width, self.period) <= 2 * self.width
        return near & (kv_idx <= q_idx) if self.causal else near

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """One interval a diagonal: any ``[a - mp - w, b - mp + w)``, all ``[b - 1 - mp - w, a - mp + w + 1)``."""
        if 2 * self.width + 1 >= self.period:  # the diagonals touch: all keys
            return (Causal() if self.causal else Full()).rows(q0, q1, kv_len)
        # The diagonals are a gap apart, which every key meets between two of them: so `all` is theirs one by one,
        # and the causal edge cuts the main diagonal only.
        return _bands(q0, q1, kv_len, self.period, self.width, 0 if self.causal else None, None, self.causal)


@dataclass(frozen=True)
class Strided(StaticPattern):
    """Every ``stride``-th key, up to ``window`` keys away: ``(q - k) mod stride == 0``, ``|q - k| <= window``.

    As the strided heads of Sparse Transformer (arXiv 1904.10509). ``window=None``: at any distance. With ``causal``
    (the default) keys up to the query's own, else both sides.
    """

    stride: int
    window: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        need_int("stride", self.stride, 1)
        if self.window is not None:
            need_int("window", self.window, 0, " (None: any distance)")
        need_bool("causal", self.causal)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``(q - k) mod stride == 0`` within the window."""
        distance = q_idx - kv_idx
        near = torch.remainder(distance, self.stride) == 0
        if self.causal:
            near = near & (distance >= 0)
        return near if self.window is None else near & (distance.abs() <= self.window)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """Multiple m: ``[a - m stride, b - m stride)`` in any; in all only where the run is one query or stride 1."""
        far = None if self.window is None else self.window // self.stride
        near = 0 if self.causal else None if far is None else -far
        return _bands(q0, q1, kv_len, self.stride, 0, near, far)


@dataclass(frozen=True)
class Dilated(StaticPattern):
    """A window with holes: ``left`` keys before the query's own and ``right`` after, ``dilation`` apart.

    ``k = q - m * dilation``, ``-right <= m <= left``: the dilated sliding window of Longformer (arXiv 2004.05150).
    """

    dilation: int
    left: int
    right: int = 0

    def __post_init__(self) -> None:
        need_int("dilation", self.dilation, 1)
        hint = "; Dilated counts keys beside the query's own"
        need_int("left", self.left, 0, hint)
        need_int("right", self.right, 0, hint)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``(q - k) mod dilation == 0`` and ``-right <= (q - k) / dilation <= left``."""
        distance = q_idx - kv_idx
        near = (distance >= -self.right * self.dilation) & (distance <= self.left * self.dilation)
        return near & (torch.remainder(distance, self.dilation) == 0)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """One key a query for each multiple; runs of at least ``dilation`` queries touch one interval."""
        return _bands(q0, q1, kv_len, self.dilation, 0, -self.right, self.left)


def _bands(
    q0: Tensor,
    q1: Tensor,
    kv_len: int,
    period: int,
    width: int,
    near: int | None,
    far: int | None,
    causal: bool = False,
) -> Rows:
    """Rows of the bands ``|q - k - m * period| <= width``, near <= m <= far (None: no end), with ``causal`` k <= q.

    The bands leave a gap between them, ``period > 2 width + 1``, or are a window: ``period == 1``, ``width == 0``.
    """
    if period == 1:
        lo_a, lo_z = (0, 0) if far is None else (q0 - far, q1 - 1 - far)
        hi_z, hi_a = (kv_len, kv_len) if near is None else (q1 - near, q0 - near + 1)
        return Rows(one_interval(lo_a, hi_z, kv_len, q0), one_interval(lo_z, hi_a, kv_len, q0))
    # The multiples whose band meets [0, kv_len) for some query of the run: `first` down to `last`.
    first = torch.div(q1 - 1 + width, period, rounding_mode="floor")
    last = -torch.div(kv_len - 1 + width - q0, period, rounding_mode="floor")
    first = first if far is None else first.clamp(max=far)
    last = last if near is None else last.clamp(min=near)
    count = (first - last + 1).clamp(min=0)
    touch = q1 - q0 + 2 * width >= period  # the run's bands touch: one interval from end to end

    shift, there = _shifts(first, torch.where(touch, count.clamp(max=1), count), period)
    end = torch.where(touch[:, None], last[:, None] * period, shift)
    some = torch.stack([q0[:, None] - shift - width, q1[:, None] - end + width], -1)
    some[..., 1] = torch.minimum(some[..., 1], q1[:, None]) if causal else some[..., 1]
    some = iv.clip(torch.where(there[..., None], some, 0), kv_len)

    shift, there = _shifts(first, torch.where(q1 - q0 <= 2 * width + 1, count, 0), period)
    every = torch.stack([q1[:, None] - 1 - shift - width, q0[:, None] - shift + width + 1], -1)
    every[..., 1] = torch.minimum(every[..., 1], q0[:, None] + 1) if causal else every[..., 1]
    return Rows(some, iv.clip(torch.where(there[..., None], every, 0), kv_len))


def _shifts(first: Tensor, count: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """The distances of the bands ``first, first - 1, ...`` of each run, so that their keys ascend; and which exist."""
    step = torch.arange(int(count.max()) if len(count) else 0, device=first.device)
    return (first[:, None] - step) * period, step < count[:, None]
