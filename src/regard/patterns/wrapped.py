"""What patterns made of patterns share: heads and samples told apart, fits, closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.pattern import Pattern

__all__ = ["OneOf", "Wrapped", "alike", "smaller"]


def alike(parts: Sequence[Pattern], what: str) -> int | None:
    """How many ``heads`` (or ``samples``) the parts tell apart; they must agree where they do."""
    counts = {n for part in parts if (n := getattr(part, what)) is not None}
    if len(counts) > 1:
        raise ValueError(f"patterns put together must tell the same number of {what} apart, got {sorted(counts)}")
    return counts.pop() if counts else None


def smaller(parts: Sequence[Pattern]) -> int | None:
    """The smallest of the parts' spans; None where none is bound."""
    return min((n for part in parts if (n := part.span) is not None), default=None)


@dataclass(frozen=True)
class Wrapped(Pattern):
    """A pattern made of one other."""

    part: Pattern

    @property
    def heads(self) -> int | None:
        """Heads that the part tells apart."""
        return self.part.heads

    @property
    def samples(self) -> int | None:
        """Samples that the part tells apart."""
        return self.part.samples

    @property
    def span(self) -> int | None:
        """Positions that the part is bound to."""
        return self.part.span

    @property
    def closed_form(self) -> bool:
        """Whether the part has one."""
        return self.part.closed_form

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """The same of the part for one head of one sample."""
        return replace(self, part=self.part.of(head, sample))

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """The part must fit."""
        self.part.fits(q_len, kv_len, q_start)


@dataclass(frozen=True)
class OneOf(Wrapped):
    """One head of one sample of a pattern that tells them apart in `allows` alone."""

    head: int
    sample: int

    @property
    def heads(self) -> int | None:
        """None: it is one."""
        return None

    @property
    def samples(self) -> int | None:
        """None: it is one."""
        return None

    @property
    def closed_form(self) -> bool:
        """No: the part does not say its rows by head."""
        return False

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """Itself."""
        return self

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """The part's, with this head and sample."""
        mine = (torch.tensor(n, device=q_idx.device) for n in (self.head, self.sample))
        return self.part.allows(q_idx, kv_idx, *mine)
