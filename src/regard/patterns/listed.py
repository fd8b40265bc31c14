"""Tables of what each row of a route lists: their checks, membership, and one row of them as a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.patterns import intervals as iv
from regard.patterns.pattern import Pattern, Rows

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = [
    "Listed",
    "check_blocks",
    "check_order",
    "check_score",
    "check_spans",
    "check_whole",
    "codes",
    "holds",
    "places",
]


def _at(where: Tensor) -> str:
    """Where the first fault is: "sample 0, decision 1, row 5"."""
    names = ("sample", "decision", "row", "place")
    return ", ".join(f"{name} {n}" for name, n in zip(names, where.nonzero()[0].tolist(), strict=False))


def _table(name: str, x: object, rows: int, batch: int | None = None) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.is_floating_point() or x.dtype == torch.bool:
        told = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be an integer tensor [batch or 1, decisions, {rows} rows, width], got {told}")
    if x.shape[2] != rows or 0 in x.shape[:2]:
        raise ValueError(
            f"{name} must have {rows} rows of query blocks, [batch, decisions, {rows}, width], got {list(x.shape)}"
        )
    return x


def check_blocks(index: Tensor, count: Tensor | None, rows: int, columns: int, check: bool) -> tuple[Tensor, Tensor]:
    """``(index, count)`` as int32, -1 after the counted part.

    Raises:
        ValueError: for another shape; in the counted part, for -1, a block out of range, repeated or not ascending.
    """
    index = _table("index", index, rows)
    place = torch.arange(index.shape[3], device=index.device)
    if count is None:
        there = index != -1
        count = there.sum(-1)
        holes = there & (place >= count[..., None])
        if check and bool(holes.any()):
            raise ValueError(
                f"index must have its -1 after all blocks where no count is given, got one before a block "
                f"at {_at(holes)}"
            )
    else:
        if count.is_floating_point() or count.dtype == torch.bool or tuple(count.shape) != tuple(index.shape[:3]):
            raise ValueError(
                f"count must be an integer tensor {list(index.shape[:3])}, got {count.dtype} {list(count.shape)}"
            )
        wrong = (count < 0) | (count > index.shape[3])
        if check and bool(wrong.any()):
            raise ValueError(
                f"count must lie in [0, {index.shape[3]}], the width of index, got "
                f"{int(count[wrong][0])} at {_at(wrong)}"
            )
    counted = place < count[..., None]
    if check:
        for what, wrong in (
            ("-1 (padding) inside the counted part", counted & (index == -1)),
            (f"a block outside [0, {columns})", counted & ((index < 0) | (index >= columns))),
        ):
            if bool(wrong.any()):
                raise ValueError(
                    f"index must list blocks in [0, {columns}), ascending, -1 only after the counted "
                    f"ones: got {what}, {int(index[wrong][0])} at {_at(wrong)}"
                )
        step = index[..., 1:].long() - index[..., :-1].long()
        for what, bad in (("repeated", step == 0), ("unsorted", step < 0)):
            wrong = bad & counted[..., 1:]
            if bool(wrong.any()):
                raise ValueError(
                    f"index must list each block once, ascending: got {what} blocks, "
                    f"{int(index[..., 1:][wrong][0])} at {_at(wrong)}"
                )
    return torch.where(counted, index, -1).to(torch.int32), count.to(torch.int32)


def check_spans(start: Tensor, stop: Tensor, rows: int, kv_len: int, check: bool) -> tuple[Tensor, Tensor]:
    """``(start, stop)`` as int32; an empty span, ``start == stop``, is padding and becomes (0, 0).

    Raises:
        ValueError: for other shapes, and spans outside ``[0, kv_len]`` or with stop < start.
    """
    start = _table("start", start, rows)
    if not isinstance(stop, Tensor) or stop.shape != start.shape or stop.is_floating_point():
        told = list(stop.shape) if isinstance(stop, Tensor) else type(stop).__name__
        raise ValueError(f"stop must be an integer tensor of start's shape {list(start.shape)}, got {told}")
    wrong = (start < 0) | (stop > kv_len) | (stop < start)
    if check and bool(wrong.any()):
        raise ValueError(
            f"spans must satisfy 0 <= start <= stop <= kv_len = {kv_len}, got "
            f"[{int(start[wrong][0])}, {int(stop[wrong][0])}) at {_at(wrong)}"
        )
    some = start < stop
    return torch.where(some, start, 0).to(torch.int32), torch.where(some, stop, 0).to(torch.int32)


def check_order(name: str, order: Tensor | None, length: int, once: bool, check: bool) -> Tensor | None:
    """An order int64 ``[batch or 1, decisions or 1, slots]``; ``once``: no token may be in two slots."""
    if order is None:
        return None
    if not isinstance(order, Tensor) or order.ndim != 3 or order.is_floating_point() or 0 in order.shape[:2]:
        told = f"{order.dtype} {list(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        raise ValueError(f"{name} must be an integer tensor [batch or 1, decisions or 1, slots], got {told}")
    wrong = (order < -1) | (order >= length)
    if check and bool(wrong.any()):
        raise ValueError(f"{name} must hold tokens in [0, {length}) and -1 for padding, got {int(order[wrong][0])}")
    if check and once and repeated(order):
        raise ValueError(f"{name} must hold each token at most once (groups may repeat queries, see Routed.groups)")
    return order.long()


def check_whole(name: str, order: Tensor | None, length: int) -> None:
    """Refuse an order, of tokens at most once, in which one is missing."""
    if order is not None and bool(((order >= 0).sum(-1) != length).any()):
        raise ValueError(f"{name} must hold every token where keep is given, which may ask for any of the {length}")


def repeated(order: Int[Tensor, "*lead slots"]) -> bool:
    """Whether a token is in two slots of the last axis."""
    ranked = order.sort(-1).values
    return bool(((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)).any())


def check_score(score: Tensor | None, table: Tensor, used: Tensor, check: bool) -> Tensor | None:
    """Scores beside a table; refused are another shape and NaN at what is listed."""
    if score is None:
        return None
    if not isinstance(score, Tensor) or not score.is_floating_point() or score.shape != table.shape:
        told = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"score must be a floating tensor {list(table.shape)} like what it scores, got {told}")
    wrong = score.detach().isnan() & used
    if check and bool(wrong.any()):
        raise ValueError(f"score must not be NaN, got NaN at {_at(wrong)}")
    return score


def codes(index: Int[Tensor, "batch decisions rows width"], count: Tensor, columns: int) -> Int[Tensor, "listed"]:
    """One ascending number for each listed block, ``((sample * R + decision) * rows + row) * columns + block``."""
    counted = torch.arange(index.shape[3], device=index.device) < count[..., None]
    row = torch.arange(index.shape[:3].numel(), device=index.device).view(*index.shape[:3], 1)
    return (row * columns + index)[counted]


def holds(sorted_codes: Int[Tensor, "listed"], code: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Which of the numbers are among the sorted ones."""
    if not len(sorted_codes):
        return torch.zeros_like(code, dtype=torch.bool)
    at = torch.searchsorted(sorted_codes, code.contiguous()).clamp(max=len(sorted_codes) - 1)
    return sorted_codes[at] == code


def places(order: Int[Tensor, "batch decisions slots"], length: int) -> Int[Tensor, "batch decisions length most"]:
    """The slots that hold each token, -1 after the last of them."""
    lead, slots = order.shape[:2], order.shape[2]
    key = torch.where(order < 0, length, order)
    ranked, slot = key.sort(stable=True, dim=-1)
    first = torch.searchsorted(ranked, torch.arange(length + 1, device=order.device).expand(*lead, -1).contiguous())
    counts = first.diff()
    most = int(counts.max()) if counts.numel() else 0
    nth = torch.arange(max(most, 1), device=order.device)
    at = (first[..., :-1, None] + nth).clamp(max=max(slots - 1, 0))
    if not slots:
        return order.new_full((*lead, length, 1), -1)
    found = slot.gather(-1, at.flatten(-2)).view(at.shape)
    return torch.where(nth < counts[..., None], found, -1)


@dataclass(frozen=True, eq=False)
class Listed(Pattern):
    """What one decision of one sample of a route lists, before ``keep`` and ``within``. Equal if of the same route."""

    routed: Routed
    sample: int
    decision: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Listed):
            return NotImplemented
        return self.routed is other.routed and (self.sample, self.decision) == (other.sample, other.decision)

    def __hash__(self) -> int:
        return hash((id(self.routed), self.sample, self.decision))

    @property
    def closed_form(self) -> bool:
        """Whether slots are tokens."""
        return not self.routed.ordered

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """Whether the pair's blocks were listed together."""
        here = (torch.tensor(n, device=q_idx.device) for n in (self.decision, self.sample))
        return self.routed.selected(q_idx, kv_idx, *here)

    def cuts(self, a: int, b: int) -> Int[Tensor, "cuts"]:
        """The edges of the query blocks."""
        at, size = self.routed.q_start, self.routed.block[0]
        edges = at + torch.arange(self.routed.n_rows + 1) * size
        edges[-1] = at + self.routed.q_len
        return edges[(edges > a) & (edges < b)]

    def rows(self, q0: Int[Tensor, "runs"], q1: Int[Tensor, "runs"], kv_len: int) -> Rows | None:
        """The keys of the run's query block; none outside the queries that were decided for."""
        r = self.routed
        if r.ordered:
            return None
        local = q0.cpu() - r.q_start
        inside = (local >= 0) & (local < r.q_len)
        row = (local // r.block[0]).clamp(0, max(r.n_rows - 1, 0))
        if r.index is not None:
            blocks = r.index[self.sample, self.decision].cpu().long()[row]
            lo = torch.where(blocks < 0, 0, blocks * r.block[1])
            hi = torch.where(blocks < 0, 0, (blocks + 1) * r.block[1])
        else:
            assert r.start is not None
            assert r.stop is not None
            lo, hi = (x[self.sample, self.decision].cpu().long()[row] for x in (r.start, r.stop))
        keys = torch.stack([lo, hi], -1) * inside[:, None, None]
        keys = iv.clip(keys, min(kv_len, r.kv_len)).to(q0.device)
        return Rows(keys, keys)
