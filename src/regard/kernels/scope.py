"""Which keys the rows of a tile may see: mask, causality, pattern and valid rows, brought to one form."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from regard.patterns import intervals
from regard.patterns.pattern import Pattern

__all__ = ["NOTHING", "Scope", "Span", "make_scope"]

NOTHING = -1e30  # the score of a pair that is not allowed; finite, so that 0 * score is 0


@dataclass(frozen=True)
class Span:
    """Keys of a tile: none outside ``[lo, hi)`` is allowed, every one in ``[full_lo, full_hi)`` is, to all its rows."""

    lo: int
    hi: int
    full_lo: int
    full_hi: int

    def cover(self, other: Span) -> Span:
        """The span of two tiles that are worked on together."""
        full_lo, full_hi = max(self.full_lo, other.full_lo), min(self.full_hi, other.full_hi)
        return Span(min(self.lo, other.lo), max(self.hi, other.hi), full_lo, max(full_lo, full_hi))

    def both(self, other: Span) -> Span:
        """The span of keys that both allow."""
        lo, full_lo = max(self.lo, other.lo), max(self.full_lo, other.full_lo)
        hi, full_hi = max(lo, min(self.hi, other.hi)), max(full_lo, min(self.full_hi, other.full_hi))
        return Span(lo, hi, full_lo, full_hi)


@dataclass
class Scope:
    """The allowed pairs of a call, its additive bias and its valid rows. Made by `make_scope`."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    start: int
    causal: bool
    allowed: Tensor | None  # bool mask [b|1, h|1, q|1, kv|1]
    bias: Tensor | None  # additive mask, same shape, no NaN, no +inf
    pattern: Pattern | None
    invalid: Tensor | None  # bool [b|1, q], True: the row counts for nothing
    device: torch.device
    triangles: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    tile_masks: dict[tuple[tuple[int, int], int, int], Tensor] = field(default_factory=dict)

    def may_be_empty(self) -> bool:
        """Whether some row may have no key (or is not valid)."""
        edge = self.causal and self.start < 0
        return edge or not (
            self.allowed is None and self.bias is None and self.pattern is None and self.invalid is None
        )

    def spans(self, tiles: list[tuple[int, int]]) -> list[list[Span]]:
        """``spans[t][b]`` for row tiles ``[i0, i1)``; one entry in b if all samples have the same."""
        whole = Span(0, self.kv_len, 0, self.kv_len)
        out = [[whole] for _ in tiles]
        if self.causal:
            for n, (i0, i1) in enumerate(tiles):
                end = min(self.kv_len, max(0, i1 + self.start))
                full = min(self.kv_len, max(0, i0 + 1 + self.start))
                out[n] = [Span(0, end, 0, full)]
        if self.pattern is not None:
            for n, span in enumerate(self._pattern_spans(tiles)):
                out[n] = [span.both(out[n][0])]
        if self.allowed is not None:
            for n, per_batch in enumerate(self._mask_spans(tiles)):
                out[n] = [span.both(out[n][0]) for span in per_batch]
        return out

    def key_intervals(self, tiles: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]] | None:
        """For each tile, what the pattern may allow some row, and what it allows all of them: ``[m, 2]`` each.

        None if there is no closed form.
        """
        assert self.pattern is not None
        starts = torch.tensor([i0 + self.start for i0, _ in tiles] + [tiles[-1][1] + self.start])
        cuts = self.pattern.cuts(int(starts[0]), int(starts[-1]))
        edges = torch.cat([starts, cuts]).unique()
        rows = self.pattern.rows(edges[:-1], edges[1:], self.kv_len)
        if rows is None:
            return None
        first = torch.searchsorted(edges, starts).tolist()
        out = []
        for a, b in pairwise(first):
            some, every = rows.any[a], rows.all[a]
            if b - a > 1:  # a tile in pieces: nothing is said of keys that all its rows see
                some, every = intervals.clip(rows.any[a:b].reshape(1, -1, 2), self.kv_len)[0], every[:0]
            out.append((some[some[:, 0] < some[:, 1]], every))
        return out

    def _pattern_spans(self, tiles: list[tuple[int, int]]) -> list[Span]:
        found = self.key_intervals(tiles)
        if found is None:  # no closed form: look at the pairs themselves, tile by tile
            return [Span(0, self.kv_len, 0, 0) for _ in tiles]
        out = []
        for some, every in found:
            lo, hi = (int(some[0, 0]), int(some[-1, 1])) if len(some) else (0, 0)
            full = every[(every[:, 1] - every[:, 0]).argmax()].tolist() if len(every) else (0, 0)
            out.append(Span(lo, hi, full[0], full[1]))
        return out

    def _mask_spans(self, tiles: list[tuple[int, int]]) -> list[list[Span]]:
        assert self.allowed is not None
        mask = self.allowed
        keys = torch.arange(self.kv_len, device=mask.device)
        found = []
        for i0, i1 in tiles:
            part = mask if mask.shape[2] == 1 else mask[:, :, i0:i1]
            some = part.flatten(1, 2).any(1).expand(-1, self.kv_len)
            every = part.flatten(1, 2).all(1).expand(-1, self.kv_len)
            lo = torch.where(some, keys, self.kv_len).amin(1)
            hi = torch.where(some, keys + 1, 0).amax(1)
            # One full stretch is enough: from the first key that every row sees on.
            full_lo = torch.where(every, keys, self.kv_len).amin(1)
            full_hi = torch.where(~every & (keys > full_lo[:, None]), keys, self.kv_len).amin(1)
            found.append(torch.stack([torch.minimum(lo, hi), hi, torch.minimum(full_lo, full_hi), full_hi], 1))
        if not found:
            return []
        return [[Span(*row) for row in rows] for rows in torch.stack(found).tolist()]

    def forbid(self, scores: Tensor, units: tuple[int, int], rows: tuple[int, int], span: Span) -> None:
        """Add the bias to the scores ``[units, rows, span]`` and set what is not allowed to `NOTHING`, in place."""
        if self.bias is not None:
            piece = self._piece(self.bias, units, rows, slice(span.lo, span.hi))
            scores.add_(piece).clamp_(min=NOTHING)
        # Only keys outside the stretch that all rows may see need a look.
        parts = [(span.lo, span.hi)]
        if span.full_lo < span.full_hi:
            parts = [(span.lo, max(span.lo, span.full_lo)), (min(span.hi, span.full_hi), span.hi)]
        for lo, hi in parts:
            if lo < hi:
                self._forbid(scores[:, :, lo - span.lo : hi - span.lo], units, rows, slice(lo, hi))

    def forbid_at(self, scores: Tensor, units: tuple[int, int], rows: tuple[int, int], keys: Tensor) -> None:
        """The same for scores at a list of keys, ``[units, rows, keys]``."""
        if self.bias is not None:
            scores.add_(self._piece(self.bias, units, rows, keys)).clamp_(min=NOTHING)
        self._forbid(scores, units, rows, keys)

    def forbid_pairs(self, scores: Tensor, rows: Tensor, keys: Tensor) -> None:
        """The same for scores of a list of pairs, ``[batch * heads, pairs]``; rows count from 0."""
        shaped = scores.view(self.batch, self.heads, -1)
        for mask in (self.bias, self.allowed):
            if mask is not None:
                r, c = (i if n > 1 else torch.zeros_like(i) for i, n in zip((rows, keys), mask.shape[2:], strict=True))
                part = mask[:, :, r, c]
                if mask is self.bias:
                    shaped.add_(part).clamp_(min=NOTHING)
                else:
                    shaped.masked_fill_(~part, NOTHING)
        queries = rows + self.start
        if self.causal:
            shaped.masked_fill_(keys > queries, NOTHING)
        if self.pattern is not None:
            head = torch.arange(self.heads, device=self.device)[:, None]
            batch = torch.arange(self.batch, device=self.device)[:, None, None]
            shaped.masked_fill_(~self.pattern.allows(queries, keys, head, batch), NOTHING)
        if self.invalid is not None:
            shaped.masked_fill_(self.invalid[:, None, rows], NOTHING)

    def _forbid(self, scores: Tensor, units: tuple[int, int], rows: tuple[int, int], keys: slice | Tensor) -> None:
        if self.causal:
            scores.masked_fill_(self._later(rows, keys), NOTHING)
        if self.allowed is not None:
            scores.masked_fill_(~self._piece(self.allowed, units, rows, keys), NOTHING)
        if self.pattern is None:
            return
        i = torch.arange(rows[0] + self.start, rows[1] + self.start, device=self.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=self.device) if isinstance(keys, slice) else keys
        scores.masked_fill_(self._forbidden(units, rows, keys, i, j[None]), NOTHING)

    def _forbidden(
        self, units: tuple[int, int], rows: tuple[int, int], keys: slice | Tensor, i: Tensor, j: Tensor
    ) -> Tensor:
        """Bool, broadcastable to [units, rows, keys]: the pattern forbids the pair. Kept until the tile changes."""
        assert self.pattern is not None
        at = (rows, keys.start, keys.stop) if isinstance(keys, slice) else None
        if at is not None and at in self.tile_masks:
            return self.tile_masks[at]
        unit = torch.arange(*units, device=self.device)[:, None, None]
        found = ~self.pattern.allows(i, j, unit % self.heads, unit // self.heads)
        if at is not None and found.ndim < 3:  # neither head nor sample matters
            if any(key[0] != rows for key in self.tile_masks):
                self.tile_masks.clear()
            self.tile_masks[at] = found
        return found

    def _later(self, rows: tuple[int, int], keys: slice | Tensor) -> Tensor:
        """Bool [rows, keys]: the key comes after the query. Most tiles of a pass need the same few triangles."""
        count, first = rows[1] - rows[0], rows[0] + self.start
        if isinstance(keys, Tensor):
            return keys > torch.arange(first, first + count, device=self.device)[:, None]
        shape = (count, keys.stop - keys.start, keys.start - first)
        found = self.triangles.get(shape)
        if found is None:
            if len(self.triangles) >= 8:
                self.triangles.clear()
            found = torch.ones(shape[:2], dtype=torch.bool, device=self.device).triu_(1 - shape[2])
            self.triangles[shape] = found
        return found

    def _piece(self, mask: Tensor, units: tuple[int, int], rows: tuple[int, int], keys: slice | Tensor) -> Tensor:
        """The mask for some units (flat batch * heads), rows and keys, broadcastable to ``[units, rows, keys]``."""
        part = mask if mask.shape[2] == 1 else mask[:, :, rows[0] : rows[1]]
        part = part if part.shape[3] == 1 else part[..., keys]
        if part.shape[0] == part.shape[1] == 1:
            return part[0]
        unit = torch.arange(units[0], units[1], device=mask.device)
        batch = unit // self.heads if part.shape[0] > 1 else torch.zeros_like(unit)
        head = unit % self.heads if part.shape[1] > 1 else torch.zeros_like(unit)
        if units[1] - units[0] == 1:
            return part[int(batch[0]), int(head[0])][None]
        return part[batch, head]


def make_scope(
    shape: tuple[int, int, int, int],
    device: torch.device,
    *,
    mask: Tensor | None,
    is_causal: bool,
    pattern: Pattern | None,
    q_start: int | None,
    valid: Tensor | None,
) -> Scope:
    """Check the arguments that say which pairs are allowed; ``shape`` is (batch, heads, q_len, kv_len)."""
    batch, heads, q_len, kv_len = shape
    start = q_start if q_start is not None else 0 if is_causal else kv_len - q_len
    allowed = bias = None
    if mask is not None:
        if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(
                f"mask must broadcast to [batch, heads, q_len, kv_len] = {list(shape)}, got {list(mask.shape)}"
            )
        mask = mask.detach().reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        if mask.device != device:
            raise ValueError(f"mask must be on the device of q, {device}, got {mask.device}")
        if mask.dtype == torch.bool:
            allowed = mask
        elif mask.is_floating_point():
            if bool((mask.isnan() | (mask == torch.inf)).any()):
                raise ValueError(
                    "mask is additive and holds NaN or +inf; use finite values, and -inf for forbidden pairs"
                )
            bias = mask
        else:
            raise ValueError(f"mask must be bool (True = allowed) or floating point (added), got {mask.dtype}")
    if pattern is not None and not isinstance(pattern, Pattern):
        raise ValueError(f"pattern must be a regard Pattern, got {type(pattern).__name__}; a tensor goes to mask=")
    invalid = None
    if valid is not None:
        if valid.dtype != torch.bool or valid.ndim != 2 or valid.shape[0] not in (1, batch) or valid.shape[1] != q_len:
            raise ValueError(
                f"valid must be bool [batch, q_len] = [{batch}, {q_len}], got {valid.dtype} {list(valid.shape)}"
            )
        if not bool(valid.all()):
            invalid = ~valid.to(device)
    return Scope(batch, heads, q_len, kv_len, start, is_causal, allowed, bias, pattern, invalid, device)
