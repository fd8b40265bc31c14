"""Causal patterns over blocks of tokens: keys at power-of-two distances, and the static patterns beside it.

A query in block ``I = q // P`` meets whole earlier blocks ``J = k // P``, and its own block causally. The distance in
blocks is ``d = I - J``. Power-of-two distances, and the four others that the paper compares (PowerAttention,
arXiv 2503.03588: 10 blocks a query, blocks of 256).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Index, StaticPattern, multiples, need_int

__all__ = ["BlockWindow", "DilatedBlocks", "LongNet", "PowerOfTwo", "StrideSlash"]


@dataclass(frozen=True)
class _CausalBlocks(StaticPattern):
    """Whole blocks before the query's own, and its own causally."""

    block: int

    @abstractmethod
    def _meets(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        """Whether blocks meet, where the key's is not later."""

    @abstractmethod
    def _earlier(self, own: Int[Tensor, "runs"]) -> Int[Tensor, "runs m"]:
        """The earlier blocks that each block meets; what is negative or not earlier is dropped."""

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k <= q`` and the blocks meet."""
        return (kv_idx <= q_idx) & self._meets(q_idx // self.block, kv_idx // self.block)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of ``block``."""
        return multiples(self.block, a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[JP, (J+1)P)`` for each earlier block met, and of the own block ``[IP, b)`` (any), ``[IP, a+1)`` (all)."""
        own = q0 // self.block
        met = self._earlier(own)
        there = (met >= 0) & (met < own[:, None])
        lo = torch.cat([torch.where(there, met, 0), own[:, None]], 1) * self.block
        hi = lo + torch.cat([there, there.new_ones(len(own), 1)], 1) * self.block
        some, every = torch.stack([lo, hi], -1), torch.stack([lo, hi], -1)
        some[:, -1, 1], every[:, -1, 1] = q1, q0 + 1
        return Rows(iv.clip(some, kv_len), iv.clip(every, kv_len))


@dataclass(frozen=True)
class _Distances(_CausalBlocks):
    """Blocks at some distances, and the first blocks."""

    @property
    def _sinks(self) -> int:
        return 0

    @abstractmethod
    def _near(self, distance: Tensor) -> Tensor:
        """Whether blocks at this distance, 0 or more, meet."""

    @abstractmethod
    def _list(self, most: int) -> Tensor:
        """The distances 1..most at which blocks meet, descending."""

    def _meets(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        near = self._near(q_block - k_block)
        return near | (k_block < self._sinks) if self._sinks else near

    def _earlier(self, own: Tensor) -> Tensor:
        distances = self._list(int(own.max()) if len(own) else 0).to(own.device)
        sinks = torch.arange(self._sinks, device=own.device).expand(len(own), -1)
        return torch.cat([sinks, own[:, None] - distances], 1)


@dataclass(frozen=True)
class PowerOfTwo(_Distances):
    """A window of blocks, blocks at power-of-two distances, and sink blocks: reach doubles with each layer.

    ``k <= q and (d < window or d & (d - 1) == 0 or J < sinks)``, d the distance in blocks, so 0, 1, 2, 4, 8, ... are
    in. PowerAttention (arXiv 2503.03588): block 256, window 5, one sink.

    Attributes:
        block: P, tokens of a block.
        window: blocks of the window, the query's own included.
        sinks: first blocks that every later query meets.
    """

    window: int
    sinks: int = 1

    def __post_init__(self) -> None:
        _need_blocks(self)

    @property
    def _sinks(self) -> int:
        return self.sinks

    def _near(self, distance: Tensor) -> Tensor:
        return (distance < self.window) | ((distance & (distance - 1)) == 0)

    def _list(self, most: int) -> Tensor:
        powers = {1 << t for t in range(most.bit_length())}
        return torch.tensor(sorted({*range(1, min(self.window - 1, most) + 1), *powers}, reverse=True)).long()


@dataclass(frozen=True)
class BlockWindow(_Distances):
    """A causal window of whole blocks and sink blocks: ``k <= q and (d < window or J < sinks)``.

    The sliding window that PowerAttention (arXiv 2503.03588) compares with: window 9, one sink.
    """

    window: int
    sinks: int = 1

    def __post_init__(self) -> None:
        _need_blocks(self)

    @property
    def _sinks(self) -> int:
        return self.sinks

    def _near(self, distance: Tensor) -> Tensor:
        return distance < self.window

    def _list(self, most: int) -> Tensor:
        return torch.arange(1, min(self.window - 1, most) + 1).flip(0)


@dataclass(frozen=True)
class StrideSlash(_Distances):
    """A window of blocks, every ``stride``-th earlier block, and sink blocks: ``d < window or d mod stride == 0``.

    The slashes that PowerAttention (arXiv 2503.03588) compares with: window 6, three slashes, one sink.
    """

    window: int
    stride: int
    sinks: int = 1

    def __post_init__(self) -> None:
        _need_blocks(self)
        need_int("stride", self.stride, 1)

    @property
    def _sinks(self) -> int:
        return self.sinks

    def _near(self, distance: Tensor) -> Tensor:
        return (distance < self.window) | (torch.remainder(distance, self.stride) == 0)

    def _list(self, most: int) -> Tensor:
        near = range(1, min(self.window - 1, most) + 1)
        return torch.tensor(sorted({*near, *range(self.stride, most + 1, self.stride)}, reverse=True)).long()


@dataclass(frozen=True)
class DilatedBlocks(_Distances):
    """Every ``dilation``-th block of a causal window of blocks: ``d < window and d mod dilation == 0``.

    The dilated window that PowerAttention (arXiv 2503.03588) compares with: window 20, dilation 2.
    """

    window: int = 20
    dilation: int = 2

    def __post_init__(self) -> None:
        _need_blocks(self)
        need_int("dilation", self.dilation, 1)

    def _near(self, distance: Tensor) -> Tensor:
        return (distance < self.window) & (torch.remainder(distance, self.dilation) == 0)

    def _list(self, most: int) -> Tensor:
        return torch.tensor(range(self.dilation, min(self.window - 1, most) + 1, self.dilation)).long().flip(0)


@dataclass(frozen=True)
class LongNet(_CausalBlocks):
    """Segments that double in length and thin out as fast (LongNet, arXiv 2307.02486), over blocks of tokens.

    ``k <= q`` and for some level t: both blocks in one segment of ``n = segment * 2^t`` blocks, ``(I ^ J) < n``,
    and both multiples of ``2^t``, ``(I | J) & (2^t - 1) == 0``.

    Attributes:
        block: P, tokens of a block.
        segment: blocks of the shortest segment, a power of two.
        levels: how many levels, t = 0..levels-1.
    """

    segment: int = 8
    levels: int = 5

    def __post_init__(self) -> None:
        need_int("block", self.block, 1)
        need_int("segment", self.segment, 1)
        need_int("levels", self.levels, 1)
        if self.segment & (self.segment - 1):
            raise ValueError(f"segment must be a power of two, got {self.segment}")

    def _meets(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        apart, either = q_block ^ k_block, q_block | k_block
        met = apart < self.segment
        for t in range(1, self.levels):
            met = met | ((apart < self.segment << t) & ((either & ((1 << t) - 1)) == 0))
        return met

    def _earlier(self, own: Tensor) -> Tensor:
        t = torch.arange(self.levels, device=own.device)
        size = self.segment << t
        start = torch.div(own[:, None], size, rounding_mode="floor") * size
        met = start[..., None] + torch.arange(self.segment, device=own.device)[None, None] * (1 << t)[:, None]
        return torch.where((own[:, None] % (1 << t) == 0)[..., None], met, -1).flatten(1)


def _need_blocks(pattern: _CausalBlocks) -> None:
    need_int("block", pattern.block, 1)
    need_int("window", getattr(pattern, "window", 1), 1, " blocks, the query's own included")
    need_int("sinks", getattr(pattern, "sinks", 0), 0)
