"""Shapes with a name: the arrow of a window with global tokens, the plus of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows
from regard.patterns.static import Allowed, Index, StaticPattern, multiples, need_int, need_shape

__all__ = ["Arrow", "Plus"]


@dataclass(frozen=True)
class Arrow(StaticPattern):
    """A window on both sides and global tokens: ``|q - k| <= window or k < tokens or q < tokens``.

    The same pairs as ``Window(window, window) | Sinks(tokens) | Queries([(0, tokens)])``; the arrow attention of SENER
    (arXiv 2502.07286) has window 128 and one token, and Longformer's global attention is of this shape.

    Attributes:
        window: keys on each side of the query's own.
        tokens: first tokens that see all and are seen by all.
    """

    window: int
    tokens: int = 1

    def __post_init__(self) -> None:
        need_int("window", self.window, 0, "; Arrow counts keys beside the query's own")
        need_int("tokens", self.tokens, 1)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``|q - k| <= window or k < tokens or q < tokens``."""
        return ((q_idx - kv_idx).abs() <= self.window) | (kv_idx < self.tokens) | (q_idx < self.tokens)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The end of the global tokens."""
        return torch.tensor([self.tokens] if a < self.tokens < b else [], dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, tokens)`` and: any ``[a - window, b + window)``, all ``[b - 1 - window, a + window + 1)``."""
        first = torch.where(q0 < self.tokens, kv_len, self.tokens)
        return Rows(
            _two(first, q0 - self.window, q1 + self.window, kv_len),
            _two(first, q1 - 1 - self.window, q0 + self.window + 1, kv_len),
        )


def _two(first: Tensor, lo: Tensor, hi: Tensor, kv_len: int) -> Tensor:
    keys = torch.stack([torch.zeros_like(first), first, lo.clamp(min=0), hi], -1)
    return iv.clip(keys.view(-1, 2, 2), kv_len)


@dataclass(frozen=True)
class Plus(StaticPattern):
    """The row and the column of each cell of a grid: ``q // width == k // width or q % width == k % width``.

    Row-major cells; criss-cross attention (CCNet, arXiv 1811.11721), and the plus of SENER (arXiv 2502.07286).
    Layouts cost ``height`` intervals a run, and a run ends where its row does: lay the longer side along rows.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        need_int("height", self.height, 1)
        need_int("width", self.width, 1)

    @property
    def span(self) -> int:
        """The cells of the grid."""
        return self.height * self.width

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse other lengths than ``height * width`` keys, and queries beyond them."""
        need_shape(self, self.height * self.width, q_len, kv_len, q_start)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """Same row or same column."""
        return (q_idx // self.width == kv_idx // self.width) | (q_idx % self.width == kv_idx % self.width)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of ``width``."""
        return multiples(self.width, a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """The run's own row; in every other row the run's columns (any), or its column where it has but one (all)."""
        row = (q0 // self.width)[:, None]
        c0, c1 = (q0 % self.width)[:, None], (q1 - 1)[:, None] % self.width + 1
        h = torch.arange(self.height, device=q0.device)
        start, own = h * self.width, h == row
        lo = start + torch.where(own, 0, c0)
        some = torch.stack([lo, start + torch.where(own, self.width, c1)], -1)
        one = torch.where(own, self.width, torch.where(c1 - c0 == 1, c1, c0))
        return Rows(iv.clip(some, kv_len), iv.clip(torch.stack([lo, start + one], -1), kv_len))
