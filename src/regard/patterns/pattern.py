"""A pattern: which queries may meet which keys.

An immutable value. Everything follows from one predicate over absolute indices, ``allows(q_idx, kv_idx)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals
from regard.patterns import states as st
from regard.patterns.layout import BlockLayout, block_size

if TYPE_CHECKING:
    from regard.patterns.order import Order
    from regard.patterns.picture import Picture

__all__ = ["Pattern", "Rows", "resolve_q_start"]

CHUNK = 1 << 22  # pairs evaluated at once when a pattern has no closed form
CELLS = 1 << 15  # runs of equal blocks worked on at once


def resolve_q_start(q_len: int, kv_len: int, q_start: int | None) -> int:
    """The absolute index of the first query. ``None``: the queries are the last ones, as in decoding."""
    if q_len < 0 or kv_len < 0:
        raise ValueError(f"q_len and kv_len must be >= 0, got q_len={q_len}, kv_len={kv_len}")
    return kv_len - q_len if q_start is None else q_start


class Rows(NamedTuple):
    """Keys of each run of queries, as disjoint sorted intervals ``[runs, m, 2]``, empties ``(0, 0)``.

    ``any``: keys that some query of the run may see; ``all``: keys that every query of it may see.
    ``exact[0]`` False: ``any`` may hold too much. ``exact[1]`` False: ``all`` may hold too little.
    """

    any: Tensor
    all: Tensor
    exact: tuple[bool, bool] = (True, True)


class Pattern(ABC):
    """Which (query, key) pairs are allowed. Immutable, comparable, hashable; combine with ``&``, ``|`` and ``~``.

    Indices are absolute, from 0. Where the queries are not the whole sequence, ``q_start`` is the index of
    the first one (``None``: they are the last ``q_len`` of ``kv_len``).
    """

    @abstractmethod
    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Whether each pair is allowed; the arguments broadcast against each other.

        ``head`` and ``batch`` matter only to patterns that differ between heads or samples.
        """

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Positions strictly inside ``(a, b)`` that no run of queries may cross in `rows`."""
        return torch.zeros(0, dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """Keys of the runs of queries ``[q0, q1)`` in closed form; None for a pattern that has none."""
        return None

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Raise ValueError where the pattern is bound to a shape that this is not. Default: any shape is fine."""
        return

    @property
    def heads(self) -> int | None:
        """How many heads the pattern tells apart; None: all are alike."""
        return None

    @property
    def samples(self) -> int | None:
        """How many samples of a batch the pattern tells apart; None: all are alike."""
        return None

    @property
    def span(self) -> int | None:
        """How many positions the pattern is defined on, ``[0, span)``; None: any index."""
        return None

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """The pattern of one head of one sample, which tells none apart."""
        if self.heads is None and self.samples is None:
            return self
        from regard.patterns.wrapped import OneOf

        return OneOf(self, head, sample)

    @property
    def closed_form(self) -> bool:
        """Whether layouts follow from `rows`; False: pairs are evaluated."""
        return type(self).rows is not Pattern.rows

    def states(self, frame: st.Frame, first: int, last: int) -> st.States:
        """What is known of the blocks of query-block rows ``[first, last)`` without looking at pairs."""
        end = frame.q_start + frame.q_len
        a, b = frame.q_start + first * frame.bq, min(frame.q_start + last * frame.bq, end)
        edges = np.append(np.unique(np.append(np.arange(a, b, frame.bq), self.cuts(a, b).numpy())), b)
        q0, q1 = torch.from_numpy(edges[:-1]), torch.from_numpy(edges[1:])
        rows = self.rows(q0, q1, frame.limit)
        if rows is None:
            return st.constant(st.ABSENT | st.PARTIAL | st.FULL, last - first, frame.n_kv)
        return st.from_rows(rows, (edges[:-1] - a) // frame.bq, last - first, frame)

    def layout(self, q_len: int, kv_len: int, block: int | tuple[int, int], q_start: int | None = None) -> BlockLayout:
        """Which key blocks each query block meets, each full or partial: exact, at the cost of the blocks listed.

        Args:
            q_len, kv_len: queries and keys.
            block: tokens in a block, or ``(query block, key block)``; blocks start at the first query and at key 0.
            q_start: absolute index of the first query; None: the queries are the last ones.

        A pattern without `rows` (``closed_form`` is False) is evaluated pair by pair, in chunks.
        """
        start = resolve_q_start(q_len, kv_len, q_start)
        bq, bk = block_size(block)
        self.fits(q_len, kv_len, start)
        heads, samples = self.heads or 1, self.samples or 1
        parts = [self.of(head, sample) for sample in range(samples) for head in range(heads)]
        return layout_of(parts, st.Frame(start, q_len, 0, kv_len, bq, bk, kv_len), heads, samples)

    def row_counts(self, q_len: int, kv_len: int, q_start: int | None = None) -> Int[Tensor, "{q_len}"]:
        """How many keys each query may see: ``n_i = #{j : allows(i, j)}``.

        From the intervals of `rows`; a pattern without them is evaluated pair by pair, ``CHUNK`` at a time.
        """
        start = resolve_q_start(q_len, kv_len, q_start)
        self.fits(q_len, kv_len, start)
        if self.heads or self.samples:
            raise ValueError(
                f"row_counts() takes a pattern alike for all heads and samples, this one has heads={self.heads}, "
                f"samples={self.samples}: ask pattern.of(head, sample)"
            )
        counts = torch.zeros(q_len, dtype=torch.long)
        lo, step = 0, 64  # the first rows tell how many there can be at once
        while lo < q_len:
            queries = torch.arange(lo, min(lo + step, q_len)) + start
            rows = self.rows(queries, queries + 1, kv_len)
            if rows is None:
                allowed = self.allows(queries[:, None], torch.arange(kv_len)[None])
                counts[lo : lo + step], size = allowed.expand(len(queries), kv_len).sum(-1), kv_len
            else:
                counts[lo : lo + step], size = intervals.length(rows.any), rows.any.shape[1]
            lo, step = lo + step, max(1, CHUNK // max(size, 1) // 8)
        return counts

    def density(self, q_len: int, kv_len: int, q_start: int | None = None) -> float:
        """Allowed pairs divided by all ``q_len * kv_len`` pairs, in [0, 1]; 0.0 where there is no pair.

        Where heads or samples differ, over all of them.
        """
        parts = (self.heads or 1) * (self.samples or 1)
        every = q_len * kv_len * parts
        return self.pairs(q_len, kv_len, q_start) / every if every else 0.0

    def pairs(self, q_len: int, kv_len: int, q_start: int | None = None) -> int:
        """How many pairs are allowed, over the heads and samples told apart (one of each where all are alike)."""
        heads, samples = range(self.heads or 1), range(self.samples or 1)
        parts = Counter(self.of(head, sample) for sample in samples for head in heads)
        return sum(n * int(part.row_counts(q_len, kv_len, q_start).sum()) for part, n in parts.items())

    def flops(
        self, q_len: int, kv_len: int, head_dim: int, v_dim: int | None = None, q_start: int | None = None
    ) -> int:
        """Operations of the two products over allowed pairs, ``2 (head_dim + v_dim)`` a pair.

        Summed over the heads and samples that the pattern tells apart (one of each where all are alike).
        """
        return 2 * (head_dim + (head_dim if v_dim is None else v_dim)) * self.pairs(q_len, kv_len, q_start)

    def show(
        self,
        q_len: int = 24,
        kv_len: int | None = None,
        q_start: int | None = None,
        block: int | tuple[int, int] | None = None,
    ) -> Picture:
        """A picture: queries downwards, keys rightwards; ``kv_len`` None: as many as queries.

        In a terminal ``█`` is an allowed pair and ``·`` a forbidden one; a notebook shows SVG; ``.save("x.svg")``
        (``.png``, ``.txt``) writes a file. More than 65536 pairs are drawn as the density of at most 64 x 64 cells,
        estimated from 64 queries of each row of cells. With ``block``, full, partial (``▒``) and absent blocks, at most
        64 x 64 of them: more are put together.
        """
        from regard.patterns.picture import draw

        kv_len = q_len if kv_len is None else kv_len
        return draw(self, q_len, kv_len, resolve_q_start(q_len, kv_len, q_start), block)

    def transpose(self) -> Pattern:
        """The pattern with queries and keys swapped: it allows ``(k, q)`` where this allows ``(q, k)``."""
        from regard.patterns.transposed import transpose

        return transpose(self)

    def snap(self, block: int | tuple[int, int], min_fill: float | int = 0.0) -> Pattern:
        """Whole blocks: those of which more than ``min_fill`` is allowed become dense, the others are dropped.

        Blocks are counted from position 0; ``min_fill`` lies in [0, 1). See `Snap`.
        """
        from regard.patterns.snap import Snap

        return Snap(self, block_size(block), min_fill)

    def permute(self, order: Order | Sequence[int] | Int[Tensor, "n_padded"]) -> Pattern:
        """The pattern where position p holds the token ``order.forward[p]`` (-1: padding, which meets nothing).

        An `Order`, or the indices themselves. A grid in `TileOrder` and rings in `RingOrder` keep their closed form;
        anything else is evaluated pair by pair (``closed_form`` is False).
        """
        from regard.patterns.permuted import permute

        return permute(self, order)

    def __and__(self, other: Pattern) -> Pattern:
        from regard.patterns.algebra import And

        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        from regard.patterns.algebra import Or

        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        from regard.patterns.algebra import Not

        return Not(self)


def layout_of(parts: list[Pattern], frame: st.Frame, heads: int = 1, samples: int = 1) -> BlockLayout:
    """One layout of patterns that each tell no heads apart, in the order (sample, head); equal ones are made once."""
    made: dict[Pattern, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for part in parts:
        if part not in made:
            made[part] = _blocks(part, frame)
    counts, indices, full = (_joined([made[part][n] for part in parts]) for n in range(3))
    indptr = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=indptr[1:])
    return BlockLayout(
        torch.from_numpy(indptr),
        torch.from_numpy(indices),
        torch.from_numpy(full),
        frame.q_len,
        frame.kv_len,
        (frame.bq, frame.bk),
        heads,
        samples,
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays one after the other; each is let go once it is copied, so that not all is held twice."""
    if len(arrays) == 1:
        return arrays[0]
    out = np.empty(sum(map(len, arrays)), arrays[0].dtype)
    end = len(out)
    while arrays:
        part = arrays.pop()
        out[end - len(part) : end] = part
        end -= len(part)
    return out


def _blocks(pattern: Pattern, frame: st.Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(counts of each row, key blocks, full)`` of a pattern that tells no heads apart, some rows at a time."""
    if not frame.n_q or not frame.n_kv:
        return np.zeros(frame.n_q, np.int64), np.zeros(0, np.int32), np.zeros(0, bool)
    done = []
    first, step = 0, 16  # the first rows tell how many there can be at once
    while first < frame.n_q:
        last = min(first + step, frame.n_q)
        states = st.settle(pattern.states(frame, first, last), pattern, frame, first)
        done.append(st.expand(states))
        step = max(1, min(CELLS * (last - first) // max(len(states.at), 1), 4 * step))
        first = last
    columns = [list(column) for column in zip(*done, strict=True)]
    done.clear()
    counts, indices, full = (_joined(column) for column in columns)
    return counts, indices, full
