"""Heads in groups that run together: those of one pattern, and of one kv head where keys are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regard.kernels.blocked_choice import Plan, make_plan
from regard.kernels.routed_tiles import Tiles
from regard.patterns.layout import BlockLayout
from regard.patterns.pattern import Pattern

__all__ = ["Call", "Strip", "flat", "strips"]


class Strip(NamedTuple):
    """Rows of the flat ``[batch * heads]`` and ``[batch * kv_heads]`` axes that one plan serves in one go."""

    plan: Plan
    q: slice | Tensor
    kv: slice | Tensor
    shared: bool  # the one kv head is read by all of these query heads


@dataclass(frozen=True, eq=False)
class Call:
    """What a kernel needs to know beside q, k, v and the bias."""

    pattern: Pattern
    layout: BlockLayout | None
    q_start: int
    scale: float
    softcap: float | None
    normalize: object
    tiles: Tiles | None = None  # of a route: neither layout nor plan


def flat(x: Tensor) -> Tensor:
    """``[batch, heads, length, width]`` as contiguous ``[batch * heads, length, width]``."""
    return x.contiguous().view(-1, *x.shape[2:])


def strips(call: Call, q: Tensor, k: Tensor, keys: bool = False) -> Iterator[Strip]:
    """Strips that together are all heads of all samples; anchors are blocks of keys with `keys`."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = heads // kv_heads
    parts: dict[Pattern | int, tuple[Pattern, list[tuple[int, int]]]] = {}
    laid = (call.layout.heads, call.layout.samples) if call.layout is not None else (1, 1)
    if (call.pattern.heads, call.pattern.samples, *laid) == (None, None, 1, 1):
        plan = make_plan(call.pattern, q_len, kv_len, call.q_start, keys, call.layout)
        if group == 1:
            yield Strip(plan, slice(None), slice(None), False)
        else:
            for u in range(batch * kv_heads):
                yield Strip(plan, slice(u * group, (u + 1) * group), slice(u, u + 1), True)
        return
    for b in range(batch):
        for h in range(heads):
            part = call.pattern.of(h, b)
            name: Pattern | int = part if laid == (1, 1) and part.__hash__ is not None else b * heads + h
            parts.setdefault(name, (part, []))[1].append((b, h))
    for part, members in parts.values():
        layout = None if call.layout is None else _of(call.layout, *members[0])
        plan = make_plan(part, q_len, kv_len, call.q_start, keys, layout)
        if group == 1:
            rows = torch.tensor([b * heads + h for b, h in members])
            yield Strip(plan, rows, rows, False)
            continue
        units: dict[int, list[int]] = {}
        for b, h in members:
            units.setdefault(b * kv_heads + h // group, []).append(b * heads + h)
        for unit, rows_of in units.items():
            yield Strip(plan, torch.tensor(rows_of), slice(unit, unit + 1), True)


def _of(layout: BlockLayout, sample: int, head: int) -> BlockLayout:
    """The layout of one head of one sample."""
    if layout.heads * layout.samples == 1:
        return layout
    n = layout.n_q_blocks
    row = ((sample if layout.samples > 1 else 0) * layout.heads + (head if layout.heads > 1 else 0)) * n
    indptr = layout.indptr[row : row + n + 1]
    at = slice(int(indptr[0]), int(indptr[-1]))
    return BlockLayout(
        indptr - indptr[0], layout.indices[at], layout.full[at], layout.q_len, layout.kv_len, layout.block
    )
