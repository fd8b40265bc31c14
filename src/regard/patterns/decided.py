"""Patterns decided from q and k: what a route returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.patterns import listed as ls
from regard.patterns.layout import BlockLayout, block_size
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.routed_layout import Table
from regard.patterns.routed_make import Makers, Repeats
from regard.patterns.slots import in_slots, refined

__all__ = ["Routed", "both"]

KEPT = 8  # what kernels made of a route for calls of so many shapes


def both(a: Pattern | None, b: Pattern | None) -> Pattern | None:
    """``a & b``, where None allows all."""
    return b if a is None else a if b is None else a & b


@dataclass(frozen=True, eq=False, kw_only=True)
class Routed(Makers, Pattern):
    """Which keys each row of queries was given: ``(listed or keep) and within``. Holds tensors, so it has no hash.

    B samples (1: all alike) times R decisions: one for all heads (R = 1), one for each kv head or one for each query
    head; query head h has decision ``h // (heads / R)``. Row i is queries ``[i bq, (i + 1) bq)`` of the call. Made by
    `blocks`, `tokens`, `spans`, `groups` and `choose`; by a `Route`.

    Attributes:
        block: ``(queries in a row, keys in a block)``.
        q_len, kv_len, q_start: the lengths it was decided for, and the position of its first query; it fits no others.
        index: int32 ``[B, R, rows, width]``, key blocks, ascending, -1 after the ``count[B, R, rows]`` that are listed.
        start, stop: int32 ``[B, R, rows, width]``, half-open spans of keys in place of blocks; ``(0, 0)`` is none.
        score: floating, like index or start; what the route thought of each. Differentiable where the route is.
        q_order, kv_order: int64 ``[B|1, R|1, slots]``: rows and blocks are of slots, and a slot holds this query of the
            call (from 0) or this key; -1: padding. None: slot = token.
        within: what holds inside all that is listed, by position (causality, padding). None: everything.
        keep: joined to what is listed, by position (sinks, a window). It may tell heads and samples apart, as `within`.
        q_heads: query heads, where more than R.
        repeats: what a query in several groups gets, see `groups`.
        patterns, which: of `choose`, int64 ``[B, R]``.
        cost: multiply-adds of deciding, per query head; `flops` counts them, `pairs` and `density` do not.
    """

    block: tuple[int, int]
    q_len: int
    kv_len: int
    q_start: int
    index: Int[Tensor, "batch decisions rows width"] | None = None
    count: Int[Tensor, "batch decisions rows"] | None = None
    start: Int[Tensor, "batch decisions rows width"] | None = None
    stop: Int[Tensor, "batch decisions rows width"] | None = None
    score: Float[Tensor, "batch decisions rows width"] | None = None
    q_order: Int[Tensor, "order_batch order_decisions q_slots"] | None = None
    kv_order: Int[Tensor, "kv_order_batch kv_order_decisions kv_slots"] | None = None
    within: Pattern | None = None
    keep: Pattern | None = None
    q_heads: int | None = None
    repeats: Repeats = "error"
    patterns: tuple[Pattern, ...] | None = None
    which: Int[Tensor, "batch decisions"] | None = None
    cost: int = 0

    __hash__ = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.q_heads is not None and (self.q_heads < 1 or self.q_heads % self.decisions):
            raise ValueError(f"heads must be a multiple of the {self.decisions} decisions, got {self.q_heads}")
        for name, count in (("q_order", self.q_order), ("kv_order", self.kv_order)):
            if count is not None and (
                count.shape[0] not in (1, self.batch) or count.shape[1] not in (1, self.decisions)
            ):
                raise ValueError(
                    f"{name} must have 1 or {self.batch} samples and 1 or {self.decisions} decisions, got "
                    f"{list(count.shape)}"
                )
        for name in ("within", "keep"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, Pattern):
                raise ValueError(f"{name} must be a Pattern or None, got {type(given).__name__}")
        if self.keep is not None and self.repeats != "error":
            raise ValueError("keep cannot be joined to groups: a query may be in several of them or in none")
        _ = self.heads, self.samples  # refuses parts that tell other numbers apart

    # What it is

    @property
    def _lead(self) -> Tensor:
        return next(x for x in (self.index, self.start, self.which) if x is not None)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._lead.device

    @property
    def batch(self) -> int:
        """Samples decided for; 1: all alike."""
        return self._lead.shape[0]

    @property
    def decisions(self) -> int:
        """Decisions a sample, R."""
        return self._lead.shape[1]

    @property
    def n_rows(self) -> int:
        """Rows of queries (of slots, where ordered), the short last one included."""
        return -(-(self.q_len if self.q_order is None else self.q_order.shape[-1]) // self.block[0])

    @property
    def n_columns(self) -> int:
        """Blocks of keys (of slots, where ordered), the short last one included."""
        return -(-(self.kv_len if self.kv_order is None else self.kv_order.shape[-1]) // self.block[1])

    @property
    def ordered(self) -> bool:
        """Whether rows and blocks are of slots that are not the tokens in order."""
        return self.q_order is not None or self.kv_order is not None

    @property
    def heads(self) -> int | None:
        """Query heads told apart; None: all are alike."""
        return self._agreed("heads", (self.q_heads or self.decisions) if self.decisions > 1 else None)

    @property
    def samples(self) -> int | None:
        """Samples told apart; None: all are alike."""
        return self._agreed("samples", self.batch if self.batch > 1 else None)

    def _agreed(self, what: str, own: int | None) -> int | None:
        counts = {own} | {getattr(p, what) for p in (self.within, self.keep) if p is not None}
        counts.discard(None)
        if len(counts) > 1:
            raise ValueError(f"decisions, within and keep must tell the same number of {what} apart, got {counts}")
        return counts.pop() if counts else None

    @property
    def span(self) -> int | None:
        """None: it is bound to its lengths by `fits`."""
        return None

    @property
    def closed_form(self) -> bool:
        """Whether blocks follow without looking at pairs."""
        parts = [p for p in (self.within, self.keep, *(self.patterns or ())) if p is not None]
        return not self.ordered and all(p.closed_form for p in parts)

    def fits(self, q_len: int, kv_len: int, q_start: int) -> None:
        """Refuse all but the lengths it was decided for."""
        if (q_len, kv_len, q_start) != (self.q_len, self.kv_len, self.q_start):
            raise ValueError(
                f"the route was decided for q_len={self.q_len}, kv_len={self.kv_len}, q_start={self.q_start}, "
                f"got q_len={q_len}, kv_len={kv_len}, q_start={q_start}"
            )
        for part in (self.within, self.keep, *(self.patterns or ())):
            if part is not None:
                part.fits(q_len, kv_len, q_start)

    def decision(self, head: int) -> int:
        """The decision of a query head."""
        return 0 if self.decisions == 1 else head // ((self.q_heads or self.decisions) // self.decisions)

    def over(self, heads: int) -> Routed:
        """The same for so many query heads, a multiple of R: decision r is for heads ``[r n, (r + 1) n)``."""
        return replace(self, q_heads=heads)

    def to(self, device: torch.device | str) -> Routed:
        """The same with its tensors on another device."""
        names = ("index", "count", "start", "stop", "score", "q_order", "kv_order", "which")
        return replace(self, **{n: x.to(device) for n in names if (x := getattr(self, n)) is not None})

    def moved(self, q_start: int, kv_len: int, within: Pattern | None) -> Routed:
        """The same blocks or spans for as many queries at another place, over no fewer keys, inside another pattern."""
        if self.ordered or self.which is not None:
            raise ValueError("only blocks and spans of tokens in order can be taken over for other queries")
        if kv_len < self.kv_len:
            raise ValueError(f"kv_len must be >= {self.kv_len}, that of the decision, got {kv_len}")
        return replace(self, q_start=q_start, kv_len=kv_len, within=within)

    def __and__(self, other: Pattern) -> Pattern:
        """The same decision inside another pattern too: still routed, the pairs of both."""
        if not isinstance(other, Pattern) or isinstance(other, Routed):
            return super().__and__(other)
        return replace(self, within=both(self.within, other))

    # Pairs

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``(listed | keep) & within``; nothing beyond the lengths it was decided for."""
        for name, given, apart in (("head", head, self.heads), ("batch", batch, self.samples)):
            if apart and given is None:
                raise ValueError(f"{name} must be given: this pattern tells {apart} apart")
        found = self.selected(q_idx, kv_idx, *self._own(head, batch))
        if self.keep is not None:
            found = found | self.keep.allows(q_idx, kv_idx, head, batch)
        if self.within is not None:
            found = found & self.within.allows(q_idx, kv_idx, head, batch)
        q = q_idx - self.q_start
        return found & (q >= 0) & (q < self.q_len) & (kv_idx >= 0) & (kv_idx < self.kv_len)

    def _own(self, head: Tensor | None, batch: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The decision and the sample to look up; out of range where there is none."""
        share = (self.q_heads or self.decisions) // self.decisions
        r = None if head is None or self.decisions == 1 else torch.div(head, share, rounding_mode="floor")
        return r, None if self.batch == 1 else batch

    def selected(self, q_idx: Tensor, kv_idx: Tensor, decision: Tensor | None, sample: Tensor | None) -> Tensor:
        """Whether pairs were listed, before `keep` and `within`; bool, broadcast."""
        from regard.patterns.routed_pairs import selected

        return selected(self, q_idx, kv_idx, decision, sample)

    @cached_property
    def codes(self) -> Int[Tensor, "listed"]:
        """One ascending number for each listed block, see `listed.codes`."""
        assert self.index is not None
        assert self.count is not None
        return ls.codes(self.index, self.count, self.n_columns)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What `once` made; gone with it."""
        return {}

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call of this name: a stored route is called again and again. Of more
        than `KEPT` names all are forgotten."""
        if name not in self.kept:
            if len(self.kept) >= KEPT:
                self.kept.clear()
            self.kept[name] = make()
        return self.kept[name]

    def of(self, head: int = 0, sample: int = 0) -> Pattern:
        """One head of one sample: what it lists, ``| keep``, ``& within``."""
        b, r = sample if self.batch > 1 else 0, self.decision(head)
        found: Pattern = ls.Listed(self, b, r)
        if self.which is not None:
            assert self.patterns is not None
            found = self.patterns[int(self.which[b, r])]
        if self.keep is not None:
            found = found | self.keep.of(head, sample)
        return found if self.within is None else found & self.within.of(head, sample)

    def need_disjoint(self) -> None:
        """Refuse a query that meets a key in two of its groups."""
        from regard.patterns.routed_pairs import need_disjoint

        need_disjoint(self)

    # Blocks

    def layout(self, q_len: int, kv_len: int, block: int | tuple[int, int], q_start: int | None = None) -> BlockLayout:
        """As `Pattern.layout`; where blocks divide its own or the reverse, from the table of what is listed."""
        from regard.patterns.routed_layout import own_layout

        start, sizes = resolve_q_start(q_len, kv_len, q_start), block_size(block)
        self.fits(q_len, kv_len, start)
        ratios = list(zip(sizes, self.block, strict=True))
        if self.index is None or self.ordered or any(x % y and y % x for x, y in ratios):
            return super().layout(q_len, kv_len, sizes, start)
        finer = (min(ratios[0]), min(ratios[1]))
        own = own_layout(self if finer == self.block else refined(self, finer))
        factor = (sizes[0] // finer[0], sizes[1] // finer[1])
        return own if factor == (1, 1) else own.coarsen(factor)

    def slots(self) -> Routed:
        """The same decision over slots in place of tokens; itself without orders. See `slots.in_slots`."""
        return in_slots(self)

    def table(self) -> Table:
        """What each row of each head of each sample meets at its own block, `within` and `keep` counted in: padded
        ``index``, ``count`` and ``full``. Of tokens in order (see `slots`)."""
        from regard.patterns.routed_layout import own_layout, padded

        if self.index is None or self.ordered:
            raise ValueError("only blocks of tokens in order have a table; take slots() of an ordered one")
        return padded(own_layout(self), self.device)

    def flops(
        self, q_len: int, kv_len: int, head_dim: int, v_dim: int | None = None, q_start: int | None = None
    ) -> int:
        """``2 (head_dim + v_dim)`` a pair, and two for each multiply-add of deciding."""
        parts = (self.heads or 1) * (self.samples or 1)
        return super().flops(q_len, kv_len, head_dim, v_dim, q_start) + 2 * self.cost * parts

    def __repr__(self) -> str:
        kind = "blocks" if self.index is not None else "spans" if self.start is not None else "patterns"
        told = f"{self.batch} samples x {self.decisions} decisions, {self.q_len} x {self.kv_len} by {self.block}"
        return f"Routed({kind}: {told}{', ordered' if self.ordered else ''}, within={self.within}, keep={self.keep})"

    # Values

    def equal(self, other: Routed) -> bool:
        """The same decision: every field alike, tensors by value."""
        from regard.patterns.routed_file import same

        return same(self, other)

    def __eq__(self, other: object) -> bool:
        return self.equal(other) if isinstance(other, Routed) else NotImplemented

    def save(self, path: str | Path) -> None:
        """Write it as safetensors; its patterns go into the header as JSON (see `patterns.text`)."""
        from regard.patterns.routed_file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Routed:
        """What `save` wrote."""
        from regard.patterns.routed_file import load

        return load(path)
