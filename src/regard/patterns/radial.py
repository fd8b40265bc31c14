"""Radial attention: spatial windows that shrink with the distance between video frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.layout import BlockLayout, block_size
from regard.patterns.pattern import Rows, resolve_q_start
from regard.patterns.slices import sliced
from regard.patterns.states import Frame
from regard.patterns.static import Allowed, Index, StaticPattern, multiples, need_bool, need_int, need_shape

__all__ = ["Radial"]


@dataclass(frozen=True)
class Radial(StaticPattern):
    """Video tokens, frame by frame, whose spatial window halves each time the frame distance doubles.

    q is token u of frame i, k token v of frame j, s tokens a frame, D = |i - j| and p = 2^floor(log2 max(D, 1)):
    ``(p <= s and |u - v| + 1 <= s / p) or (D mod ceil(p / s) == 0 and u == v) or (sink and j == 0)``. O(n log n) pairs.
    |u - v| is over the raster index of the frame. Radial Attention (arXiv 2506.19852).

    ``rule="release"`` is the authors' code before it turns tokens into blocks: frames at D <= 1 whole; else the radius
    is ``max(z * decay, block)``, ``z = 2^(floor(log2 s) - floor(log2 D))``; and where ``z < block`` only frames with
    ``D mod int(block / z) == 0`` are kept (so also D = 1, where s < block).

    Attributes:
        frames: f, frames.
        tokens: s, tokens of a frame.
        sink: whether every query meets the whole first frame; the released code does so for Wan only.
        rule: "paper" or "release".
        decay: of the release rule; None: 0.2 with the sink (Wan), 0.95 without (HunyuanVideo).
        block: of the release rule; None: 128.
    """

    frames: int
    tokens: int
    sink: bool = True
    rule: str = "paper"
    decay: float | int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        need_int("frames", self.frames, 1)
        need_int("tokens", self.tokens, 1)
        need_bool("sink", self.sink)
        if self.rule not in ("paper", "release"):
            raise ValueError(f'rule must be "paper" or "release", got {self.rule!r}')
        if self.rule == "paper" and (self.decay is not None or self.block is not None):
            raise ValueError(f'decay and block belong to rule="release", got decay={self.decay}, block={self.block}')
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay!r}")
        if self.block is not None:
            need_int("block", self.block, 1)

    @cached_property
    def radius(self) -> Int[Tensor, "frames"]:
        """Largest |u - v| at each frame distance, at most s - 1; -1 where the whole frame is left out."""
        rule = self._paper if self.rule == "paper" else self._release
        return torch.tensor([min(rule(distance), self.tokens - 1) for distance in range(self.frames)])

    def _paper(self, distance: int) -> int:
        p = 1 << (max(distance, 1).bit_length() - 1)
        if p <= self.tokens:
            return self.tokens // p - 1
        return 0 if distance % -(-p // self.tokens) == 0 else -1

    def _release(self, distance: int) -> int:
        block = 128 if self.block is None else self.block
        decay = (0.2 if self.sink else 0.95) if self.decay is None else self.decay
        z = 2.0 ** (self.tokens.bit_length() - distance.bit_length())
        if z < block and distance % int(block / z):
            return -1
        return self.tokens - 1 if distance <= 1 else int(max(z * decay, block))

    @property
    def span(self) -> int:
        """The tokens of the video."""
        return self.frames * self.tokens

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse other lengths than ``frames * tokens`` keys, and queries beyond them."""
        need_shape(self, self.frames * self.tokens, q_len, kv_len, q_start)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``|u - v| <= radius[|i - j|]``, or the first frame with ``sink``; False outside the video."""
        s, n = self.tokens, self.frames * self.tokens
        inside = (q_idx >= 0) & (q_idx < n) & (kv_idx >= 0) & (kv_idx < n)
        frame = kv_idx // s
        apart = (q_idx // s - frame).abs().clamp(max=self.frames - 1)
        near = (q_idx % s - kv_idx % s).abs() <= self.radius.to(apart.device)[apart.long()]
        return (near | (frame == 0) if self.sink else near) & inside

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of ``tokens``."""
        return multiples(self.tokens, a, b)

    def layout(self, q_len: int, kv_len: int, block: int | tuple[int, int], q_start: int | None = None) -> BlockLayout:
        """See `Pattern.layout`; where blocks divide frames, every frame's rows are slices of the same long ones."""
        start, (bq, bk) = resolve_q_start(q_len, kv_len, q_start), block_size(block)
        self.fits(q_len, kv_len, start)
        if self.tokens % bq or self.tokens % bk or start % bq or q_len % bq or not q_len:
            return super().layout(q_len, kv_len, block, q_start)
        decay = self.decay
        if self.rule == "release" and decay is None:  # it follows the sink, which comes later
            decay = 0.2 if self.sink else 0.95
        middle = replace(self, frames=2 * self.frames - 1, sink=False, decay=decay)
        frame = Frame(start, q_len, 0, kv_len, bq, bk, kv_len)
        return sliced(middle, self.frames, self.tokens, frame, self.sink)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """For each frame, tokens u0..u1 of the run: any ``[u0 - r, u1 + r + 1)``, all ``[u1 - r, u0 + r + 1)``."""
        s = self.tokens
        own = q0 // s
        u0, u1 = (q0 - own * s)[:, None], (q1 - 1 - own * s)[:, None]
        frame = torch.arange(min(self.frames, -(-kv_len // s)), device=q0.device)
        r = self.radius.to(q0.device)[(own[:, None] - frame).abs()]
        if self.sink:
            r[:, :1] = s
        start = frame * s
        there = (r >= 0)[..., None]
        some = torch.stack([start + (u0 - r).clamp(min=0), start + (u1 + r + 1).clamp(max=s)], -1)
        every = torch.stack([start + (u1 - r).clamp(min=0), start + (u0 + r + 1).clamp(max=s)], -1)
        return Rows(iv.clip(some * there, kv_len), iv.clip(every * there, kv_len))
