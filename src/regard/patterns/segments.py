"""Segments of positions: documents in a packed batch, blocks of equal size, blocks in causal order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Rows, resolve_q_start
from regard.patterns.static import Allowed, Index, StaticPattern, multiples, need_bool, need_int, one_interval

__all__ = ["BlockCausal", "Blocks", "Segments", "StepCausal"]


class Segments(StaticPattern):
    """Pairs of positions in the same segment, as documents in a packed sequence; a segment may be in pieces.

    Positions that no segment covers meet nothing, and lengths beyond the covered ones are refused. Two values are
    equal where they allow the same pairs, whatever the numbers of the segments.

    Args:
        ids: the segment of each position, integers ``[length]``; see `from_bounds` for contiguous segments.
    """

    def __init__(self, ids: Sequence[int] | Int[Tensor, "length"]):
        given = torch.as_tensor(ids).detach().cpu()
        if given.ndim != 1 or len(given) == 0 or given.is_floating_point() or given.is_complex():
            what = "an empty tuple" if given.numel() == 0 else f"shape {tuple(given.shape)} of {given.dtype}"
            raise ValueError(f"ids must name the segment of each position with an integer, got {what}")
        edge = (given[1:] != given[:-1]).nonzero().flatten() + 1
        start = torch.cat([edge.new_zeros(1), edge])
        self._set(start, given[start].long(), len(given))

    @classmethod
    def from_bounds(cls, bounds: Sequence[int] | Int[Tensor, "bounds"], wrap: bool = False) -> Segments:
        """Contiguous segments ``[bounds[i], bounds[i+1])``: what flash attention calls ``cu_seqlens``.

        Args:
            bounds: 0, then the end of each segment, strictly ascending; the last one is the length.
            wrap: join the first and the last segment into one, as the shifted windows of a ring.
        """
        ends = torch.as_tensor(bounds).detach().cpu()
        good = ends.ndim == 1 and len(ends) >= 2 and not ends.is_floating_point()
        if not good or int(ends[0]) != 0 or not (ends[1:] > ends[:-1]).all():
            raise ValueError(f"bounds must be integers that start with 0 and ascend strictly, got {bounds!r}")
        need_bool("wrap", wrap)
        label = torch.arange(len(ends) - 1)
        label[-1] = 0 if wrap else label[-1]
        made = cls.__new__(cls)
        made._set(ends[:-1].long(), label, int(ends[-1]))
        return made

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Int[Tensor, "segments"], wrap: bool = False) -> Segments:
        """Contiguous segments of these lengths, one after the other; ``wrap`` joins the first and the last."""
        sizes = torch.as_tensor(lengths).detach().cpu()
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.is_floating_point() or not (sizes >= 1).all():
            raise ValueError(f"lengths must be integers >= 1, at least one of them, got {lengths!r}")
        return cls.from_bounds(torch.cat([torch.zeros(1, dtype=torch.long), sizes.long().cumsum(0)]), wrap)

    def _set(self, start: Tensor, label: Tensor, length: int) -> None:
        """Keep the pieces, their segments numbered in the order in which they begin."""
        join = torch.ones_like(start, dtype=torch.bool)
        join[1:] = label[1:] != label[:-1]
        start, label = start[join], label[join]
        values, inverse = label.unique(return_inverse=True)
        begins = torch.full_like(values, len(label)).scatter_reduce_(0, inverse, torch.arange(len(label)), "amin")
        number = torch.empty_like(begins)
        number[begins.argsort()] = torch.arange(len(begins))
        self._start, self._label, self.length = start, number[inverse], length
        self._value = (length, start.numpy().tobytes(), self._label.numpy().tobytes())
        self._hash = hash(self._value)

    @property
    def pieces(self) -> Int[Tensor, "pieces 3"]:
        """The contiguous pieces, as (start, end, segment), ascending."""
        return torch.stack([self._start, self._end, self._label], -1)

    @cached_property
    def ids(self) -> Int[Tensor, "length"]:
        """The segment of each position, numbered in the order in which they begin."""
        return self._label.repeat_interleave(self._end - self._start)

    @cached_property
    def _end(self) -> Tensor:
        return torch.cat([self._start[1:], self._start.new_tensor([self.length])])

    @cached_property
    def _by_segment(self) -> tuple[Tensor, Tensor]:
        """Pieces sorted by segment, and where each segment's pieces begin among them."""
        order = self._label.argsort(stable=True)
        return order, torch.cat([order.new_zeros(1), self._label.bincount().cumsum(0)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and self._value == other._value

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        if self.length <= 32:
            return f"Segments({tuple(self.ids.tolist())})"
        return f"Segments({int(self._label.max()) + 1} segments in {len(self._start)} pieces, {self.length} positions)"

    @property
    def span(self) -> int:
        """The positions covered."""
        return self.length

    def fits(self, q_len: int, kv_len: int, q_start: int | None = None) -> None:
        """Refuse queries or keys beyond the covered positions."""
        start = resolve_q_start(q_len, kv_len, q_start)
        self._covers("kv_len", kv_len)
        if start < 0 or start + q_len > self.length:
            raise ValueError(
                f"the queries must lie in [0, {self.length}), the positions that ids covers; "
                f"got {start} to {start + q_len - 1}"
            )

    def _covers(self, name: str, value: int) -> None:
        if value > self.length:
            raise ValueError(f"{name} must be <= {self.length}, the number of ids, got {value}")

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``ids[q] == ids[k]``."""
        return self._id_of(q_idx, -1) == self._id_of(kv_idx, -2)

    def _id_of(self, idx: Tensor, outside: int) -> Tensor:
        ids = self.ids.to(idx.device)
        inside = (idx >= 0) & (idx < self.length)
        return torch.where(inside, ids[idx.clamp(0, self.length - 1).long()], outside)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """Where the segment changes."""
        return self._start[(self._start > a) & (self._start < b)]

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """The pieces of the run's own segment."""
        self._covers("kv_len", kv_len)
        if len(q0) and (int(q0.min()) < 0 or int(q1.max()) > self.length):
            raise ValueError(
                f"the queries must lie in [0, {self.length}), the positions that ids covers; "
                f"got {int(q0.min())} to {int(q1.max()) - 1}"
            )
        piece = torch.searchsorted(self._start, q0.cpu(), right=True) - 1
        order, first = self._by_segment
        label = self._label[piece]
        count = first[label + 1] - first[label]
        step = torch.arange(int(count.max()) if len(count) else 0)
        mine = order[(first[label][:, None] + step).clamp(max=len(order) - 1)]
        ends = torch.stack([self._start[mine], self._end[mine]], -1)
        keys = iv.clip(torch.where((step < count[:, None])[..., None], ends, 0), kv_len).to(q0.device)
        return Rows(keys, keys)


@dataclass(frozen=True)
class Blocks(StaticPattern):
    """Non-overlapping blocks of P positions: ``q // P == k // P``."""

    P: int

    def __post_init__(self) -> None:
        need_int("P", self.P, 1)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``q // P == k // P``."""
        return q_idx // self.P == kv_idx // self.P

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of P."""
        return multiples(self.P, a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[IP, (I+1)P)``, I the run's block."""
        lo = q0 // self.P * self.P
        keys = one_interval(lo, lo + self.P, kv_len, q0)
        return Rows(keys, keys)


@dataclass(frozen=True)
class BlockCausal(StaticPattern):
    """Causal over blocks of P positions, all-to-all inside: ``k // P <= q // P``; with ``strict`` earlier blocks only.

    As the clean half of block diffusion (arXiv 2512.14067).
    """

    P: int
    strict: bool = False

    def __post_init__(self) -> None:
        need_int("P", self.P, 1)
        need_bool("strict", self.strict)

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``k // P <= q // P`` (``<`` with ``strict``)."""
        return kv_idx // self.P < q_idx // self.P + (not self.strict)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The multiples of P."""
        return multiples(self.P, a, b)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, (I+1)P)``, I the run's block; strict ``[0, IP)``."""
        keys = one_interval(0, (q0 // self.P + (not self.strict)) * self.P, kv_len, q0)
        return Rows(keys, keys)


@dataclass(frozen=True)
class StepCausal(StaticPattern):
    """Causal over steps of any length, all-to-all inside: ``step(k) <= step(q)``; with ``strict`` earlier steps only.

    As next-scale image models decode (VAR, arXiv 2404.02905), and `Rings` in `RingOrder`. Positions from the last
    bound on are one step more.

    Attributes:
        bounds: 0, then the end of each step, strictly ascending.
        strict: leave out the query's own step.
    """

    bounds: tuple[int, ...]
    strict: bool = False

    def __post_init__(self) -> None:
        bounds = tuple(int(x) for x in self.bounds)
        if len(bounds) < 2 or bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"bounds must be integers that start with 0 and ascend strictly, got {self.bounds!r}")
        object.__setattr__(self, "bounds", bounds)
        need_bool("strict", self.strict)

    @cached_property
    def _step(self) -> Tensor:
        ends = torch.tensor(self.bounds)
        return torch.arange(len(ends)).repeat_interleave(torch.cat([ends[1:] - ends[:-1], ends.new_ones(1)]))

    def _step_of(self, idx: Tensor) -> Tensor:
        return self._step.to(idx.device)[idx.clamp(0, self.bounds[-1]).long()]

    def allows(self, q_idx: Index, kv_idx: Index, head: Tensor | None = None, batch: Tensor | None = None) -> Allowed:
        """``step(k) <= step(q)`` (``<`` with ``strict``)."""
        return self._step_of(kv_idx) < self._step_of(q_idx) + (not self.strict)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The bounds."""
        return torch.tensor([x for x in self.bounds if a < x < b], dtype=torch.long)

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows:
        """``[0, end of the run's step)``; strict ``[0, start of it)``."""
        ends = torch.tensor([*self.bounds, max(kv_len, self.bounds[-1])], device=q0.device)
        keys = one_interval(0, ends[self._step_of(q0) + (not self.strict)], kv_len, q0)
        return Rows(keys, keys)
