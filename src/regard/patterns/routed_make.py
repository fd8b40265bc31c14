"""How routed patterns are made from tensors, every one of which is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.patterns import listed as ls
from regard.patterns.layout import block_size
from regard.patterns.pattern import Pattern, resolve_q_start

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = ["Makers", "Repeats"]

Repeats = Literal["error", "mean", "merge"]


def _new(cls: type) -> Any:
    return cast(Any, cls)


class Makers:
    """The constructors of `Routed`."""

    @classmethod
    def blocks(
        cls,
        index: Int[Tensor, "..."],
        count: Int[Tensor, "..."] | None = None,
        *,
        block: int | tuple[int, int],
        q_len: int,
        kv_len: int,
        q_start: int | None = None,
        score: Float[Tensor, "..."] | None = None,
        within: Pattern | None = None,
        keep: Pattern | None = None,
        q_order: Int[Tensor, "..."] | None = None,
        kv_order: Int[Tensor, "..."] | None = None,
        heads: int | None = None,
        cost: int = 0,
        check: bool = True,
    ) -> Routed:
        """Key blocks of each query block.

        Args:
            index: ``[B, R, rows, width]``, ascending without repeats, -1 after the last.
            count: ``[B, R, rows]``, how many of each row count, the rest being ignored; None: those before the -1.
            heads: query heads, where there are more than decisions (R = kv heads); None: R.
            check: False: the values of the tensors are not looked at (a look waits for the device).

        Raises:
            ValueError: for blocks repeated, unsorted, out of range, -1 inside the counted part, a NaN score.
        """
        sizes, at = block_size(block), resolve_q_start(q_len, kv_len, q_start)
        q_order = ls.check_order("q_order", q_order, q_len, True, check)
        kv_order = ls.check_order("kv_order", kv_order, kv_len, True, check)
        if keep is not None and check:
            ls.check_whole("q_order", q_order, q_len)
            ls.check_whole("kv_order", kv_order, kv_len)
        rows = -(-(q_len if q_order is None else q_order.shape[-1]) // sizes[0])
        columns = -(-(kv_len if kv_order is None else kv_order.shape[-1]) // sizes[1])
        index, count = ls.check_blocks(index, count, rows, columns, check)
        return _new(cls)(
            block=sizes, q_len=q_len, kv_len=kv_len, q_start=at, index=index, count=count,
            score=ls.check_score(score, index, index >= 0, check), q_order=q_order, kv_order=kv_order, within=within,
            keep=keep, q_heads=heads, cost=cost,
        )  # fmt: skip

    @classmethod
    def tokens(
        cls,
        index: Int[Tensor, "..."],
        count: Int[Tensor, "..."] | None = None,
        *,
        q_len: int,
        kv_len: int,
        **how: object,
    ) -> Routed:
        """Single keys of each single query: `blocks` of (1, 1)."""
        return cls.blocks(index, count, block=(1, 1), q_len=q_len, kv_len=kv_len, **how)  # type: ignore[arg-type]

    @classmethod
    def spans(
        cls,
        start: Int[Tensor, "..."],
        stop: Int[Tensor, "..."],
        *,
        q_len: int,
        kv_len: int,
        block: int = 1,
        q_start: int | None = None,
        score: Float[Tensor, "..."] | None = None,
        within: Pattern | None = None,
        keep: Pattern | None = None,
        heads: int | None = None,
        cost: int = 0,
        check: bool = True,
    ) -> Routed:
        """Half-open spans ``[start, stop)`` of keys for each row of ``block`` queries, in any order; they may overlap
        (a pair is allowed once), and ``start == stop`` is padding.

        Args:
            start, stop: ``[B, R, rows, width]``, ``0 <= start <= stop <= kv_len``.
        """
        sizes, at = block_size((block, 1)), resolve_q_start(q_len, kv_len, q_start)
        start, stop = ls.check_spans(start, stop, -(-q_len // block), kv_len, check)
        return _new(cls)(
            block=sizes, q_len=q_len, kv_len=kv_len, q_start=at, start=start, stop=stop,
            score=ls.check_score(score, start, start < stop, check), within=within, keep=keep, q_heads=heads, cost=cost,
        )  # fmt: skip

    @classmethod
    def groups(
        cls,
        q_groups: Int[Tensor, "..."],
        kv_groups: Int[Tensor, "..."],
        repeats: Repeats = "mean",
        *,
        q_len: int,
        kv_len: int,
        q_start: int | None = None,
        within: Pattern | None = None,
        heads: int | None = None,
        cost: int = 0,
        check: bool = True,
    ) -> Routed:
        """Groups of queries that meet groups of keys. A query in no group has no key.

        Args:
            q_groups: ``[B, R, groups, width]``, queries of the call (from 0) in each group, -1 is padding.
            kv_groups: ``[B, R, groups, kv_width]``, the keys that they meet.
            repeats: what a query in several groups gets: "mean" of its outputs of each (no single softmax: there is no
                lse), "merge" (one softmax over the keys of all of them, which must have no key in common), "error".
        """
        if repeats not in ("mean", "merge", "error"):
            raise ValueError(f'repeats must be "mean", "merge" or "error", got {repeats!r}')
        at = resolve_q_start(q_len, kv_len, q_start)
        for name, x in (("q_groups", q_groups), ("kv_groups", kv_groups)):
            if not isinstance(x, Tensor) or x.ndim != 4 or x.is_floating_point():
                raise ValueError(
                    f"{name} must be an integer tensor [batch or 1, decisions, groups, width], got "
                    f"{list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
                )
            if check and ls.repeated(x):
                raise ValueError(f"{name} must hold each token at most once in a group")
        if q_groups.shape[2] != kv_groups.shape[2]:
            raise ValueError(
                f"q_groups and kv_groups must be as many groups, got {q_groups.shape[2]} and {kv_groups.shape[2]}"
            )
        # a group without a place is one of padding, so that every group is a row and a block
        q_groups, kv_groups = (
            torch.nn.functional.pad(x, (0, int(not x.shape[3])), value=-1) for x in (q_groups, kv_groups)
        )
        q_order = ls.check_order("q_groups", q_groups.flatten(2), q_len, repeats == "error", check)
        kv_order = ls.check_order("kv_groups", kv_groups.flatten(2), kv_len, False, check)
        lead = torch.broadcast_shapes(q_groups.shape[:2], kv_groups.shape[:2])
        index = torch.arange(q_groups.shape[2], device=q_groups.device, dtype=torch.int32)
        made = _new(cls)(
            block=(q_groups.shape[3], kv_groups.shape[3]), q_len=q_len, kv_len=kv_len, q_start=at,
            index=index[:, None].expand(*lead, -1, 1), count=index.new_ones(1).expand(*lead, len(index)),
            q_order=q_order, kv_order=kv_order, within=within, q_heads=heads, repeats=repeats, cost=cost,
        )  # fmt: skip
        if repeats == "merge" and check:
            made.need_disjoint()
        return made

    @classmethod
    def choose(
        cls,
        patterns: Sequence[Pattern],
        which: Int[Tensor, "..."],
        *,
        q_len: int,
        kv_len: int,
        q_start: int | None = None,
        within: Pattern | None = None,
        keep: Pattern | None = None,
        heads: int | None = None,
        cost: int = 0,
    ) -> Routed:
        """One of several patterns for each sample and decision: ``patterns[which[sample, decision]]``.

        Args:
            patterns: alike for all heads and samples.
            which: ``[B, R]``.
        """
        patterns = tuple(patterns)
        if not patterns or not all(isinstance(p, Pattern) for p in patterns):
            raise ValueError(f"patterns must be at least one Pattern, got {patterns!r}")
        if apart := [p for p in patterns if p.heads or p.samples]:
            raise ValueError(f"patterns must be alike for all heads and samples, got {apart[0]!r}")
        if not isinstance(which, Tensor) or which.ndim != 2 or which.is_floating_point() or 0 in which.shape:
            raise ValueError(
                "which must be an integer tensor [batch or 1, decisions], got "
                f"{list(which.shape) if isinstance(which, Tensor) else type(which).__name__}"
            )
        wrong = (which < 0) | (which >= len(patterns))
        if bool(wrong.any()):
            raise ValueError(f"which must be numbers of the {len(patterns)} patterns, got {int(which[wrong][0])}")
        return _new(cls)(
            block=(1, 1), q_len=q_len, kv_len=kv_len, q_start=resolve_q_start(q_len, kv_len, q_start),
            patterns=patterns, which=which.long(), within=within, keep=keep, q_heads=heads, cost=cost,
        )  # fmt: skip
