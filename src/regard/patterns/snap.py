"""Patterns rounded to whole blocks: what a block-sparse kernel without masks computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns import states as st
from regard.patterns.layout import BlockLayout, block_size
from regard.patterns.pattern import CHUNK, Rows, layout_of
from regard.patterns.wrapped import Wrapped

__all__ = ["Snap"]


@dataclass(frozen=True)
class Snap(Wrapped):
    """Blocks of which more than ``min_fill`` is allowed become dense, the others are dropped.

    Block ``(I, J)`` holds queries ``[I bq, (I+1) bq)`` and keys ``[J bk, (J+1) bk)``, counted from position 0. Its fill
    is the share of allowed pairs among the pairs that exist: all of the block, up to the part's `span` where it has
    one. So what a sequence cuts off at its end still counts.

    Attributes:
        part: the pattern.
        block: tokens in a block, or ``(query block, key block)``.
        min_fill: in [0, 1); 0 keeps every block with an allowed pair.
    """

    block: tuple[int, int]
    min_fill: float | int = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", block_size(self.block))
        if not 0 <= self.min_fill < 1:
            raise ValueError(f"min_fill must lie in [0, 1), got {self.min_fill!r}")

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Whether the pair's block is kept; False outside the span."""
        (bq, bk), like = self.block, (head, batch)
        if self.heads or self.samples:
            return self._by_head(q_idx, kv_idx, *like)
        i, j = torch.broadcast_tensors(q_idx // bq, kv_idx // bk)
        pairs, back = torch.stack([i.flatten(), j.flatten()], -1).unique(dim=0, return_inverse=True)
        kept = self._kept(pairs.cpu().numpy()).to(i.device)[back].view(i.shape)
        end = self.span
        return kept if end is None else kept & (q_idx < end) & (kv_idx < end) & (q_idx >= 0) & (kv_idx >= 0)

    def _by_head(self, q: Tensor, k: Tensor, head: Tensor | None, batch: Tensor | None) -> Tensor:
        for name, given, count in (("head", head, self.heads), ("batch", batch, self.samples)):
            if count and given is None:
                raise ValueError(f"{name} must be given: this pattern tells {count} apart")
        zero = torch.zeros((), dtype=torch.long, device=q.device)
        h, b = zero if head is None or not self.heads else head, zero if batch is None or not self.samples else batch
        out = (q != q) & (k != k) & (h != h) & (b != b)
        for n in range(self.heads or 1):
            for m in range(self.samples or 1):
                out = out | ((h == n) & (b == m) & self.of(n, m).allows(q, k))
        return out

    def _kept(self, blocks: np.ndarray) -> Tensor:
        """Whether each block ``[n, 2]`` is kept, by looking at its pairs."""
        bq, bk = self.block
        kept = torch.zeros(len(blocks), dtype=torch.bool)
        step = max(1, CHUNK // (bq * bk))
        for lo in range(0, len(blocks), step):
            part = torch.from_numpy(blocks[lo : lo + step])
            q = part[:, :1] * bq + torch.arange(bq)
            k = part[:, 1:] * bk + torch.arange(bk)
            allowed = self.part.allows(q[:, :, None], k[:, None, :]).expand(len(part), bq, bk)
            there = torch.ones_like(allowed)
            if self.span is not None:
                there = ((q >= 0) & (q < self.span))[:, :, None] & ((k >= 0) & (k < self.span))[:, None, :]
            n_allowed, n_there = (allowed & there).sum((1, 2)), there.sum((1, 2))
            kept[lo : lo + step] = n_allowed > self.min_fill * n_there
        return kept

    def blocks(self, first: int, last: int, kv_len: int) -> BlockLayout:
        """The kept blocks of query blocks ``[first, last)``, keys up to the end of the last one's block."""
        (bq, bk), end = self.block, self.span
        stop, n_keys = last * bq, -(-kv_len // bk) * bk
        if end is not None:
            stop, n_keys = min(stop, end), min(n_keys, end)
        frame = st.Frame(first * bq, stop - first * bq, 0, n_keys, bq, bk, n_keys)
        found = layout_of([self.part], frame)
        if not self.min_fill:
            return found
        keep = found.full.clone()
        open_rows, open_cols = found.rows[~keep], found.indices[~keep].long()
        keep[~found.full] = self._kept(torch.stack([open_rows + first, open_cols], -1).numpy())
        counts = torch.bincount(found.rows[keep], minlength=last - first)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return BlockLayout(indptr, found.indices[keep], found.full[keep], found.q_len, found.kv_len, self.block)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of the query block."""
        first = (a // self.block[0] + 1) * self.block[0]
        return torch.arange(first, max(b, first), self.block[0])

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """The kept key blocks of the run's query block."""
        if self.heads or self.samples:
            return None
        own = (q0 // self.block[0]).numpy()
        if not len(own) or not kv_len:
            nothing = q0.new_zeros(len(q0), 0, 2)
            return Rows(nothing, nothing)
        wanted, back = np.unique(own, return_inverse=True)
        breaks = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) > 1).tolist()
        parts = [
            self.blocks(int(wanted[a]), int(wanted[z - 1]) + 1, kv_len)
            for a, z in zip(breaks, [*breaks[1:], len(wanted)], strict=True)
        ]
        counts = torch.cat([part.counts for part in parts])
        indices = torch.cat([part.indices for part in parts]).long()
        place = torch.arange(int(counts.max()))
        there = place < counts[:, None]
        keys = torch.zeros(len(counts), len(place), 2, dtype=torch.long)
        keys[there] = torch.stack([indices * self.block[1], (indices + 1) * self.block[1]], -1)
        keys = iv.clip(keys, kv_len)[torch.from_numpy(back)]
        return Rows(keys, keys)
