"""What a static pattern says of the blocks that a route lists: full, absent, or which mask.

Only listed blocks are looked at. Pairs are evaluated in those that the intervals of `Pattern.rows` leave open, once for
all samples and heads, and once for all blocks at the same distance where a pattern depends on that alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regard.kernels.blocked_choice import shifts
from regard.patterns import states as st
from regard.patterns.pattern import Pattern
from regard.patterns.routed_layout import kinds as settled
from regard.patterns.static import Full

__all__ = ["ABSENT", "FULL", "Kinds", "Places"]

FULL, ABSENT = -1, -2  # beside the numbers of masks
PAIRS = 1 << 22  # evaluated at once
KEPT = 1 << 28  # pairs of masks that are kept; beyond, they are evaluated where they are needed
LATE = 1 << 40  # numbers of those masks


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of each block of an axis, on a CPU. Blocks of several orders stand one after the other."""

    tokens: Tensor  # int64 [blocks, size], 0 where there is none
    there: Tensor  # bool [blocks, size]
    low: np.ndarray  # [blocks] first token of the block
    stop: np.ndarray  # [blocks] after its last token; low = stop = 0 in a block of padding
    holes: np.ndarray  # [blocks] whether some place holds no token

    @classmethod
    def of(cls, order: Tensor | None, length: int, block: int, start: int = 0) -> Places:
        """Blocks of tokens ``start, start + 1, ..`` in order, or of ``order [orders, slots]`` plus start."""
        given = torch.arange(length)[None] if order is None else order.reshape(-1, order.shape[-1]).cpu()
        n = -(-given.shape[1] // block)
        slots = torch.nn.functional.pad(given, (0, n * block - given.shape[1]), value=-1).view(-1, block)
        there = slots >= 0
        tokens = torch.where(there, slots + start, 0)
        some = there.any(1)
        low = torch.where(there, slots + start, torch.iinfo(torch.int64).max).amin(1) if len(slots) else slots.sum(1)
        stop = torch.where(there, slots + start + 1, torch.iinfo(torch.int64).min).amax(1) if len(slots) else low
        low, stop = torch.where(some, low, 0), torch.where(some, stop, 0)
        return cls(tokens, there, low.numpy(), stop.numpy(), (~there.all(1)).numpy())


class Kinds:
    """The kinds of blocks and the masks they number. One for all patterns of a call."""

    def __init__(self, q: Places, k: Places, frame: st.Frame | None, kv_len: int) -> None:
        self.q, self.k, self.frame, self.kv_len = q, k, frame, kv_len  # frame: of blocks of tokens in order
        self.bits: list[Tensor] = []  # bool [masks, bq, bk] of each look
        self.table: Tensor | None = None  # all of them, and one that allows all
        self.late: list[tuple[int, Pattern, np.ndarray, np.ndarray]] = []  # first number, pattern, rows, columns
        self.kept, self.later = 0, LATE

    def of(self, pattern: Pattern | None, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """The kind of each block ``(rows, cols)``, numbers of `Places` blocks, under a pattern without heads."""
        holes = self.k.holes[cols]
        empty = self.k.stop[cols] == 0
        if pattern is None or isinstance(pattern, Full):
            full, absent = ~holes, empty
        else:
            full, absent = self._known(pattern, rows, cols)
            full, absent = full & ~holes, absent | empty
        kind = np.where(full, FULL, ABSENT)
        left = np.flatnonzero(~full & ~absent)
        if len(left):
            kind[left] = self._look(pattern or Full(), rows[left], cols[left])
        return kind

    def adopt(self, kind: np.ndarray, bits: Tensor) -> np.ndarray:
        """Kinds that another gave, whose masks are `bits`, in the numbers of this one."""
        self.bits.append(bits)
        self.kept += len(bits)
        return np.where(kind >= 0, kind + self.kept - len(bits), kind)

    def masks(self, kinds: np.ndarray) -> Tensor:
        """Bool ``[*kinds, bq, bk]``: what each block allows; FULL is all."""
        bq, bk = self.q.tokens.shape[1], self.k.tokens.shape[1]
        if self.table is None or len(self.table) != self.kept + 1:
            self.table = torch.cat([*self.bits, torch.ones(1, bq, bk, dtype=torch.bool)])
        flat = kinds.reshape(-1)
        out = self.table[torch.from_numpy(np.where((flat < 0) | (flat >= LATE), self.kept, flat))]
        for first, pattern, rows, cols in self.late:
            at = np.flatnonzero((flat >= first) & (flat < first + len(rows)))
            if len(at):
                out[torch.from_numpy(at)] = self._evaluate(pattern, rows[flat[at] - first], cols[flat[at] - first])
        return out.view(*kinds.shape, bq, bk)

    def _known(self, pattern: Pattern, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(surely full, surely absent)``, by the intervals of keys of each row's range of queries."""
        if self.frame is not None:
            bits = settled(pattern, self.frame, rows * self.frame.n_kv + cols)
            return bits == st.FULL, bits == st.ABSENT
        nothing = np.zeros(len(rows), bool)
        low, stop = self.q.low, np.maximum(self.q.stop, self.q.low + 1)
        if not len(rows) or len(pattern.cuts(int(low.min()), int(stop.max()))):
            return nothing, nothing
        found = pattern.rows(torch.from_numpy(low), torch.from_numpy(stop), self.kv_len)
        if found is None:
            return nothing, nothing
        full, meets = nothing.copy(), nothing.copy()
        k0, k1 = self.k.low[cols], self.k.stop[cols]
        for lo, hi in found.all.numpy()[rows].transpose(1, 2, 0):
            full |= (lo <= k0) & (k1 <= hi)
        for lo, hi in found.any.numpy()[rows].transpose(1, 2, 0):
            meets |= (lo < k1) & (k0 < hi)
        return full, ~meets

    def _look(self, pattern: Pattern, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Kinds of blocks whose pairs are evaluated, each different one once."""
        if self.frame is not None and shifts(pattern):
            gap = self.k.low[cols] - self.q.low[rows]
            code = (gap * 2 + self.k.holes[cols]) * 2 + self.q.holes[rows]  # short rows hold no queries at their end
        else:
            code = rows.astype(np.int64) * len(self.k.low) + cols
        _, first, which = np.unique(code, return_index=True, return_inverse=True)
        rows, cols = rows[first], cols[first]
        bq, bk = self.q.tokens.shape[1], self.k.tokens.shape[1]
        if len(rows) * bq * bk > KEPT:
            self.late.append((self.later, pattern, rows, cols))
            self.later += len(rows)
            return np.asarray(which, np.int64) + self.later - len(rows)
        step = max(1, PAIRS // (bq * bk))
        packed = []
        for n in range(0, len(rows), step):
            found = self._evaluate(pattern, rows[n : n + step], cols[n : n + step])
            packed.append(np.packbits(found.flatten(1).numpy(), axis=1))
        bits = np.concatenate(packed)
        different, number = np.unique(bits.view([("", f"V{bits.shape[1]}")]).ravel(), return_inverse=True)
        masks = torch.from_numpy(
            np.unpackbits(different.view(np.uint8).reshape(len(different), -1), axis=1, count=bq * bk)
        ).bool()
        masks = masks.view(-1, bq, bk)
        names = np.arange(len(masks)) + self.kept
        names[masks.flatten(1).all(1).numpy()] = FULL
        names[~masks.flatten(1).any(1).numpy()] = ABSENT
        self.bits.append(masks)
        self.kept += len(masks)
        return np.asarray(names[number][which], np.int64)

    def _evaluate(self, pattern: Pattern, rows: np.ndarray, cols: np.ndarray) -> Tensor:
        r, c = torch.from_numpy(np.asarray(rows, np.int64)), torch.from_numpy(np.asarray(cols, np.int64))
        q, k, there = self.q.tokens[r][:, :, None], self.k.tokens[c][:, None], self.k.there[c][:, None]
        return pattern.allows(q, k).expand(len(r), q.shape[1], k.shape[2]) & there
