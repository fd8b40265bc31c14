"""Patterns with queries and keys swapped: what a key sees, in the backward pass and in attention read by columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import states as st
from regard.patterns.algebra import And, Not, Or
from regard.patterns.axes import Congruent, Same
from regard.patterns.diagonals import Diagonals, Dilated, Strided
from regard.patterns.each import PerHead, PerSample
from regard.patterns.grid import Grid
from regard.patterns.pattern import CHUNK, Pattern, resolve_q_start
from regard.patterns.permuted import Permuted
from regard.patterns.radial import Radial
from regard.patterns.sections import Composed, Sections
from regard.patterns.segments import BlockCausal, Blocks, Segments, StepCausal
from regard.patterns.shapes import Arrow, Plus
from regard.patterns.snap import Snap
from regard.patterns.static import Causal, Columns, Full, Prefix, Queries, Sinks, Window
from regard.patterns.within import Within
from regard.patterns.wrapped import Wrapped

__all__ = ["Transposed", "transpose"]


def transpose(pattern: Pattern) -> Pattern:
    """Allows ``(k, q)`` where ``pattern`` allows ``(q, k)``: a known pattern where there is one, else `Transposed`."""
    match pattern:
        case Full() | Same() | Congruent() | Blocks() | Segments() | Arrow() | Plus():
            return pattern
        case Radial(sink=False) | Diagonals(causal=False) | Strided(causal=False):
            return pattern
        case Causal():
            return Causal(not pattern.future)
        case Window():
            return Window(pattern.right, pattern.left)
        case Dilated():
            return Dilated(pattern.dilation, pattern.right, pattern.left)
        case Diagonals():
            return Diagonals(pattern.period, pattern.width, causal=False) & Causal(future=True)
        case Strided():
            return Strided(pattern.stride, pattern.window, causal=False) & Causal(future=True)
        case Columns():
            return Queries(pattern.intervals)
        case Queries():
            return Columns(pattern.intervals)
        case Sinks():
            return Queries(((0, pattern.n),))
        case Prefix():
            return Queries(((0, pattern.c),)) | Causal(future=True)
        case BlockCausal():
            return ~BlockCausal(pattern.P, not pattern.strict)
        case StepCausal():
            return ~StepCausal(pattern.bounds, not pattern.strict)
        case And() | Or():
            return type(pattern)(transpose(pattern.left), transpose(pattern.right))
        case Not():
            return ~transpose(pattern.part)
        case PerHead() | PerSample():
            return type(pattern)(tuple(transpose(p) for p in pattern.patterns))
        case Within():
            return Within(transpose(pattern.pattern), pattern.start, pattern.stop)
        case Sections():
            columns = zip(*pattern.table, strict=True)
            return Sections(pattern.lengths, [[cell and transpose(cell) for cell in column] for column in columns])
        case Composed():
            return transpose(pattern.whole)
        case Permuted():
            return Permuted(transpose(pattern.part), pattern.order)
        case Snap():
            return Snap(transpose(pattern.part), (pattern.block[1], pattern.block[0]), pattern.min_fill)
        case Transposed():
            return pattern.part
        case Grid():
            axes = [transpose(axis) for axis in pattern.axes]
            return (
                Transposed(pattern) if any(isinstance(axis, Transposed) for axis in axes) else Grid(axes, pattern.shape)
            )
    return Transposed(pattern)


@dataclass(frozen=True)
class Transposed(Wrapped):
    """``(q, k)`` is allowed where the part allows ``(k, q)``; blocks and counts follow from the part's."""

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``part.allows(k, q)``."""
        return self.part.allows(kv_idx, q_idx, head, batch)

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """The part must fit the keys as queries from 0, and the queries as its keys."""
        self.part.fits(kv_len, q_start + q_len, 0)

    def states(self, frame: st.Frame, first: int, last: int) -> st.States:
        """The part's blocks, its rows being these columns."""
        start = first * frame.bq
        length = min(frame.q_len, last * frame.bq) - start
        limit = frame.q_start + frame.q_len
        turned = st.Frame(
            frame.kv_start, frame.kv_len, frame.q_start + start, length, frame.bk, frame.bq, max(limit, 0)
        )
        return st.transposed(self.part.states(turned, 0, turned.n_q))

    def row_counts(self, q_len: int, kv_len: int, q_start: int | None = None) -> Int[Tensor, "{q_len}"]:
        """How many queries of the part see each key: the ends of its intervals, summed up."""
        start = resolve_q_start(q_len, kv_len, q_start)
        self.fits(q_len, kv_len, start)
        ends = np.zeros(start + q_len + 1, dtype=np.int64)
        lo, step = 0, 64
        while lo < kv_len:
            queries = torch.arange(lo, min(lo + step, kv_len))
            rows = self.part.rows(queries, queries + 1, start + q_len)
            if rows is None:
                return super().row_counts(q_len, kv_len, q_start)
            ends += np.bincount(rows.any[..., 0].flatten().numpy(), minlength=len(ends))
            ends -= np.bincount(rows.any[..., 1].flatten().numpy(), minlength=len(ends))
            lo, step = lo + step, max(1, CHUNK // max(rows.any.shape[1], 1) // 8)
        return torch.from_numpy(ends.cumsum()[start : start + q_len])
