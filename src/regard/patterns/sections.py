"""Patterns put side by side: a block matrix of patterns, each in coordinates of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows
from regard.patterns.segments import BlockCausal, Blocks
from regard.patterns.static import Allowed, Index, StaticPattern, need_int
from regard.patterns.wrapped import alike

__all__ = ["BlockDiffusion", "Composed", "Sections"]


@dataclass(frozen=True)
class Sections(Pattern):
    """A block matrix of patterns: queries of section i meet keys of section j as ``table[i][j]`` says.

    Each pattern sees coordinates that start at 0 in its own section; None allows nothing. It writes prefixes, text
    beside a grid of image tokens, and noisy copies beside clean ones.

    Attributes:
        lengths: tokens of each section; they follow one another in queries and in keys.
        table: one row a query section, one pattern (or None) a key section.
    """

    lengths: tuple[int, ...]
    table: tuple[tuple[Pattern | None, ...], ...]

    def __init__(self, lengths: Sequence[int], table: Sequence[Sequence[Pattern | None]]):
        object.__setattr__(self, "lengths", tuple(lengths))
        object.__setattr__(self, "table", tuple(tuple(row) for row in table))
        n = len(self.lengths)
        for length in self.lengths:
            need_int("lengths", length, 0)
        if not n or len(self.table) != n or any(len(row) != n for row in self.table):
            shape = [len(row) for row in self.table]
            raise ValueError(f"table must have {n} rows of {n} patterns, one a section, got rows of {shape}")
        for i, row in enumerate(self.table):
            for j, cell in enumerate(row):
                self._check(i, j, cell)

    def _check(self, i: int, j: int, cell: Pattern | None) -> None:
        if cell is None:
            return
        if not isinstance(cell, Pattern):
            raise ValueError(f"table[{i}][{j}] must be a pattern or None, got {cell!r}")
        try:
            cell.fits(self.lengths[i], self.lengths[j], 0)
        except ValueError as error:
            raise ValueError(
                f"table[{i}][{j}] does not fit {self.lengths[i]} queries and {self.lengths[j]} keys: {error}"
            ) from error

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def _cells(self) -> list[Pattern]:
        return [cell for row in self.table for cell in row if cell is not None]

    @property
    def heads(self) -> int | None:
        """Of the patterns, which must agree."""
        return alike(self._cells, "heads")

    @property
    def samples(self) -> int | None:
        """Of the patterns, which must agree."""
        return alike(self._cells, "samples")

    @property
    def closed_form(self) -> bool:
        """Whether every pattern has rows."""
        return all(cell.closed_form for cell in self._cells)

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """The same table of the patterns of one head of one sample."""
        if self.heads is None and self.samples is None:
            return self
        return Sections(self.lengths, [[cell and cell.of(head, sample) for cell in row] for row in self.table])

    @property
    def span(self) -> int:
        """The tokens of all sections."""
        return self._bounds[-1]

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse queries or keys beyond the last section."""
        if kv_len > self._bounds[-1] or q_start < 0 or q_start + q_len > self._bounds[-1]:
            raise ValueError(
                f"Sections of {self.lengths} cover {self._bounds[-1]} tokens, "
                f"got kv_len={kv_len} and queries [{q_start}, {q_start + q_len})"
            )

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``table[i][j]`` of the section coordinates; False outside all sections."""
        out = (q_idx != q_idx) | (kv_idx != kv_idx)
        for i, row in enumerate(self.table):
            q, q_here = self._local(q_idx, i)
            for j, cell in enumerate(row):
                if cell is not None and self.lengths[i] and self.lengths[j]:
                    k, k_here = self._local(kv_idx, j)
                    out = out | (q_here & k_here & cell.allows(q, k, head, batch))
        return out

    def _local(self, idx: Tensor, section: int) -> tuple[Tensor, Tensor]:
        """Coordinates in a section, and which of them lie in it; the others are moved to its ends."""
        local, length = idx - self._bounds[section], self.lengths[section]
        return local.clamp(0, length - 1), (local >= 0) & (local < length)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The bounds of the sections and the cuts of the patterns inside."""
        found = [torch.tensor([x for x in self._bounds if a < x < b], dtype=torch.long)]
        for start, end, row in zip(self._bounds, self._bounds[1:], self.table, strict=False):
            lo, hi = max(a, start) - start, min(b, end) - start
            found += [cell.cuts(lo, hi) + start for cell in row if cell is not None and lo < hi]
        return torch.cat(found).unique()

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """The rows of each pattern of the run's row of the table, moved to their sections and joined."""
        some, every, mine, exact = [], [], [], (True, True)
        for i, row in enumerate(self.table):
            start, end = self._bounds[i : i + 2]
            here = ((q0 >= start) & (q0 < end)).nonzero().flatten()
            if not len(here):
                continue
            of_any, of_all = [], []
            for j, cell in enumerate(row):
                keys = min(self._bounds[j + 1], kv_len) - self._bounds[j]
                if cell is None or keys <= 0:
                    continue
                part = cell.rows(q0[here] - start, q1[here] - start, keys)
                if part is None:
                    return None
                of_any.append(_moved(part.any, self._bounds[j]))
                of_all.append(_moved(part.all, self._bounds[j]))
                exact = (exact[0] and part.exact[0], exact[1] and part.exact[1])
            nothing = q0.new_zeros(len(here), 0, 2)
            some.append(iv.clip(torch.cat([nothing, *of_any], 1), kv_len))
            every.append(iv.clip(torch.cat([nothing, *of_all], 1), kv_len))
            mine.append(here)
        return Rows(_placed(some, mine, q0), _placed(every, mine, q0), exact)


def _moved(keys: Tensor, start: int) -> Tensor:
    return torch.where((keys[..., :1] < keys[..., 1:]), keys + start, 0)


def _placed(parts: list[Tensor], mine: list[Tensor], like: Tensor) -> Tensor:
    """Parts of the runs, each with its own number of intervals, in one tensor."""
    out = like.new_zeros(len(like), max((part.shape[1] for part in parts), default=0), 2)
    for part, here in zip(parts, mine, strict=True):
        out[here, : part.shape[1]] = part
    return out


class Composed(StaticPattern):
    """A composition with a name: everything is that of `whole`."""

    @property
    @abstractmethod
    def whole(self) -> Pattern:
        """The pattern that the name stands for."""

    @property
    def span(self) -> int | None:
        """As `whole`."""
        return self.whole.span

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """As `whole`."""
        self.whole.fits(q_len, kv_len, q_start)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """As `whole`."""
        return self.whole.allows(q_idx, kv_idx, head, batch)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """As `whole`."""
        return self.whole.cuts(a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """As `whole`."""
        rows = self.whole.rows(q0, q1, kv_len)
        assert rows is not None  # a name stands for closed forms only
        return rows


@dataclass(frozen=True)
class BlockDiffusion(Composed):
    """The training mask of block diffusion: n noisy tokens, then the same n clean; each noisy block sees clean past.

    A noisy block meets itself and the clean blocks before it (strictly: its own clean block is the answer); the clean
    half is causal over blocks. Efficient-DLM (arXiv 2512.14067). Both halves have positions 0..n-1.

    Attributes:
        n: tokens of each half.
        P: tokens of a block; the last block may be shorter.
    """

    n: int
    P: int

    def __post_init__(self) -> None:
        need_int("n", self.n, 1)
        need_int("P", self.P, 1)

    @cached_property
    def whole(self) -> Pattern:
        """``Sections([n, n], [[Blocks(P), BlockCausal(P, strict=True)], [None, BlockCausal(P)]])``."""
        noisy: list[Pattern | None] = [Blocks(self.P), BlockCausal(self.P, strict=True)]
        return Sections([self.n, self.n], [noisy, [None, BlockCausal(self.P)]])
