"""Patterns rounded up to whole blocks and stored as routes, so that a kernel runs them without masks.

A multi-diagonal touches a few keys of nearly every block in memory order and costs a kernel as much as dense attention;
with the frames of each place together it is one band. Columns are gathered once and are dense then.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import Order, Pattern, Routed
from regard.patterns.layout import block_size
from regard.patterns.order import with_ends
from regard.patterns.routed_layout import padded

__all__ = ["density_of", "one_head", "rounded", "rounded_columns"]

ROWS = 1024  # queries of a row that all see the same columns


def rounded(pattern: Pattern, length: int, block: int | tuple[int, int], order: Order | None = None) -> Routed:
    """Every block that holds an allowed pair, whole: no less than the pattern. Of all queries over all keys.

    Args:
        pattern: alike for all heads.
        length: tokens.
        block: tokens of a block, counted in the order.
        order: None: as they come. With one, pairs are evaluated to find the blocks.
    """
    if order is None:
        table = padded(pattern.layout(length, length, block, 0), torch.device("cpu"))
        return Routed.blocks(table.index, table.count, block=block, q_len=length, kv_len=length, q_start=0)
    slots = order.n_padded
    table = padded(pattern.permute(order).layout(slots, slots, block, 0), torch.device("cpu"))
    at = order.forward[None, None]
    return Routed.blocks(
        table.index, table.count, block=block, q_len=length, kv_len=length, q_start=0, q_order=at, kv_order=at
    )


def rounded_columns(
    columns: Int[Tensor, "heads count"], length: int, block: int | tuple[int, int], *, prefix: int = 0, suffix: int = 0
) -> Routed:
    """The same keys for every query, one list a head, rounded up by nothing: the keys are gathered into blocks.

    Args:
        columns: keys of each head, ascending; none of them text.
        length: tokens, text included.
        block: tokens of a block, or (queries, keys); without text rows are of up to `ROWS` queries in any case.
        prefix, suffix: text before and behind, which every query sees and whose queries see every key.
    """
    (size, block), heads = block_size(block), len(columns)
    ends = torch.cat([torch.arange(prefix), torch.arange(length - suffix, length)]).expand(heads, -1)
    listed = torch.cat([columns, ends], 1).sort(-1).values
    parts, rows = [_to_blocks(listed, block)], min(length, ROWS)
    if prefix + suffix == 0:
        blocks = torch.arange(parts[0].shape[1] // block).expand(1, heads, -(-length // rows), -1)
        return Routed.blocks(
            blocks.contiguous(), block=(rows, block), q_len=length, kv_len=length, q_start=0, kv_order=parts[0][None]
        )
    rows = min(size, rows)
    rest = torch.ones(heads, length, dtype=torch.bool).scatter_(1, listed, False)
    parts.append(_to_blocks(rest.nonzero()[:, 1].view(heads, -1), block))
    slots = torch.cat(parts, 1)
    q_order = with_ends(torch.arange(length - prefix - suffix), prefix, suffix, rows)
    whole, few = slots.shape[1] // block, parts[0].shape[1] // block
    row = torch.arange(len(q_order) // rows)
    text = (row < -(-prefix // rows)) | (row >= len(row) - -(-suffix // rows))
    count = torch.where(text, whole, few)
    index = torch.where(torch.arange(whole) < count[:, None], torch.arange(whole), -1)
    return Routed.blocks(
        index.expand(1, heads, -1, -1).contiguous(),
        count.expand(1, heads, -1).contiguous(),
        block=(rows, block),
        q_len=length,
        kv_len=length,
        q_start=0,
        q_order=q_order[None, None].expand(1, heads, -1).contiguous(),
        kv_order=slots[None],
    )


def _to_blocks(x: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=-1)


def one_head(pattern: Pattern, head: int) -> Pattern:
    """The pattern of one head; of a stored route it is a route again."""
    if pattern.heads is None and pattern.samples is None:
        return pattern
    if not isinstance(pattern, Routed) or pattern.index is None or pattern.keep is not None:
        return pattern.of(head)
    at = slice(pattern.decision(head), pattern.decision(head) + 1)

    def own(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, at]

    return replace(
        pattern,
        index=own(pattern.index),
        count=own(pattern.count),
        score=own(pattern.score),
        q_order=own(pattern.q_order),
        kv_order=own(pattern.kv_order),
        within=None if pattern.within is None else pattern.within.of(head),
        q_heads=None,
    )


def density_of(pattern: Pattern, q_len: int, kv_len: int) -> float:
    """`Pattern.density`; of stored blocks without a mask from their sizes, without looking at pairs."""
    r = pattern
    if not isinstance(r, Routed) or r.index is None or r.within is not None or r.keep is not None:
        return pattern.density(q_len, kv_len)
    r.fits(q_len, kv_len, r.q_start)
    assert r.count is not None
    sizes = []
    for order, length, size, n in (
        (r.q_order, q_len, r.block[0], r.n_rows),
        (r.kv_order, kv_len, r.block[1], r.n_columns),
    ):
        there = torch.ones(1, 1, length) if order is None else (order >= 0).float()
        there = torch.nn.functional.pad(there, (0, n * size - there.shape[2]))
        sizes.append(there.unflatten(2, (n, size)).sum(3).expand(r.batch, r.decisions, -1).double())
    rows, columns = sizes
    at = r.index.long().clamp(min=0)
    width = columns[:, :, None].expand(-1, -1, r.n_rows, -1).gather(3, at)
    counted = torch.arange(at.shape[3]) < r.count[..., None]
    pairs = (rows[..., None] * width * counted).sum()
    return float(pairs) / prod((r.batch, r.decisions, q_len, kv_len)) if q_len * kv_len else 0.0
