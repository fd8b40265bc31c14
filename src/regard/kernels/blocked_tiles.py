"""Tiles out of tensors and back: strided views where a batch is regular, gathers where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.kernels.blocked_plan import Batch, Blocks

__all__ = ["Axis", "add_other", "additive", "allowed", "anchor_tokens", "other_tokens", "put_anchor", "take"]


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a plan: its block, its length in the plan's order, and that order."""

    block: int
    length: int
    order: Tensor | None = None  # token at each position, 0 where there is none; None: as they come

    def at(self, positions: Tensor) -> Tensor:
        """Tokens at these positions."""
        return positions if self.order is None else self.order[positions]


def anchor_tokens(batch: Batch, axis: Axis, tiles: slice) -> Tensor:
    """Positions of the anchor tokens, ``[tiles, size]``."""
    return batch.anchors[tiles, None] * axis.block + torch.arange(batch.size)


def other_tokens(batch: Batch, axis: Axis, tiles: slice) -> Tensor:
    """Positions of the tokens of the other axis, ``[tiles, n]``."""
    if batch.blocks is None:
        assert batch.shift is not None
        first = batch.start + batch.shift * torch.arange(len(batch))[tiles]
        return first[:, None] + torch.arange(batch.n)
    tokens = batch.blocks[tiles, :, None] * axis.block + torch.arange(axis.block)
    return tokens.flatten(1)[:, : batch.n]


def _view(x: Tensor, start: int, step: int, tiles: int, n: int) -> Tensor:
    """``[strips, tiles, n, width]`` of a contiguous ``[strips, length, width]``."""
    strips, length, width = x.shape
    return x.as_strided(
        (strips, tiles, n, width), (length * width, step * width, width, 1), x.storage_offset() + start * width
    )


def _select(x: Tensor, tokens: Tensor, buffer: Tensor | None) -> Tensor:
    strips, length, width = x.shape
    rows = tokens.flatten()
    if strips > 1:
        rows = (torch.arange(0, strips * length, length)[:, None] + rows).flatten()
    rows = rows.to(x.device)
    flat = x.reshape(strips * length, width)
    if buffer is None:
        found = flat.index_select(0, rows)
    else:
        found = buffer[: len(rows) * width].view(len(rows), width)
        torch.index_select(flat, 0, rows, out=found)
    return found.view(strips, *tokens.shape, width)


def take(x: Tensor, batch: Batch, axis: Axis, tiles: slice, anchor: bool, buffer: Tensor | None = None) -> Tensor:
    """Tiles ``[strips, tiles, tokens, width]`` of a contiguous ``[strips, length, width]``, on one of the axes.

    Without `buffer` what is gathered gets memory of its own.
    """
    lo, hi, _ = tiles.indices(len(batch))
    if axis.order is None and anchor and batch.step is not None:
        first = int(batch.anchors[lo]) * axis.block
        return _view(x, first, batch.step * axis.block, hi - lo, batch.size)
    if axis.order is None and not anchor and batch.shift is not None:
        return _view(x, batch.start + lo * batch.shift, batch.shift, hi - lo, batch.n)
    if not anchor and _whole(batch, axis, x.shape[1]):
        assert batch.blocks is not None
        strips, width = x.shape[0], x.shape[2]
        found = _select(x.view(strips, -1, axis.block * width), batch.blocks[tiles], buffer)
        return found.view(strips, hi - lo, batch.n, width)
    positions = (anchor_tokens if anchor else other_tokens)(batch, axis, tiles)
    return _select(x, axis.at(positions), buffer)


def _whole(batch: Batch, axis: Axis, length: int) -> bool:
    """Whether the tokens of each tile are whole blocks in memory."""
    if axis.order is not None or batch.blocks is None or length % axis.block:
        return False
    return batch.n == batch.blocks.shape[1] * axis.block


def put_anchor(x: Tensor, batch: Batch, axis: Axis, tiles: slice, values: Tensor) -> None:
    """Write tiles ``[strips, tiles, size, ...]`` to their anchor positions of ``[strips, length, ...]``."""
    lo, hi, _ = tiles.indices(len(batch))
    shaped = x if x.ndim == 3 else x[..., None]
    values = values if x.ndim == 3 else values[..., None]
    if batch.step is not None:
        first = int(batch.anchors[lo]) * axis.block
        _view(shaped, first, batch.step * axis.block, hi - lo, batch.size).copy_(values)
        return
    at = anchor_tokens(batch, axis, tiles).flatten().to(x.device)
    shaped.index_copy_(1, at, values.flatten(1, 2).to(x.dtype))


def add_other(x: Tensor, batch: Batch, axis: Axis, tiles: slice, values: Tensor) -> None:
    """Add tiles ``[strips, tiles, n, width]`` to what stands at their positions of ``[strips, length, width]``."""
    lo, hi, _ = tiles.indices(len(batch))
    strips, length, width = x.shape
    if axis.order is None and batch.shift is not None:
        step = batch.shift
        if step == 0 or hi - lo == 1:
            at = batch.start + lo * step
            x[:, at : at + batch.n] += values.sum(1) if hi - lo > 1 else values[:, 0]
            return
        for part in range(0, batch.n, step):  # slices that do not overlap from tile to tile
            end = min(part + step, batch.n)
            _view(x, batch.start + lo * step + part, step, hi - lo, end - part).add_(values[:, :, part:end])
        return
    b = axis.block
    if _whole(batch, axis, length):
        assert batch.blocks is not None
        rows, per = batch.blocks[tiles].flatten(), length // b
        to, add = x.view(strips * per, b * width), values.reshape(-1, b * width)
    else:
        rows, per = axis.at(other_tokens(batch, axis, tiles)).flatten(), length
        to, add = x.view(strips * length, width), values.reshape(-1, width)
    rows = (torch.arange(0, strips * per, per)[:, None] + rows).flatten().to(x.device)
    to.index_add_(0, rows, add.to(x.dtype))


def allowed(batch: Batch, blocks: Blocks, tiles: slice) -> Tensor | None:
    """Bool ``[1 or tiles, size, n]``; None: every pair."""
    if batch.kinds is not None:
        return blocks.in_call(batch, tiles)
    if batch.masks is None:
        return None
    return batch.masks if batch.which is None else batch.masks[batch.which[tiles]]


def additive(allow: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf where not."""
    return torch.zeros(allow.shape, dtype=dtype).masked_fill_(~allow, -torch.inf)
