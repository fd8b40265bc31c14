"""What the recorder takes from a tile pass beside the kernels' own reducers: figures that need positions or groups.

Shapes as in `regard.kernels.reducers`: b batch, h heads, q queries, k keys; i and j count on the key axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.kernels.tiles import Frame, Reducer, Tile

Start = tuple[Callable[[Tile], None], Callable[[], Any]]


def _positions(tile: Tile, frame: Frame) -> tuple[Tensor, Tensor]:
    i = torch.arange(tile.rows.start, tile.rows.stop, device=frame.device)[:, None] + frame.start
    return i, torch.arange(tile.lo, tile.hi, device=frame.device)[None]


def _samples(tile: Tile, frame: Frame) -> Tensor:
    return torch.arange(tile.units.start, tile.units.stop, device=frame.device) // frame.heads


class KeyWeights(Reducer):
    """``P[i, j]`` of a few keys: [b, h, q, n] for ``keys`` [b, n] on the key axis; -1 stands for no key (0)."""

    def __init__(self, keys: Int[Tensor, "batch n"]) -> None:
        self.keys = keys

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len, self.keys.shape[1])
        keys = self.keys.tolist()

        def add(tile: Tile) -> None:
            for sample in range(tile.units.start // frame.heads, (tile.units.stop - 1) // frame.heads + 1):
                u0 = max(tile.units.start, sample * frame.heads)
                u1 = min(tile.units.stop, (sample + 1) * frame.heads)
                for n, key in enumerate(keys[sample]):
                    if tile.lo <= key < tile.hi:
                        part = tile.weights[u0 - tile.units.start : u1 - tile.units.start, :, key - tile.lo]
                        out[u0:u1, tile.rows, n] = part

        return add, lambda: frame.per_head(out)


class GroupRows(Reducer):
    """``sum_{j in group} P_ij``: [b, h, q, G] for ``groups`` [b, k, G]."""

    def __init__(self, groups: Bool[Tensor, "batch kv_len groups"]) -> None:
        self.groups = groups

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len, self.groups.shape[2])
        features = self.groups.to(frame.dtype).transpose(1, 2).contiguous()  # the fast way round for few groups

        def add(tile: Tile) -> None:
            part = features[_samples(tile, frame), :, tile.lo : tile.hi]
            out[tile.units, tile.rows] = tile.weights @ part.transpose(1, 2)

        return add, lambda: frame.per_head(out)


class SameToken(Reducer):
    """Mass on earlier keys whose token is the row's: [b, h, q] = ``sum_{j < i, x_(j-shift) = x_i} P_ij``.

    shift 0: duplicates; 1: induction. Compares tokens in each tile, for texts where such pairs are many; where they
    are few `Pairs` with a list is cheaper.
    """

    by_tile = True

    def __init__(self, row_ids: Int[Tensor, "batch q_len"], key_ids: Int[Tensor, "batch kv_len"]) -> None:
        self.row_ids, self.key_ids = row_ids, key_ids

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len)
        known: dict[tuple[int, int, int, int], Tensor] = {}

        def related(sample: int, tile: Tile) -> Tensor:
            at = (tile.n, sample, tile.lo, tile.hi)
            if at in known:
                return known[at]
            i, j = _positions(tile, frame)
            same = self.row_ids[sample, tile.rows, None] == self.key_ids[sample, None, tile.lo : tile.hi]
            mask = (same & (j < i)).to(frame.dtype)
            if any(key[0] != tile.n for key in known):
                known.clear()
            known[at] = mask  # for the other heads of this tile
            return mask

        def add(tile: Tile) -> None:
            for sample in range(tile.units.start // frame.heads, (tile.units.stop - 1) // frame.heads + 1):
                u0 = max(tile.units.start, sample * frame.heads)
                u1 = min(tile.units.stop, (sample + 1) * frame.heads)
                part = tile.weights[u0 - tile.units.start : u1 - tile.units.start]
                out[u0:u1, tile.rows] = torch.linalg.vecdot(part, related(sample, tile))

        return add, lambda: frame.per_head(out)


class Clipped(Reducer):
    """``sum_{j <= i} P_ij min(i-j, most)``: [b, h, q]."""

    def __init__(self, most: int) -> None:
        self.most = most

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len)

        def add(tile: Tile) -> None:
            i, j = _positions(tile, frame)
            out[tile.units, tile.rows] = (tile.weights * (i - j).clamp(0, self.most)).sum(-1)

        return add, lambda: frame.per_head(out)


class Banded(Reducer):
    """``sum over rows with lo <= i-j <= hi of P_ij`` for every key: [b, h, k]."""

    def __init__(self, lo: int, hi: int) -> None:
        self.lo, self.hi = lo, hi

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.kv_len)

        def add(tile: Tile) -> None:
            i, j = _positions(tile, frame)
            band = (i - j >= self.lo) & (i - j <= self.hi)
            out[tile.units, tile.lo : tile.hi] += (tile.weights * band).sum(-2)

        return add, lambda: frame.per_head(out)


class Rings(Reducer):
    """Mass from patches to patches at each Chebyshev distance, by row: [b, h, q, R].

    The grid's patches are the keys ``prefix .. prefix + height * width - 1`` in row-major order; rows and keys
    outside it are in no ring.
    """

    def __init__(self, height: int, width: int, prefix: int) -> None:
        self.height, self.width, self.prefix = height, width, prefix

    @property
    def count(self) -> int:
        """Rings of the grid, the patch itself being ring 0."""
        return max(self.height, self.width)

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len, self.count + 1)
        cells = self.height * self.width

        def add(tile: Tile) -> None:
            i, j = (x - self.prefix for x in _positions(tile, frame))
            inside = (i >= 0) & (i < cells) & (j >= 0) & (j < cells)
            up = (i // self.width - j // self.width).abs()
            side = (i % self.width - j % self.width).abs()
            ring = torch.where(inside, torch.maximum(up, side), self.count).expand(tile.weights.shape)
            out[tile.units, tile.rows] = (
                frame.zeros(1)[0].expand(*ring.shape[:2], self.count + 1).scatter_add(2, ring, tile.weights)
            )

        return add, lambda: frame.per_head(out)[..., : self.count]
