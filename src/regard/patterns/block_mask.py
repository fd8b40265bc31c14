"""Block layouts to and from FlexAttention's `BlockMask`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.patterns.layout import BlockLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from regard.patterns.pattern import Pattern

__all__ = ["from_block_mask", "to_block_mask"]


def to_block_mask(
    layout: BlockLayout, pattern: Pattern, q_start: int | None = None, device: torch.device | str | None = None
) -> BlockMask:
    """FlexAttention's BlockMask with these blocks; partial ones are masked by ``pattern.allows``.

    FlexAttention counts queries from 0: they are shifted by ``q_start`` (None: the queries are the last ones).
    Padded to the longest row, so a layout with one long row takes ``rows * longest`` int32 there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    start = layout.kv_len - layout.q_len if q_start is None else q_start

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.allows(q + start, k, h, b)

    lead = (layout.samples, layout.heads, layout.n_q_blocks)
    rows = layout.rows
    tables: list[Tensor] = []
    for chosen in (~layout.full, layout.full):
        row, col = rows[chosen], layout.indices[chosen]
        counts = torch.bincount(row, minlength=len(layout.indptr) - 1)
        place = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        table = torch.zeros(len(counts), layout.n_kv_blocks, dtype=torch.int32)
        table[row, place] = col
        tables += [counts.to(torch.int32).view(lead), table.view(*lead, layout.n_kv_blocks)]
    made: Any = BlockMask.from_kv_blocks(
        *tables, BLOCK_SIZE=layout.block, mask_mod=mask_mod, seq_lengths=(layout.q_len, layout.kv_len)
    )
    return made if device is None else made.to(device)


def from_block_mask(mask: BlockMask) -> BlockLayout:
    """The blocks of a BlockMask; without separate full blocks, all are taken as partial."""
    q_len, kv_len = mask.seq_lengths
    block = (int(mask.BLOCK_SIZE[0]), int(mask.BLOCK_SIZE[1]))
    samples, heads = mask.kv_num_blocks.shape[:2]
    shape = (samples, heads, -(-q_len // block[0]), -(-kv_len // block[1]))

    def dense(counts: Tensor | None, table: Tensor | None) -> Tensor:
        out = torch.zeros(shape, dtype=torch.bool)
        if counts is None or table is None:
            return out
        counts, table = counts.cpu(), table.cpu()
        there = torch.arange(table.shape[-1]) < counts[..., None]
        where = there[..., : shape[2], :].nonzero()
        out[where[:, 0], where[:, 1], where[:, 2], table[..., : shape[2], :][there[..., : shape[2], :]].long()] = True
        return out

    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    return BlockLayout.from_dense(dense(mask.kv_num_blocks, mask.kv_indices) | full, full, q_len, kv_len, block)
