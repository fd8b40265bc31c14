"""Block layouts to and from FlexAttention's `BlockMask`."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    A BlockMask holds a whole table, ``rows * n_kv_blocks`` int32, four times over: far more than the layout itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    start = layout.kv_len - layout.q_len if q_start is None else q_start
    partial, full = _table(layout, ~layout.full), _table(layout, layout.full)
    lengths = (layout.q_len, layout.kv_len)
    made = BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=layout.block,
        mask_mod=lambda b, h, q, k: pattern.allows(q + start, k, h, b),  # a type checker wraps functions, not lambdas
        seq_lengths=lengths,
    )
    return made if device is None else made.to(device)


def _table(layout: BlockLayout, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the chosen blocks each row has, and which: ``[samples, heads, n_q_blocks (, n_kv_blocks)]``."""
    lead = (layout.samples, layout.heads, layout.n_q_blocks)
    row, col = layout.rows[chosen], layout.indices[chosen]
    counts = torch.bincount(row, minlength=len(layout.indptr) - 1)
    place = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    table = torch.zeros(len(counts), layout.n_kv_blocks, dtype=torch.int32)
    table[row, place] = col
    return counts.to(torch.int32).view(lead), table.view(*lead, layout.n_kv_blocks)


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
