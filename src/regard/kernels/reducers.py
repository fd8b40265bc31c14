"""What a tile pass can hand out. Each class says what it returns; none keeps state between passes.

Shapes: b batch, h heads, q queries, k keys. All results are float32 (float64 for float64 input).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.tiles import Add, Frame, Reducer, Tile
from regard.patterns.pattern import Pattern

__all__ = [
    "Columns",
    "Entropy",
    "Features",
    "Gram",
    "Lse",
    "Offsets",
    "Pairs",
    "PatternMass",
    "Squares",
    "Top",
]

Start = tuple[Add | None, Callable[[], Any]]


class Lse(Reducer):
    """``lse_i = log sum_j exp(s_ij)``: [b, h, q], -inf for rows without a key. Includes the sink if there is one."""

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        return None, lambda: frame.per_head(frame.lse)


class Entropy(Reducer):
    """``H_i = -sum_j P_ij log P_ij = lse_i - sum_j P_ij s_ij``, nats: [b, h, q]; 0 for rows without a key.

    From the scores of the tile, of keys less their mean, so that it holds under a bias, a softcap and with half
    precision keys that share a large component. With a learned sink it is the entropy over keys and sink.
    """

    needs_entropy = True

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        return None, lambda: frame.per_head(frame.entropy)


class Columns(Reducer):
    """``sum_i w_ic P_ij`` for every key j and column c: [b, h, C, k].

    ``row_weights`` is [b or 1, q, C]. Indicator columns give block maps, group masses and received mass; a column that
    is zero on all rows of a tile costs nothing there.
    """

    def __init__(self, row_weights: Float[Tensor, "batch q_len columns"]) -> None:
        self.row_weights = row_weights

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        w = self.row_weights
        if w.shape[0] not in (1, frame.batch) or w.shape[1] != frame.q_len:
            raise ValueError(
                f"row_weights must be [batch or 1, q_len, columns] with batch {frame.batch} and q_len {frame.q_len}, "
                f"got {list(w.shape)}"
            )
        w = w.to(frame.device, frame.dtype)
        out = frame.zeros(w.shape[2], frame.kv_len)
        pieces = []
        for i0, i1 in frame.tiles:
            part = w[:, i0:i1]
            used = part.ne(0).flatten(0, 1).any(0).nonzero().flatten()
            pieces.append((_runs(used.tolist()), part[:, :, used].transpose(1, 2).contiguous()))

        def add(tile: Tile) -> None:
            runs, part = pieces[tile.n]
            if not runs:
                return
            if tile.count == 1:
                sums = part[tile.unit // frame.heads if len(part) > 1 else 0] @ tile.weights[0]
                into = out[tile.unit, :, tile.lo : tile.hi]
                for first, last, at in runs:
                    into[first:last].add_(sums[at : at + last - first])
                return
            sample = torch.arange(tile.unit, tile.unit + tile.count, device=frame.device) // frame.heads
            rows = part[sample] if len(part) > 1 else part.expand(tile.count, -1, -1)
            sums = rows @ tile.weights
            for first, last, at in runs:
                out[tile.units, first:last, tile.lo : tile.hi].add_(sums[:, at : at + last - first])

        return add, lambda: frame.per_head(out)


def _runs(used: list[int]) -> list[tuple[int, int, int]]:
    """Stretches of neighbouring numbers in a sorted list: (first, last + 1, where in the list it starts)."""
    starts = [n for n, x in enumerate(used) if n == 0 or x != used[n - 1] + 1]
    ends = [*starts[1:], len(used)] if used else []
    return [(used[a], used[b - 1] + 1, a) for a, b in zip(starts, ends, strict=True)]


class Offsets(Reducer):
    """``sum_i w_ic P[i, i - o]`` for each offset ``lo <= o < hi``: [b, h, C, hi - lo], i and j on the key axis.

    ``row_weights`` is [b or 1, q, C]; without it every row counts once and the result is [b, h, hi - lo]. Negative
    offsets are later keys. A tile's weights are read along their diagonals through a stride one longer than the row, so
    every offset costs one read of the tile, whatever their number.
    """

    needs_diagonals = True

    def __init__(self, lo: int, hi: int, row_weights: Float[Tensor, "batch q_len columns"] | None = None) -> None:
        if lo > hi:
            raise ValueError(f"lo must be <= hi, got lo={lo}, hi={hi}")
        self.lo, self.hi, self.row_weights = lo, hi, row_weights

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        lo, hi = self.lo, self.hi
        weights = torch.ones(1, frame.q_len, 1) if self.row_weights is None else self.row_weights
        if weights.shape[0] not in (1, frame.batch) or weights.shape[1] != frame.q_len:
            raise ValueError(
                f"row_weights must be [batch or 1, q_len, columns] with batch {frame.batch} and q_len {frame.q_len}, "
                f"got {list(weights.shape)}"
            )
        weights = weights.to(frame.device, frame.dtype).transpose(1, 2).contiguous()  # [b or 1, C, q]
        # Kept by ascending key, that is by descending offset: column x is offset hi - 1 - x.
        out = frame.zeros(weights.shape[1], hi - lo)

        def add(tile: Tile) -> None:
            rows, width = tile.rows.stop - tile.rows.start, tile.storage.shape[2]
            # Row r and sheared column c are key tile.lo + c + r, offset base - c.
            base = tile.rows.start + frame.start - tile.lo
            c0, c1 = max(-(rows - 1), base - hi + 1), min(tile.hi - tile.lo, base - lo + 1)
            if tile.causal:
                c1 = min(c1, base + 1)
            if c0 >= c1:
                return
            x0 = hi - 1 - base  # column c is kept at x0 + c
            w = weights
            if len(w) > 1:
                w = w[torch.arange(tile.units.start, tile.units.stop, device=frame.device) // frame.heads]
            if c1 > 0:  # row 0 starts at its own beginning
                f = max(c0, 0)
                out[tile.units, :, x0 + f : x0 + c1] += w[:, :, tile.rows.start, None] * tile.weights[:, :1, f:c1]
            if rows == 1:
                return
            first = tile.storage.storage_offset() + width + 1 + c0  # row 1, sheared column c0
            shape, stride = (tile.count, rows - 1, c1 - c0), (rows * width, width + 1, 1)
            diagonals = torch.as_strided(tile.storage, shape, stride, first)
            part = w[:, :, tile.rows.start + 1 : tile.rows.stop]
            if tile.count == 1:
                out[tile.unit, :, x0 + c0 : x0 + c1].add_(part[0] @ diagonals[0])
            else:
                out[tile.units, :, x0 + c0 : x0 + c1].add_(part.expand(tile.count, -1, -1) @ diagonals)

        if self.row_weights is None:
            return add, lambda: frame.per_head(out[:, 0].flip(-1))
        return add, lambda: frame.per_head(out.flip(-1))


class Features(Reducer):
    """``E_i = sum_j P_ij f_j`` for features of the key: [b, h, q, F]; ``features`` is [k, F]."""

    def __init__(self, features: Float[Tensor, "kv_len features"]) -> None:
        self.features = features

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        f = self.features.to(frame.device, frame.dtype)
        if len(f) != frame.kv_len:
            raise ValueError(f"features must be [kv_len, F] with kv_len = {frame.kv_len}, got {list(f.shape)}")
        out = frame.zeros(frame.q_len, f.shape[1])
        f = f.t().contiguous()  # a product with a narrow matrix is several times faster this way round

        def add(tile: Tile) -> None:
            out[tile.units, tile.rows] = torch.nn.functional.linear(tile.weights, f[:, tile.lo : tile.hi])

        return add, lambda: frame.per_head(out)


class Top(Reducer):
    """The largest weight of each row and its key: (weight [b, h, q], index [b, h, q]); 0.0 and -1 without a key.

    Among equal weights the index is one of them.
    """

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        index = torch.zeros(frame.batch * frame.heads, frame.q_len, dtype=torch.long, device=frame.device)

        def add(tile: Tile) -> None:
            index[tile.units, tile.rows] = _argmax(tile.weights) + tile.lo

        def finish() -> tuple[Tensor, Tensor]:
            return frame.per_head(frame.top), frame.per_head(index.masked_fill(frame.top == 0, -1))

        return add, finish


def _argmax(weights: Tensor, block: int = 64) -> Tensor:
    """Index of the largest in each row: first the block that holds it, then within it (argmax alone is slow)."""
    count = weights.shape[-1] // block
    if weights.device.type != "cpu" or count < 4:
        return weights.argmax(-1)
    head, tail = weights[..., : count * block], weights[..., count * block :]
    best, which = head.unflatten(-1, (count, block)).amax(-1).max(-1)
    at = which[..., None] * block + torch.arange(block, device=weights.device)
    found = which * block + weights.gather(-1, at).argmax(-1)
    if tail.shape[-1]:
        last, where = tail.max(-1)
        found = torch.where(last > best, where + count * block, found)
    return found


class Squares(Reducer):
    """``sum_j P_ij^2``, the inverse of the number of keys that share the mass: [b, h, q]."""

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len)

        def add(tile: Tile) -> None:
            out[tile.units, tile.rows] = torch.linalg.vector_norm(tile.weights, dim=-1).square_()

        return add, lambda: frame.per_head(out)


class PatternMass(Reducer):
    """``sum_{j : pattern allows (i, j)} P_ij`` for each pattern: [b, h, q, n].

    For windows and sinks alone `Offsets` and `Columns` give the sums over rows at less cost.
    """

    by_tile = True

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = tuple(patterns)

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = frame.zeros(frame.q_len, len(self.patterns))

        kept: dict[tuple[int, int, int, int], Tensor] = {}

        def meets(tile: Tile, n: int) -> Tensor:
            at = (tile.n, tile.lo, tile.hi, n)
            if at in kept:
                return kept[at]
            i = torch.arange(tile.rows.start, tile.rows.stop, device=frame.device)[:, None] + frame.start
            j = torch.arange(tile.lo, tile.hi, device=frame.device)[None]
            unit = torch.arange(tile.unit, tile.unit + tile.count, device=frame.device)[:, None, None]
            found = self.patterns[n].allows(i, j, unit % frame.heads, unit // frame.heads).to(frame.dtype)
            if found.ndim < 3:  # neither head nor sample matters
                if any(key[0] != tile.n for key in kept):
                    kept.clear()
                kept[at] = found
            return found

        def add(tile: Tile) -> None:
            for n in range(len(self.patterns)):
                out[tile.units, tile.rows, n] = torch.linalg.vecdot(tile.weights, meets(tile, n))

        return add, lambda: frame.per_head(out)


class Pairs(Reducer):
    """``sum_{j in rel(i)} P_ij`` for a relation between positions: [b, h, q], or with ``total`` the sum over i: [b, h].

    ``relation`` is a bool mask [b or 1, q, k] or [q, k], or a tuple of index tensors ``(q_idx, kv_idx)`` or
    ``(batch_idx, q_idx, kv_idx)``, one entry a pair, where q_idx counts the rows of q from 0. A pair listed twice
    counts twice. Cost: one read a pair; with ``total`` about six times less than by row.
    """

    def __init__(
        self,
        relation: Bool[Tensor, "batch q_len kv_len"] | Bool[Tensor, "q_len kv_len"] | tuple[Int[Tensor, "pairs"], ...],
        total: bool = False,
    ) -> None:
        self.total = total
        self.size: tuple[int, ...] | None = None  # of the mask: samples, rows, keys
        if isinstance(relation, Tensor):
            mask = relation[None] if relation.ndim == 2 else relation
            self.size = tuple(mask.shape)
            lists = mask.nonzero().unbind(1)
            relation = lists[1:] if len(mask) == 1 else lists
        if len(relation) not in (2, 3) or len({len(x) for x in relation}) != 1:
            raise ValueError(
                "relation must be (q_idx, kv_idx) or (batch_idx, q_idx, kv_idx), equally long, "
                f"got {len(relation)} tensors of {[len(x) for x in relation]} entries"
            )
        self.per_sample = len(relation) == 3
        i, j = relation[-2:]
        b = relation[0] if self.per_sample else torch.zeros_like(i)
        self.limits = [(int(x.min()), int(x.max())) if len(x) else (0, 0) for x in (b, i, j)]
        place = b * (self.limits[1][1] + 1) + i
        if bool((place[1:] < place[:-1]).any()):
            order = place.argsort(stable=True)
            b, i, j = b[order], i[order], j[order]
        self.lists = b, i, j

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        size = (frame.batch, frame.q_len, frame.kv_len)
        if self.size is not None and self.size not in (size, (1, *size[1:])):
            raise ValueError(f"relation must be [batch or 1, q_len, kv_len] = {list(size)}, got {list(self.size)}")
        for name, (low, high), n in zip(("batch_idx", "q_idx", "kv_idx"), self.limits, size, strict=True):
            if len(self.lists[0]) and (low < 0 or high >= n):
                raise ValueError(f"{name} must lie in [0, {n}), got {low} to {high}")
        b, i, j = (x.to(frame.device) for x in self.lists)
        out = frame.zeros() if self.total else frame.zeros(frame.q_len)
        samples = frame.batch if self.per_sample else 1
        bounds = torch.tensor([s * frame.q_len + t[0] for s in range(samples) for t in frame.tiles], device=i.device)
        edges = [*torch.searchsorted(b * frame.q_len + i, bounds).tolist(), len(i)]
        found: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}

        # Kept for the other heads, 4 bytes a pair.
        def places(tile: Tile, sample: int) -> tuple[Tensor, Tensor]:
            """Rows of the pairs in the tile, and their places in one unit's storage; the same for all heads."""
            width = tile.storage.shape[2]
            at = (tile.n, sample, tile.lo, width)
            if at not in found:
                e = sample * len(frame.tiles) + tile.n
                rows, keys = i[edges[e] : edges[e + 1]] - tile.rows.start, j[edges[e] : edges[e + 1]]
                keep = (keys >= tile.lo) & (keys < tile.hi)
                rows, keys = rows[keep], keys[keep] - tile.lo
                found[at] = rows, (rows * width + keys).int()
            return found[at]

        def add(tile: Tile) -> None:
            for u in range(tile.count):
                rows, flat = places(tile, (tile.unit + u) // frame.heads if self.per_sample else 0)
                weights = tile.storage[u].view(-1).index_select(0, flat)
                if self.total:
                    out[tile.unit + u].add_(weights.sum())
                else:
                    out[tile.unit + u, tile.rows].index_add_(0, rows, weights)

        return add, lambda: frame.per_head(out)


class Gram(Reducer):
    """``sum_ij P^h_ij P^g_ij`` for every two heads of a sample: [b, h, h]."""

    all_heads = True

    def start(self, frame: Frame) -> Start:
        """See `Reducer`."""
        out = torch.zeros(frame.batch, frame.heads, frame.heads, dtype=frame.dtype, device=frame.device)

        def add(tile: Tile) -> None:
            flat = tile.weights.reshape(-1, frame.heads, tile.weights[0].numel())
            b0 = tile.unit // frame.heads
            out[b0 : b0 + len(flat)] += flat @ flat.transpose(1, 2)

        return add, lambda: out
