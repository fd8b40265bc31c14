"""The pairs inside partial blocks, as bits: what a kernel looks up where a block is neither full nor absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns.layout import BlockLayout
from regard.patterns.pattern import Pattern

__all__ = ["PartialTiles", "partial_tiles"]

PAIRS = 1 << 22  # evaluated at once

Mask = Callable[[Tensor, Tensor], Tensor]


class PartialTiles(NamedTuple):
    """Masks of the partial blocks of a layout; blocks with the same pairs share one."""

    tiles: Bool[Tensor, "kinds bq bk"]
    """Different masks; at least one, of which no block need be."""
    which: Int[Tensor, "partial"]
    """The mask of each partial block, in the order of the layout's listed blocks."""


def partial_tiles(layout: BlockLayout, pattern: Pattern, q_start: int, mask: Mask | None = None) -> PartialTiles:
    """Evaluate the pattern on the partial blocks of its layout, and on nothing else. CPU tensors.

    Args:
        layout: of the pattern, with query blocks from ``q_start``.
        pattern: asked by `allows`.
        q_start: absolute index of the first query.
        mask: given instead of asking the pattern: (query blocks, key blocks) -> bool ``[n, bq, bk]``.

    Pairs past the end of either axis are not allowed.
    """
    (bq, bk), n_q = layout.block, max(layout.n_q_blocks, 1)
    chosen = ~layout.full
    rows, cols = layout.rows[chosen], layout.indices[chosen].long()
    group, i = rows // n_q, rows % n_q
    packed = np.empty((len(cols), -(-bq * bk // 8)), dtype=np.uint8)
    step = max(1, PAIRS // (bq * bk))
    q_off, k_off = torch.arange(bq)[:, None], torch.arange(bk)[None]
    for n in range(0, len(cols), step):
        at = slice(n, n + step)
        if mask is not None:
            found = mask(i[at], cols[at])
        else:
            found = _evaluate(layout, pattern, q_start, group[at], i[at], cols[at], q_off, k_off)
        packed[at] = np.packbits(found.flatten(1).numpy(), axis=1)
    if not len(cols):
        return PartialTiles(torch.zeros(1, bq, bk, dtype=torch.bool), torch.zeros(0, dtype=torch.long))
    kinds, which = np.unique(packed.view([("", f"V{packed.shape[1]}")]).ravel(), return_inverse=True)
    bits = np.unpackbits(kinds.view(np.uint8).reshape(len(kinds), -1), axis=1, count=bq * bk)
    tiles = torch.from_numpy(bits).bool().view(len(kinds), bq, bk)
    return PartialTiles(tiles, torch.from_numpy(which.astype(np.int64)))


def _evaluate(
    layout: BlockLayout,
    pattern: Pattern,
    q_start: int,
    group: Tensor,
    i: Tensor,
    j: Tensor,
    q_off: Tensor,
    k_off: Tensor,
) -> Tensor:
    (bq, bk) = layout.block
    row, key = i[:, None, None] * bq + q_off, j[:, None, None] * bk + k_off
    inside = (row < layout.q_len) & (key < layout.kv_len)
    # past the ends the pattern is asked about the last position, and the answer is not used
    q, k = row.clamp(max=layout.q_len - 1) + q_start, key.clamp(max=layout.kv_len - 1)
    head, sample = group % layout.heads, group // layout.heads
    found = pattern.allows(q, k, head[:, None, None], sample[:, None, None])
    return found.expand(inside.shape) & inside
