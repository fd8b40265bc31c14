"""What a call's own mask allows, as a pattern where it is one: causality, a window, padding; else as a bias.

A mask of `[q_len, kv_len]` numbers says O(L) things, nearly always these three. Read back into a pattern it costs
what the pattern costs; whatever else it says stays a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.patterns import Causal, Columns, Full, Pattern, PerSample, Window, Within, per_sample
from regard.watch.padding import TILE, allowed, padding_of, survey

if TYPE_CHECKING:
    from regard.watch.call import Call

__all__ = ["OwnMask", "own_mask"]


@dataclass(frozen=True, eq=False)
class OwnMask:
    """What the model itself allows in a call."""

    shape: Pattern | None
    """`Full`, `Causal` or a `Window`, in each sample's own positions; None: no pattern, `bias` says it."""
    spans: tuple[tuple[int, int], ...]
    """Of each sample (one: all alike) where its tokens stand on the key axis, `[start, stop)`; below 0 where keys
    before the first that is held are gone."""
    columns: tuple[Columns | None, ...]
    """Of each sample the keys on that axis which any query may see, where it is not all of the span."""
    bias: Tensor | None
    """Added to the scores, -inf where the mask forbids."""
    valued: bool
    """The mask holds other values than 0 where it allows."""
    kv_len: int

    def around(self, pattern: Pattern, keep: bool, shifted: bool = True) -> Pattern:
        """`pattern` in each sample's own positions, with the model's own pattern (`keep`) and its padding in force.

        Not `shifted`: positions count on the padded axes, as cross-attention has them.
        """
        placed = []
        for part, (start, stop), columns in zip(self._each(pattern), self.spans, self.columns, strict=True):
            inner = out = both(part, self.shape) if keep and self.shape is not None else part
            if start == stop:
                out = both(inner, Columns(()))
            elif (start, stop) != (0, self.kv_len):
                out = Within(inner, start, stop) if shifted else both(inner, Columns(((start, stop),)))
            placed.append(out if columns is None else both(out, columns))
        return placed[0] if len(placed) == 1 else per_sample(placed)

    def _each(self, pattern: Pattern) -> Sequence[Pattern]:
        """The pattern of each of the spans."""
        count = len(self.spans)
        if pattern.samples is None or count == 1:
            return [pattern] * count
        if not isinstance(pattern, PerSample) or pattern.samples != count:
            raise ValueError(
                f"pattern must have per_sample([...]) outermost, with one for each of the {count} samples of this "
                f"padded batch, got one of {pattern.samples} samples in {type(pattern).__name__}"
            )
        return pattern.patterns


def both(a: Pattern, b: Pattern) -> Pattern:
    """``a & b``, without a part that the other one implies."""
    if isinstance(a, Full) or a == b:
        return b
    if isinstance(b, Full) or (b == Causal() and _looks_back(a)):
        return a
    return b if a == Causal() and _looks_back(b) else a & b


def _looks_back(pattern: Pattern) -> bool:
    return pattern == Causal() or (isinstance(pattern, Window) and pattern.right == 0)


def own_mask(call: Call) -> OwnMask:
    """Read the call's mask and padding; once a forward for layers that share the mask."""
    if call.mask is None and not call.is_causal:
        return _read(call, None)
    shared = call.layout.own_mask
    if shared is None:
        return _read(call, None)
    where = call.positions
    key = f"own mask {call.kind} {where.q_start} {where.first} {call.is_causal}"
    found = call.state.recall(key, shared)
    if found is None:
        found = _read(call, call.mask)
        call.state.note(key, shared, found)
    return found


def _read(call: Call, mask: Tensor | None) -> OwnMask:
    where, kv_len = call.positions, call.k.shape[2]
    if mask is None and not call.is_causal:
        spans, columns = _tokens(call, None)
        return OwnMask(Full(), spans, columns, None, False, kv_len)
    if mask is None and where.q_start == 0:
        spans, columns = _tokens(call, None)
        return OwnMask(Causal(), spans, columns, None, False, kv_len)
    if mask is None or call.is_causal:  # a causal call counts both axes from 0, wherever its queries stand
        corner = torch.ones(call.q.shape[2], kv_len, dtype=torch.bool, device=call.q.device).tril()[None, None]
        if mask is None:
            mask = corner
        else:
            mask = mask & corner if mask.dtype == torch.bool else mask.masked_fill(~corner, -torch.inf)
    keys = survey(call).keys if call.mask is not None else torch.ones(1, kv_len, dtype=torch.bool, device=mask.device)
    spans, columns = _tokens(call, keys)
    seen = _columns_mask(call, spans, columns)
    shape = next((p for p in _candidates(call, mask, spans) if _is(p, call, mask, seen)), None)
    pairs = None if mask.dtype == torch.bool and shape is not None else allowed(mask)
    valued = mask.dtype != torch.bool and bool((mask.masked_fill(~allowed(mask), 0) != 0).any())
    bias = None
    if valued:
        assert pairs is not None
        bias = mask.masked_fill(~pairs, -torch.inf)
    elif shape is None:
        assert pairs is not None
        bias = torch.zeros(pairs.shape, dtype=call.result_dtype, device=mask.device).masked_fill_(~pairs, -torch.inf)
    return OwnMask(shape, spans, columns, bias, valued, kv_len)


def _tokens(call: Call, keys: Tensor | None) -> tuple[tuple[tuple[int, int], ...], tuple[Columns | None, ...]]:
    """Where each sample's tokens stand on the key axis, and which of them some query may see."""
    where, kv_len = call.positions, call.k.shape[2]
    kv_first = 0 if call.kind == "cross" else where.first - where.q_start
    total = min(kv_len, where.total - kv_first)
    padding = padding_of(call, "keys")
    if padding is not None and not bool(padding.all()):
        # what lies beyond the padding mask counts as padding, as transformers reads it
        starts = padding.int().argmax(1).tolist()
        real = torch.zeros(len(padding), kv_len, dtype=torch.bool, device=padding.device)
        held = where.kv[: max(0, padding.shape[1] - kv_first)]
        real[:, : len(held)] = padding[:, held]
        real[:, total:] = False
        seen = real if keys is None else real & keys
    else:
        starts = [0] if keys is None else _shifts(call, keys)
        real = torch.ones(1, total, dtype=torch.bool)
        seen = real if keys is None else keys[:, :total]
    spans, columns = [], []
    for b in range(max(len(real), len(seen), len(starts))):
        mine = real[b % len(real)].nonzero().flatten()
        stop = int(mine[-1]) + 1 if len(mine) else 0
        start = min(starts[b % len(starts)] - kv_first, stop)
        spans.append((start, stop))
        runs = _runs(seen[b % len(seen)])
        whole = ((max(start, 0), stop),) if stop > max(start, 0) else ()
        columns.append(None if runs == whole else Columns(runs))
    if len(set(zip(spans, columns, strict=True))) == 1:
        return (spans[0],), (columns[0],)
    return tuple(spans), tuple(columns)


def _shifts(call: Call, keys: Tensor) -> list[int]:
    """Tokens of padding before each sample, from its position ids: masks prepared for static caches are all that is
    left of the padding, and a key that no query sees may also lie outside a window."""
    where, q_len = call.positions, call.q.shape[2]
    if call.kind == "cross":
        return [0]
    for frame in reversed(call.frames):
        ids = frame.bound.get("position_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == q_len:
            found = (where.first + q_len - 1 - ids[:, -1]).tolist()
            gone = where.first - where.q_start
            hidden = [n >= 0 and not bool(keys[b % len(keys), : max(0, n - gone)].any()) for b, n in enumerate(found)]
            return found if all(hidden) else [0]
    return [0]


def _runs(row: Tensor) -> tuple[tuple[int, int], ...]:
    """Half-open runs of True."""
    edge = torch.nn.functional.pad(row.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return tuple(zip(edge[::2], edge[1::2], strict=True))


def _columns_mask(call: Call, spans: tuple[tuple[int, int], ...], columns: tuple[Columns | None, ...]) -> Tensor:
    """Bool [samples or 1, kv_len]: the keys of `columns`, or of the whole span."""
    out = torch.zeros(len(spans), call.k.shape[2], dtype=torch.bool, device=call.q.device)
    for row, (start, stop), some in zip(out, spans, columns, strict=True):
        for lo, hi in ((max(start, 0), stop),) if some is None else some.intervals:
            row[lo:hi] = True
    return out


def _candidates(call: Call, mask: Tensor, spans: tuple[tuple[int, int], ...]) -> list[Pattern]:
    """Patterns that the mask may be, from what its last real row and its middle one see."""
    if call.kind == "cross" or mask.shape[2] == 1 < call.q.shape[2]:
        return [Full()]
    if not call.causal:
        return [Full(), *_windows(call, mask, spans, causal=False)]
    return [Causal(), *_windows(call, mask, spans, causal=True)]


def _windows(call: Call, mask: Tensor, spans: tuple[tuple[int, int], ...], causal: bool) -> list[Pattern]:
    sample = max(range(len(spans)), key=lambda b: spans[b][1] - spans[b][0])
    start, stop = spans[sample]
    q_start, q_len = call.positions.q_start, call.q.shape[2]
    last = min(stop, q_start + q_len) - 1 - q_start
    if last < 0 or q_start + last < max(start, 0):
        return []
    row = _runs(allowed(mask[sample % len(mask), 0, min(last, mask.shape[2] - 1)]))
    if not row:
        return []
    left = q_start + last - row[0][0]
    return [Window(left)] if causal else [Window(left, left)]


def _is(pattern: Pattern, call: Call, mask: Tensor, seen: Tensor) -> bool:
    """Whether the mask allows just the pattern's pairs with the keys `seen`, for every query that is no padding."""
    q_start, q_len, kv_len = call.positions.q_start, call.q.shape[2], call.k.shape[2]
    j = torch.arange(kv_len, device=mask.device)[None]
    differs = torch.zeros((), dtype=torch.bool, device=mask.device)
    for begin in range(0, q_len, TILE):
        i = torch.arange(begin, min(begin + TILE, q_len), device=mask.device) + q_start
        part = mask if mask.shape[2] == 1 else mask[:, :, begin : begin + TILE]
        wanted = (pattern.allows(i[:, None], j)[None] & seen[:, None])[:, None]
        real = torch.ones(1, 1, len(i), 1, dtype=torch.bool, device=mask.device)
        if call.kind == "self":
            real = seen[:, i.clamp(0, kv_len - 1)][:, None, :, None]
        differs |= ((allowed(part) != wanted) & real).any()
    return not bool(differs)
