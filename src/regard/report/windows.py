"""Exact weights of chosen windows of at most 256 x 256 tokens, and finer block maps, through the seam.

The rows of a window are normalised over every key, inside the window or not: what is shown is the model's own weight.
The matrix is never whole: the pass goes over tiles of rows and keeps the window, each row's heaviest keys and the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.kernels.stats import tile_pass
from regard.kernels.tiles import Frame, Reducer, Tile
from regard.watch.seam import Call, Seam

LIMIT = 256
TOP = 8

__all__ = ["LIMIT", "TOP", "Closeup", "Window", "close_up", "exact_weights"]


@dataclass(frozen=True)
class Window:
    """Queries `[rows[0], rows[1])` against keys `[keys[0], keys[1])`, positions on the token axis."""

    rows: tuple[int, int]
    keys: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (a, b) in (("rows", self.rows), ("keys", self.keys)):
            if not 0 <= a < b:
                raise ValueError(f"{name} must be (start, stop) with 0 <= start < stop, got ({a}, {b})")
            if b - a > LIMIT:
                raise ValueError(
                    f"{name} spans {b - a} tokens; a window is at most {LIMIT} x {LIMIT}: give several windows instead"
                )


class _Cut(Reducer):
    """The weights of a window: [b, h, rows, keys], rows and keys as indices of this call."""

    def __init__(self, rows: tuple[int, int], keys: tuple[int, int]) -> None:
        self.rows, self.keys = rows, keys

    def start(self, frame: Frame) -> tuple[Any, Any]:
        (r0, r1), (k0, k1) = self.rows, self.keys
        out = frame.zeros(r1 - r0, k1 - k0)

        def add(tile: Tile) -> None:
            a, b = max(r0, tile.rows.start), min(r1, tile.rows.stop)
            lo, hi = max(k0, tile.lo), min(k1, tile.hi)
            if a < b and lo < hi:
                out[tile.units, a - r0 : b - r0, lo - k0 : hi - k0] = tile.weights[
                    :, a - tile.rows.start : b - tile.rows.start, lo - tile.lo : hi - tile.lo
                ]

        return add, lambda: frame.per_head(out)


class _Heaviest(Reducer):
    """The `count` heaviest keys of each row of `[rows[0], rows[1])`: (weights, key indices), [b, h, rows, count]."""

    def __init__(self, rows: tuple[int, int], count: int) -> None:
        self.rows, self.count = rows, count

    def start(self, frame: Frame) -> tuple[Any, Any]:
        r0, r1 = self.rows
        weight = frame.zeros(r1 - r0, self.count)
        index = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)

        def add(tile: Tile) -> None:
            a, b = max(r0, tile.rows.start), min(r1, tile.rows.stop)
            if a >= b:
                return
            part = tile.weights[:, a - tile.rows.start : b - tile.rows.start]
            n = min(self.count, part.shape[-1])
            value, at = part.topk(n, -1)
            weight[tile.units, a - r0 : b - r0, :n] = value
            index[tile.units, a - r0 : b - r0, :n] = at + tile.lo

        return add, lambda: (frame.per_head(weight), frame.per_head(index))


class _BlockMap(Reducer):
    """Mass from each block of queries to each block of keys, per row: [b, h, size, size].

    Block b of n positions cut in `size` holds the positions with floor(size * position / n) = b.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def start(self, frame: Frame) -> tuple[Any, Any]:
        size = self.size
        out = frame.zeros(size, size)
        row_of = torch.arange(frame.q_len, device=frame.device) * size // frame.q_len
        key_of = torch.arange(frame.kv_len, device=frame.device) * size // frame.kv_len
        keys = torch.zeros(frame.kv_len, size, dtype=frame.dtype, device=frame.device)
        keys[torch.arange(frame.kv_len, device=frame.device), key_of] = 1
        count = torch.bincount(row_of, minlength=size).clamp(min=1).to(frame.dtype)

        def add(tile: Tile) -> None:
            blocks = row_of[tile.rows]
            first, last = int(blocks[0]), int(blocks[-1])
            rows = torch.zeros(last - first + 1, len(blocks), dtype=frame.dtype, device=frame.device)
            rows[blocks - first, torch.arange(len(blocks), device=frame.device)] = 1
            out[tile.units, first : last + 1] += (rows @ tile.weights) @ keys[tile.lo : tile.hi]

        return add, lambda: frame.per_head(out / count[:, None])


class _Received(Reducer):
    """What each key receives, as a share of the rows: [b, h, k] = sum_i P_ij / q_len."""

    def start(self, frame: Frame) -> tuple[Any, Any]:
        out = frame.zeros(frame.kv_len)

        def add(tile: Tile) -> None:
            out[tile.units, tile.lo : tile.hi] += tile.weights.sum(1)

        return add, lambda: frame.per_head(out / frame.q_len)


@dataclass
class Closeup:
    """What `close_up` saw of one attention layer (first sample)."""

    kind: str
    causal: bool
    q_len: int
    kv_len: int
    windows: list[tuple[Window, Tensor]] = field(default_factory=list)
    """Each window, cut to the layer's lengths, and its weights [heads, rows, keys]."""
    heaviest: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """For each window: weights and keys of the rows' heaviest keys anywhere, [heads, rows, count]."""
    received: Tensor | None = None
    """What each key receives, as a share of all rows: [heads, kv_len], sums to 1."""
    blocks: Tensor | None = None
    """Block map [heads, size, size]: the share of a query block's mass that a key block gets."""


def _label(call: Call, model: nn.Module) -> str:
    """The layer's name as the atlas has it."""
    name = call.layer or type(model).__name__
    return f"{name}#{call.index}" if call.index else name


def _rows(call: Call) -> dict[str, Any]:
    return {
        "mask": call.mask,
        "is_causal": call.is_causal,
        "scale": call.scale,
        "q_start": 0 if call.is_causal else call.q_start,
    }


class _Watcher:
    """Handler: fill one `Closeup` a layer from the prompt's first forward."""

    def __init__(self, model: nn.Module, windows: Sequence[Window], blocks: int | None, top: int) -> None:
        self.model, self.windows, self.blocks, self.top = model, windows, blocks, top
        self.seen: dict[str, Closeup] = {}

    def __call__(self, call: Call) -> None:
        label = _label(call, self.model)
        if label in self.seen or call.folded:
            return
        q, k = call.q[:1], call.k[:1]
        q_len, kv_len = q.shape[2], k.shape[2]
        options = _rows(call)
        if options["mask"] is not None:
            options["mask"] = options["mask"][:1]
        found = Closeup(call.kind, call.causal, q_len, kv_len)
        reducers: list[Reducer] = [_Received()]
        for window in self.windows:
            rows = (min(window.rows[0], q_len), min(window.rows[1], q_len))
            keys = (min(window.keys[0], kv_len), min(window.keys[1], kv_len))
            if rows[0] < rows[1] and keys[0] < keys[1]:
                found.windows.append((Window(rows, keys), torch.empty(0)))
                reducers += [_Cut(rows, keys), _Heaviest(rows, min(self.top, kv_len))]
        if self.blocks:
            reducers.append(_BlockMap(self.blocks))
        received, *results = tile_pass(q, k, reducers, **options)
        found.received = received[0].cpu()
        for i, (window, _) in enumerate(found.windows):
            found.windows[i] = (window, results[2 * i][0].cpu())
            found.heaviest.append((results[2 * i + 1][0][0].cpu(), results[2 * i + 1][1][0].cpu()))
        if self.blocks:
            found.blocks = results[-1][0].cpu()
        self.seen[label] = found


def close_up(
    model: nn.Module,
    inputs: Mapping[str, Any],
    windows: Sequence[Window],
    *,
    blocks: int | None = None,
    top: int = TOP,
) -> dict[str, Closeup]:
    """Run `model(**inputs)` once and look closely: exact windows, each row's heaviest keys, a finer block map.

    Args:
        model: any model the seam can watch.
        inputs: its keyword arguments; the first sample is looked at.
        windows: at most 256 x 256 tokens each; cut to a layer's lengths where those are shorter.
        blocks: blocks a side of the finer map, None for no such map.
        top: how many of each row's heaviest keys to keep, wherever they lie.

    Returns:
        One `Closeup` a layer, by its name in the atlas. Layers that fold windows into the batch are left out.
    """
    watcher = _Watcher(model, windows, blocks, top)
    with torch.no_grad(), Seam(model, watcher):
        model(**inputs)
    return watcher.seen


def exact_weights(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    rows: slice,
    keys: slice,
    layers: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Exact weights `P[i, j]` for queries i in `rows` and keys j in `keys`, by one run of `model(**inputs)`.

    `P_ij = exp(s_ij - lse_i)` with the lse over every key the query may see, so a row sums to less than 1 where mass
    lies outside the window.

    Args:
        model: any model the seam can watch.
        inputs: its keyword arguments.
        rows: queries, as indices of the call's query axis; at most 256.
        keys: keys, as indices of the call's key axis; at most 256.
        layers: names of layers as in the atlas; None for every layer.
        heads: query heads; None for all.

    Returns:
        For each layer, float32 weights `[batch, heads, rows, keys]` on the CPU (float64 for float64 models).

    Raises:
        ValueError: a window larger than 256 x 256 or past the end, a layer that made no call, a head it lacks.
    """
    window = Window(_bounds("rows", rows), _bounds("keys", keys))
    found: dict[str, Tensor] = {}

    def look(call: Call) -> None:
        label = _label(call, model)
        if label in found or (layers is not None and label not in layers):
            return
        q_len, kv_len = call.q.shape[2], call.k.shape[2]
        for name, stop, length in (("rows", window.rows[1], q_len), ("keys", window.keys[1], kv_len)):
            if stop > length:
                raise ValueError(f"{name} reaches {stop}, but layer {label!r} has {length}")
        if heads is not None and (bad := [h for h in heads if not 0 <= h < call.q.shape[1]]):
            raise ValueError(f"heads {bad} are not in layer {label!r}, which has {call.q.shape[1]}")
        options = _rows(call)
        a, b = window.rows
        if options["mask"] is not None and options["mask"].ndim > 1 and options["mask"].shape[-2] > 1:
            options["mask"] = options["mask"][..., a:b, :]
        options["q_start"] += a
        (weights,) = tile_pass(call.q[:, :, a:b], call.k, [_Cut((0, b - a), window.keys)], **options)
        found[label] = (weights if heads is None else weights[:, list(heads)]).cpu()

    with torch.no_grad(), Seam(model, look):
        model(**inputs)
    if layers is not None and (missing := [name for name in layers if name not in found]):
        raise ValueError(f"layers {missing} made no attention call; these did: {', '.join(found) or 'none of them'}")
    return found


def _bounds(name: str, part: slice) -> tuple[int, int]:
    if part.step not in (None, 1) or part.start is None or part.stop is None:
        raise ValueError(f"{name} must be slice(start, stop) with both given and no step, got {part}")
    return part.start, part.stop
