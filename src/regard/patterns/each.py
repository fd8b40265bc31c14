"""One pattern for each head, or for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.pattern import Pattern
from regard.patterns.wrapped import alike, smaller

__all__ = ["PerHead", "PerSample", "per_head", "per_sample"]


@dataclass(frozen=True)
class _Each(Pattern):
    """One pattern for each of something."""

    patterns: tuple[Pattern, ...]
    _what: ClassVar[str] = ""

    def __post_init__(self) -> None:
        patterns = tuple(self.patterns)
        object.__setattr__(self, "patterns", patterns)
        if not patterns or not all(isinstance(p, Pattern) for p in patterns):
            raise ValueError(f"patterns must be a sequence of at least one Pattern, got {patterns!r}")
        inner = [p for p in patterns if getattr(p, self._what) is not None]
        if inner:
            raise ValueError(f"each of patterns must be alike for all {self._what}, got {inner[0]!r}")
        alike(patterns, "heads")
        alike(patterns, "samples")

    @property
    def heads(self) -> int | None:
        """Heads told apart."""
        return alike(self.patterns, "heads")

    @property
    def samples(self) -> int | None:
        """Samples told apart."""
        return alike(self.patterns, "samples")

    @property
    def span(self) -> int | None:
        """The smaller of the parts' spans."""
        return smaller(self.patterns)

    @property
    def closed_form(self) -> bool:
        """Whether each has one."""
        return all(p.closed_form for p in self.patterns)

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Each must fit."""
        for pattern in self.patterns:
            pattern.fits(q_len, kv_len, q_start)

    def _select(
        self, which: Tensor | None, name: str, q: Tensor, k: Tensor, head: Tensor | None, batch: Tensor | None
    ) -> Tensor:
        if which is None:
            raise ValueError(f"{name} must be given: this pattern differs between {self._what}")
        out = (q != q) & (k != k) & (which != which)
        for n, pattern in enumerate(self.patterns):
            out = out | ((which == n) & pattern.allows(q, k, head, batch))
        return out


@dataclass(frozen=True)
class PerHead(_Each):
    """Head h has ``patterns[h]``; `allows` needs ``head``."""

    _what: ClassVar[str] = "heads"

    @property
    def heads(self) -> int | None:
        """One for each pattern."""
        return len(self.patterns)

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """``patterns[head]``."""
        return self.patterns[head].of(head, sample)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``patterns[head].allows``; a head that is not there allows nothing."""
        return self._select(head, "head", q_idx, kv_idx, head, batch)


@dataclass(frozen=True)
class PerSample(_Each):
    """Sample b of the batch has ``patterns[b]``; `allows` needs ``batch``."""

    _what: ClassVar[str] = "samples"

    @property
    def samples(self) -> int | None:
        """One for each pattern."""
        return len(self.patterns)

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """``patterns[sample]``."""
        return self.patterns[sample].of(head, sample)

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``patterns[batch].allows``; a sample that is not there allows nothing."""
        return self._select(batch, "batch", q_idx, kv_idx, head, batch)


def per_head(patterns: Sequence[Pattern]) -> PerHead:
    """One pattern for each head, in order."""
    return PerHead(tuple(patterns))


def per_sample(patterns: Sequence[Pattern]) -> PerSample:
    """One pattern for each sample of the batch, in order."""
    return PerSample(tuple(patterns))
