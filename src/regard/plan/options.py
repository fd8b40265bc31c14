"""What a head can be given: dense attention, nothing, a pattern, a pattern that grows with the length, or a route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.patterns import (
    And,
    BlockCausal,
    Blocks,
    BlockWindow,
    Causal,
    Columns,
    Diagonals,
    Dilated,
    DilatedBlocks,
    Full,
    LongNet,
    Not,
    Or,
    Pattern,
    PerHead,
    PowerOfTwo,
    Queries,
    Sinks,
    Strided,
    StrideSlash,
    Window,
)
from regard.patterns.routed import Route

__all__ = ["DENSE", "NOTHING", "Option", "ScaledWindow", "bound_part"]

# What means the same at every length: distances, strides and the first few positions.
_FREE = (
    BlockCausal, Blocks, BlockWindow, Causal, Diagonals, Dilated, DilatedBlocks, Full, LongNet, PowerOfTwo, Sinks,
    Strided, StrideSlash, Window,
)  # fmt: skip
ROUND = 64
"""Scaled widths are multiples of this, so that a growing cache changes the pattern now and then only."""


@dataclass(frozen=True)
class ScaledWindow:
    """A window beside sinks, as wide as a share of the keys: ``Window(ceil64(share * length)) | Sinks(sinks)``.

    Args:
        share: of the length, in (0, 1]; 0: the narrowest, 64 keys at every length.
        sinks: first keys that every query sees.
        right: as many keys after the query's own.
        last: so many queries at the end see all that the model lets them see, and so does every step of decoding: an
            answer is asked for there. Costs ``last / length`` of dense attention.
    """

    share: float | int
    sinks: int = 0
    right: bool = False
    last: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share!r}")
        for name in ("sinks", "last"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")

    def at(self, length: int) -> Pattern:
        """The pattern for this many keys."""
        width = max(ROUND, -(-round(self.share * length) // ROUND) * ROUND)
        found: Pattern = Window(width, width if self.right else 0)
        if self.sinks:
            found = found | Sinks(self.sinks)
        if self.last and length:
            found = found | Queries(((max(0, length - self.last), length),))
        return found


@dataclass(frozen=True, eq=False)
class Option:
    """One way for a head to attend, inside what the model itself allows.

    Attributes:
        name: short, unlike that of any other option of a plan.
        how: None: as the model does (dense); a `Pattern`, a `ScaledWindow`, or a `Route` without parameters.
    """

    name: str
    how: Pattern | ScaledWindow | Route | None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a text that is not empty, got {self.name!r}")
        if self.how is not None and not isinstance(self.how, (Pattern, ScaledWindow, Route)):
            raise ValueError(
                f"how of option {self.name!r} must be a Pattern, a ScaledWindow, a Route or None (dense), "
                f"got {type(self.how).__name__}"
            )
        if isinstance(self.how, PerHead):
            raise ValueError(f"option {self.name!r} is for one head; give per_head patterns as an option each")

    @property
    def kind(self) -> str:
        """ "dense", "nothing", "pattern" or "route"."""
        if self.how is None:
            return "dense"
        if _empty(self.how):
            return "nothing"
        return "route" if isinstance(self.how, Route) else "pattern"

    @property
    def length(self) -> str:
        """What it means at another length: "any" (the same), "scales" (grows with it) or "bound" (nothing)."""
        if isinstance(self.how, ScaledWindow):
            return "scales"
        return "any" if bound_part(self.how) is None else "bound"

    def at(self, kv_len: int) -> Pattern | Route | None:
        """What to attend with among so many keys."""
        return self.how.at(kv_len) if isinstance(self.how, ScaledWindow) else self.how


DENSE = Option("dense", None)
NOTHING = Option("nothing", Columns(()))


def bound_part(how: Any) -> Any:
    """The part that holds positions of one length (columns, segments, grids, ...); None where there is none."""
    if how is None or isinstance(how, (*_FREE, ScaledWindow)) or _empty(how):
        return None
    if isinstance(how, (And, Or)):
        left = bound_part(how.left)
        return bound_part(how.right) if left is None else left
    if isinstance(how, Not):
        return bound_part(how.part)
    if isinstance(how, Route):
        inner = getattr(how, "route", None)
        if inner is not None:
            return bound_part(inner)
        if getattr(how, "order", None) is not None:
            return how
        parts = [bound_part(x) for x in (how.within, getattr(how, "keep", None))]
        return next((p for p in parts if p is not None), None)
    return how


def _empty(how: Any) -> bool:
    return isinstance(how, Columns) and not how.intervals
