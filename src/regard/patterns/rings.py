"""Concentric rings of an image, numbered from the border inwards: pattern, order and positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.order import Order
from regard.patterns.pattern import Rows
from regard.patterns.sections import Sections
from regard.patterns.segments import StepCausal
from regard.patterns.static import Allowed, Causal, Full, Index, StaticPattern, need_int, need_shape

__all__ = ["RingOrder", "Rings", "concentric_causal", "ring_count", "ring_of", "ring_positions"]


def ring_of(idx: Int[Tensor, "..."], height: int, width: int) -> Int[Tensor, "..."]:
    """Ring of each row-major token: ``min(h, w, height - 1 - h, width - 1 - w)``, 0 at the border."""
    h, w = idx // width, idx % width
    return torch.minimum(torch.minimum(h, height - 1 - h), torch.minimum(w, width - 1 - w))


def ring_count(height: int, width: int) -> int:
    """How many rings there are, ``ceil(min(height, width) / 2)``; the last one may be a line."""
    need_int("height", height, 1)
    need_int("width", width, 1)
    return (min(height, width) + 1) // 2


def ring_positions(height: int, width: int, start: int = 0) -> Int[Tensor, "tokens"]:
    """Position ids of image tokens, row-major, by concentric rings: ``start + ring``.

    Text after the image goes on at ``start + ring_count(height, width)``. Tokens of a ring share a position, so their
    features must carry place. Concentric Causal Attention (arXiv 2410.15926).
    """
    ring_count(height, width)
    return start + ring_of(torch.arange(height * width), height, width)


@dataclass(frozen=True)
class Rings(StaticPattern):
    """Image tokens in row-major order, causal over concentric rings from the border inwards: ``ring(k) <= ring(q)``.

    Concentric Causal Attention (arXiv 2410.15926). `RingOrder` sorts the tokens so that blocks are few.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        ring_count(self.height, self.width)

    @property
    def span(self) -> int:
        """The tokens of the image."""
        return self.height * self.width

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse other lengths than ``height * width`` keys, and queries beyond them."""
        need_shape(self, self.height * self.width, q_len, kv_len, q_start)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``ring(k) <= ring(q)``; False outside the image."""
        n = self.height * self.width
        q, k = ring_of(q_idx, self.height, self.width), ring_of(kv_idx, self.height, self.width)
        return (k <= q) & (q_idx >= 0) & (q_idx < n) & (kv_idx >= 0) & (kv_idx < n)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """any: the frame up to the run's innermost ring; all: up to its outermost."""
        outer, inner = self._span(q0, q1)
        return Rows(self._frame(inner, kv_len), self._frame(outer, kv_len))

    def _span(self, q0: Tensor, q1: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest ring among the tokens of each run."""
        height, width = self.height, self.width
        ha, wa, hz, wz = q0 // width, q0 % width, (q1 - 1) // width, (q1 - 1) % width
        same = ha == hz
        left, right = wa * 0, wa * 0 + width - 1
        # The run's first row from wa on, its last row up to wz, and the whole rows between.
        first_low, first_high = _along(wa, torch.where(same, wz, right), width)
        last_low, last_high = _along(torch.where(same, wa, left), wz, width)
        row_a, row_z = torch.minimum(ha, height - 1 - ha), torch.minimum(hz, height - 1 - hz)
        low = torch.minimum(torch.minimum(first_low, row_a), torch.minimum(last_low, row_z))
        high = torch.maximum(torch.minimum(first_high, row_a), torch.minimum(last_high, row_z))
        between = torch.minimum(_along(ha + 1, hz - 1, height)[1], right // 2)
        return low, torch.where(hz - ha > 1, torch.maximum(high, between), high)

    def _frame(self, ring: Tensor, kv_len: int) -> Tensor:
        """Tokens of rings 0..ring: whole rows above and below, and what lies left and right in the rows between."""
        height, width = self.height, self.width
        r = ring[:, None]
        gap = (2 * (r + 1) < height) & (2 * (r + 1) < width)  # else the frame is everything
        h = torch.arange(height, device=ring.device)
        # One interval between the gaps of rows h - 1 and h: from h's left edge minus r + 1 to its left edge plus r + 1.
        lo = torch.where(h == r + 1, 0, h * width - (r + 1))
        hi = torch.where(h == height - 1 - r, height * width, h * width + r + 1)
        keys = torch.stack([lo, hi], -1) * ((h > r) & (h < height - r) & gap)[..., None]
        keys[:, 0] = torch.where(gap, 0, keys.new_tensor([0, height * width]))  # h = 0 is never between gaps
        return iv.clip(keys, kv_len)


def _along(a: Tensor, z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest ``min(x, n - 1 - x)`` for x from a to z, along a side of n."""
    low = torch.minimum(torch.minimum(a, n - 1 - a), torch.minimum(z, n - 1 - z))
    top = torch.minimum(torch.maximum(a, torch.full_like(a, (n - 1) // 2)), z)
    return low, torch.minimum(top, n - 1 - top)


@dataclass(frozen=True)
class RingOrder(Order):
    """Row-major image tokens sorted by ring, outermost first, row-major within a ring.

    In this order `Rings` is `pattern`: causal over steps, one a ring.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        ring_count(self.height, self.width)

    @property
    def n(self) -> int:
        """Tokens of the image."""
        return self.height * self.width

    @cached_property
    def forward(self) -> Int[Tensor, "n"]:
        """The row-major index at each position."""
        return ring_of(torch.arange(self.n), self.height, self.width).argsort(stable=True)

    @property
    def pattern(self) -> StepCausal:
        """`Rings` in this order."""
        inner = [max(self.height - 2 * r, 0) * max(self.width - 2 * r, 0) for r in range(ring_count(*self._shape) + 1)]
        return StepCausal(tuple(self.n - left for left in inner))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.height, self.width


def concentric_causal(before: int, height: int, width: int, after: int) -> Sections:
    """The mask of a prompt with an image: text, image tokens causal over rings, text (arXiv 2410.15926).

    Image tokens see all text before them and none after; text is causal and sees the whole image before it.
    """
    image = height * width
    return Sections(
        [before, image, after],
        [[Causal(), None, None], [Full(), Rings(height, width), None], [Full(), Full(), Causal()]],
    )
