"""Blocks of a pattern as runs of equal state: what layouts are made of.

The blocks of some query-block rows, in reading order, are one line of ``rows * cols`` cells. A block is absent, partial
or full; where a composition cannot tell yet, its state is the set of what it may be. The line is stored as the cells
where the state changes (and every start of a row), so complements and whole halves of a matrix cost nothing, and
``&``, ``|`` and ``~`` work on states without looking at pairs. `settle` asks `Pattern.allows` about what is left open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from regard.patterns.pattern import Pattern, Rows

__all__ = [
    "ABSENT",
    "AND",
    "FULL",
    "OR",
    "PARTIAL",
    "Frame",
    "States",
    "combine",
    "complement",
    "constant",
    "expand",
    "from_rows",
    "settle",
    "settle_cells",
    "transposed",
]

ABSENT, PARTIAL, FULL = 1, 2, 4  # sets of them: what the block may be
OPEN = np.array([bin(s).count("1") > 1 for s in range(8)])
PAIRS = 1 << 20  # pairs of an open block evaluated at once


class Frame(NamedTuple):
    """Queries and keys that a layout covers, in absolute indices, its block sizes, and the number of keys there are."""

    q_start: int
    q_len: int
    kv_start: int
    kv_len: int
    bq: int
    bk: int
    limit: int

    @property
    def n_q(self) -> int:
        """Query blocks."""
        return -(-self.q_len // self.bq)

    @property
    def n_kv(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.bk)


class States(NamedTuple):
    """Cells from ``at[n]`` to ``at[n + 1]`` have the state ``bits[n]``; ``at`` holds every start of a row."""

    at: np.ndarray
    bits: np.ndarray
    rows: int
    cols: int


def _table(partials: int, zero: int, one: int) -> np.ndarray:
    """Table of an operation on sets of states, from what it does to single ones."""

    def single(a: int, b: int) -> int:
        if zero in (a, b):
            return zero
        return b if a == one else a if b == one else partials

    singles = (ABSENT, PARTIAL, FULL)
    out = np.zeros((8, 8), np.uint8)
    for a in range(8):
        for b in range(8):
            for x in singles:
                for y in singles:
                    if a & x and b & y:
                        out[a, b] |= single(x, y)
    return out


AND = _table(ABSENT | PARTIAL, zero=ABSENT, one=FULL)
OR = _table(PARTIAL | FULL, zero=FULL, one=ABSENT)
NOT = np.array([(s & PARTIAL) | (FULL if s & ABSENT else 0) | (ABSENT if s & FULL else 0) for s in range(8)], np.uint8)


def constant(bits: int, rows: int, cols: int) -> States:
    """One state everywhere."""
    return States(np.arange(rows, dtype=np.int64) * cols, np.full(rows, bits, np.uint8), rows, cols)


def complement(a: States) -> States:
    """The states of the forbidden pairs."""
    return a._replace(bits=NOT[a.bits])


def combine(a: States, b: States, table: np.ndarray) -> States:
    """``table[state in a, state in b]`` cell by cell."""
    key = np.sort(np.concatenate([a.at * 2, b.at * 2 + 1]), kind="stable")  # merges two sorted runs
    side = (key & 1).astype(bool)
    nth_b = np.cumsum(side) - 1
    nth_a = np.arange(len(key)) - nth_b - 1
    at = key >> 1
    last = np.append(at[1:] != at[:-1], True)
    return _pack(at[last], table[a.bits[nth_a[last]], b.bits[nth_b[last]]], a.rows, a.cols)


def _pack(at: np.ndarray, bits: np.ndarray, rows: int, cols: int) -> States:
    """Drop the starts where nothing changes, but no start of a row."""
    keep = np.append(True, bits[1:] != bits[:-1]) | (at % cols == 0)
    return States(at[keep], bits[keep], rows, cols)


def transposed(a: States) -> States:
    """Rows and columns swapped."""
    lengths = np.diff(a.at, append=a.rows * a.cols)
    common = int(np.bincount(a.bits, weights=lengths, minlength=8).argmax())  # the state that most cells have
    chosen = a.bits != common
    cells, lengths = _cells(a, chosen)
    row, col = np.divmod(cells, a.cols)
    turned = col * a.rows + row
    order = np.argsort(turned, kind="stable")
    at, bits = turned[order], np.repeat(a.bits[chosen], lengths)[order]
    # Each cell, and what follows it: the common state, unless the next cell is one of these too.
    starts = constant(common, a.cols, a.rows)
    each = States(
        np.stack([at, at + 1], -1).ravel(), np.stack([bits, np.full_like(bits, common)], -1).ravel(), a.cols, a.rows
    )
    key = np.concatenate([starts.at * 4, each.at * 4 + np.tile([2, 1], len(at))])
    order = np.argsort(key, kind="stable")
    at, bits = key[order] >> 2, np.concatenate([starts.bits, each.bits])[order]
    last = np.append(at[1:] != at[:-1], True) & (at < a.rows * a.cols)
    return _pack(at[last], bits[last], a.cols, a.rows)


def from_rows(rows: Rows, run_row: np.ndarray, n_rows: int, frame: Frame) -> States:
    """States of blocks from the keys of runs of queries; ``run_row`` is the query-block row of each run."""
    cols, bk = frame.n_kv, frame.bk

    def keys(sets: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends = (sets.numpy() - frame.kv_start).clip(0, frame.kv_len)
        lo, hi = ends[..., 0], ends[..., 1]
        there = lo < hi
        return lo[there], hi[there], np.broadcast_to((run_row * cols)[:, None], lo.shape)[there]

    lo, hi, row = keys(rows.any)
    touched = row + lo // bk, row + (hi - 1) // bk + 1
    lo, hi, row = keys(rows.all)
    first, end = -(-lo // bk), np.where(hi == frame.kv_len, cols, hi // bk)
    some = first < end
    covered = (row + first)[some], (row + end)[some]
    starts = np.arange(n_rows, dtype=np.int64) * cols
    events = np.sort(
        np.concatenate([x * 8 + code for code, x in enumerate((*touched, *covered, starts))]), kind="stable"
    )
    at, code = events >> 3, events & 7
    n_touched = np.cumsum(np.array([1, -1, 0, 0, 0])[code])
    n_covered = np.cumsum(np.array([0, 0, 1, -1, 0])[code])
    last = np.append(at[1:] != at[:-1], True)
    at, n_touched, n_covered = at[last], n_touched[last], n_covered[last]
    inside = at < n_rows * cols
    at, n_touched, n_covered = at[inside], n_touched[inside], n_covered[inside]
    runs = np.bincount(run_row, minlength=n_rows)[at // cols]
    partial = PARTIAL | (0 if rows.exact[0] else ABSENT) | (0 if rows.exact[1] else FULL)
    bits = np.where(n_covered == runs, FULL, np.where(n_touched > 0, partial, ABSENT)).astype(np.uint8)
    return _pack(at, bits, n_rows, cols)


def _cells(states: States, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells of the chosen runs, in order, and the length of each run."""
    lengths = np.diff(states.at, append=states.rows * states.cols)[chosen]
    starts = states.at[chosen]
    ends = np.cumsum(lengths)
    step = np.ones(int(ends[-1]) if len(ends) else 0, np.int64)
    if len(step):
        step[0] = starts[0]
        step[ends[:-1]] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    return np.cumsum(step, out=step), lengths


def settle(states: States, pattern: Pattern, frame: Frame, first: int) -> States:
    """Ask `allows` about the open blocks: first their corners, then two queries, then all pairs of what is left."""
    chosen = OPEN[states.bits]
    if not chosen.any():
        return states
    cells, lengths = _cells(states, chosen)
    bits = settle_cells(cells + first * states.cols, np.repeat(states.bits[chosen], lengths), pattern, frame)
    at = np.concatenate([states.at[~chosen], cells])
    order = np.argsort(at, kind="stable")
    return _pack(at[order], np.concatenate([states.bits[~chosen], bits])[order], states.rows, states.cols)


def settle_cells(cells: np.ndarray, bits: np.ndarray, pattern: Pattern, frame: Frame) -> np.ndarray:
    """What open blocks are, given as ``row * cols + column`` of the whole frame."""
    bits = bits.copy()
    q_ends, k_ends = np.array([0, frame.bq - 1]), np.array([0, frame.bk - 1])
    every_q, every_k = np.arange(frame.bq), np.arange(frame.bk)
    for q_off, k_off in ((q_ends, k_ends), (q_ends, every_k), (every_q, every_k)):
        left = np.flatnonzero(OPEN[bits])
        step = max(1, PAIRS // (len(q_off) * len(k_off)))
        for n in range(0, len(left), step):
            part = left[n : n + step]
            i, j = np.divmod(cells[part], frame.n_kv)
            some, every = _probe(pattern, frame, i, j, q_off, k_off)
            bits[part] &= np.where(some, 7 - ABSENT, 7).astype(np.uint8) & np.where(every, 7, 7 - FULL).astype(np.uint8)
            if q_off is every_q:
                bits[part] = np.where(every, FULL, np.where(some, PARTIAL, ABSENT))
    return bits


def _probe(
    pattern: Pattern, frame: Frame, i: np.ndarray, j: np.ndarray, q_off: np.ndarray, k_off: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether some and whether every of these pairs of each block are allowed; a short block repeats its last index."""
    q = np.minimum(i[:, None] * frame.bq + q_off, frame.q_len - 1) + frame.q_start
    k = np.minimum(j[:, None] * frame.bk + k_off, frame.kv_len - 1) + frame.kv_start
    allowed = pattern.allows(torch.from_numpy(q)[:, :, None], torch.from_numpy(k)[:, None, :])
    allowed = allowed.expand(len(q), len(q_off), len(k_off)).flatten(1)
    return allowed.any(1).numpy(), allowed.all(1).numpy()


def expand(states: States) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(counts of each row, key block of each listed block, whether it is full)``."""
    lengths = np.diff(states.at, append=states.rows * states.cols)
    listed = states.bits != ABSENT
    row_starts = np.searchsorted(states.at, np.arange(states.rows, dtype=np.int64) * states.cols)
    counts = np.add.reduceat(np.where(listed, lengths, 0), row_starts)
    starts, lengths, full = (states.at % states.cols)[listed], lengths[listed], states.bits[listed] == FULL
    ends = np.cumsum(lengths)
    indices = np.ones(int(ends[-1]) if len(ends) else 0, np.int32)
    if len(indices):
        indices[0] = starts[0]
        indices[ends[:-1]] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    return counts, np.add.accumulate(indices, out=indices), np.repeat(full, lengths)
