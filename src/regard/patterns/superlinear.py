"""Superlinear attention's route (arXiv 2601.18401): search at about sqrt(L) anchors, attend inside the best spans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from regard.patterns.decided import Routed, both
from regard.patterns.pattern import Pattern, resolve_q_start
from regard.patterns.routed import Route, Summary
from regard.patterns.select import best, checked, pieces, to_index
from regard.patterns.static import Window, need_int

__all__ = ["Superlinear"]


@dataclass(frozen=True)
class Superlinear(Route):
    """Spans of past keys for each query, behind a window, found by the scores of their anchors.

    The anchors of a query at t are ``a_i = t - floor(i^p) + 1 >= 0`` for i > s; the window is the last
    ``floor((s + 1)^p) - 1`` keys, its own included, so that anchor s + 1 touches it. Span i is ``[a_i - ceil(b r),
    a_i + ceil(f r)]``, both ends included, cut at 0 and below the window, with ``r = (t + 1)^(1 - 1/p)``. The spans of
    the k anchors of greatest score ``q . K[a_i] / sqrt(d)`` are listed. At p = 2 with ``b >= 2`` the spans of all
    anchors and the window cover every past key, so none is excluded for good, and pairs and scores grow as ``L^1.5``;
    at another p as ``L^(1 + max(1/p, 1 - 1/p))``.

    Args:
        p: how fast anchors thin out, above 1.
        s: steps inside the window, at least 1.
        k: spans of a query; one gives a gate no gradient.
        b, f: reach of a span behind and after its anchor, in units of r; at least 0.
        within: what may meet at all; a span is a candidate by its anchor. See `Route`.

    Raises:
        ValueError: a number that does not fit.
    """

    p: float | int = 2
    s: int = 3
    k: int = 3
    b: float | int = 2
    f: float | int = 0
    within: Pattern | None = None

    block = (1, 1)
    heads = "each"

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not self.p > 1:
            raise ValueError(f"p must be above 1 (2: anchors about sqrt(L) apart), got {self.p!r}")
        need_int("s", self.s, 1)
        need_int("k", self.k, 1)
        for name in ("b", "f"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")

    @property
    def window(self) -> Window:
        """The keys that every query meets, by position."""
        return Window(self.reach(self.s + 1) - 2)

    def reach(self, i: int) -> int:
        """``floor(i^p)``: anchor i stands so many positions behind, less one."""
        return i * i if self.p == 2 else math.floor(i**self.p + 1e-9)

    def steps(self, length: int) -> Int[Tensor, "anchors"]:
        """``floor(i^p)`` of every anchor of a query at ``length - 1``, nearest first; earlier queries have some."""
        found, i = [], self.s + 1
        while self.reach(i) <= length:
            found.append(self.reach(i))
            i += 1
        return torch.tensor(found, dtype=torch.long)

    def spans(
        self, positions: Int[Tensor, "q_len"], steps: Int[Tensor, "anchors"]
    ) -> tuple[Int[Tensor, "q_len anchors"], Int[Tensor, "q_len anchors"]]:
        """``(start, stop)`` of the span of every anchor, half-open; ``start >= stop`` where a query has none."""
        t = positions[:, None]
        anchor = t - steps.to(t.device) + 1
        start, stop = self._around(t, anchor)
        return torch.where(anchor >= 0, start, 0), torch.where(anchor >= 0, stop, 0)

    def _around(self, t: Int[Tensor, "..."], anchor: Int[Tensor, "..."]) -> tuple[Int[Tensor, "..."], ...]:
        """The span of an anchor >= 0 of the query at t; never empty, as no anchor is inside the window."""
        r = (t.double() + 1) ** (1 - 1 / self.p)
        start = (anchor - _ceil(self.b * r)).clamp(min=0)
        return start, torch.minimum(anchor + _ceil(self.f * r), t - self.window.left - 1) + 1

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``key``: every key, since each is an anchor of some later query."""
        keys = k if past is None else torch.cat([past["key"], k], 2)
        return Summary(keys.shape[2], {"key": keys})

    def scores(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        q_start: int,
        steps: Int[Tensor, "anchors"],
    ) -> Float[Tensor, "batch heads q_len anchors"]:
        """``q . K[a_i] / sqrt(d)`` of every anchor, -inf where a query has none; differentiable."""
        group, (batch, heads, q_len, dim) = q.shape[1] // key.shape[1], q.shape
        grouped = q.unflatten(1, (key.shape[1], group)) * dim**-0.5
        if torch.is_grad_enabled() and (q.requires_grad or key.requires_grad):
            products = [grouped[:, :, :, skip:] * at for skip, at in self._met(key, q_start, q_len, steps)]
            found = [pad(x.sum(-1), (q_len - x.shape[3], 0), value=-torch.inf).flatten(1, 2) for x in products]
            return torch.stack(found, -1) if found else q.new_zeros(batch, heads, q_len, 0)
        out = grouped.new_empty(len(steps), *grouped.shape[:-1])
        held = torch.empty_like(grouped)  # one product's memory serves all anchors
        for each, (skip, at) in zip(out, self._met(key, q_start, q_len, steps), strict=True):
            product = torch.mul(grouped[:, :, :, skip:], at, out=held[:, :, :, skip:])
            torch.sum(product, -1, out=each[:, :, :, skip:])
            each[:, :, :, :skip] = -torch.inf
        return out.flatten(2, 3).movedim(0, -1).contiguous()

    @staticmethod
    def _met(key: Tensor, q_start: int, q_len: int, steps: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of every anchor: how many queries come before the first that has it, and the keys of the others."""
        for step in steps.tolist():
            skip = min(max(step - 1 - q_start, 0), q_len)
            first = q_start + skip - step + 1
            yield skip, key[:, :, None, first : first + q_len - skip]

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The spans, nearest first, kept together with `window`; `Routed.score` holds the scores, with their gradient.

        q is the search query; the queries that attend may be others.
        """
        within = both(self.within, within)
        q_len, kv_len = q.shape[2], summary.length
        start = resolve_q_start(q_len, kv_len, q_start)
        parts = pieces(q_len, q.shape[0] * q.shape[1] * q.shape[3]) or [slice(0, 0)]
        found = [self._choose(q[:, :, rows], summary["key"], start + rows.start, within) for rows in parts]
        width = max(low.shape[-1] for low, _, _ in found)
        low, high, score = (
            torch.cat([pad(x, (0, width - x.shape[-1]), value=empty) for x in each], 2)
            for each, empty in zip(zip(*found, strict=True), (0, 0, -torch.inf), strict=True)
        )
        return Routed.spans(
            low,
            high,
            q_len=q_len,
            kv_len=kv_len,
            q_start=start,
            score=score,
            within=within,
            keep=self.window,
            heads=q.shape[1],
            cost=self.cost(q_len, kv_len, q.shape[3]),
            check=False,
        )

    def _choose(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        key: Float[Tensor, "batch kv_heads kv_len head_dim"],
        q_start: int,
        within: Pattern | None,
    ) -> tuple[
        Int[Tensor, "batch heads q_len width"],
        Int[Tensor, "batch heads q_len width"],
        Float[Tensor, "batch heads q_len width"],
    ]:
        """Start, stop and score of the spans of some queries; 0, 0 and -inf where a query has fewer than others."""
        at = torch.arange(q_start, q_start + q.shape[2], device=q.device)
        steps = self.steps(q_start + q.shape[2])
        scores = self.scores(q, key, q_start, steps)
        seen, steps = checked(scores), steps.to(at.device)
        if within is not None:
            head = torch.arange(q.shape[1], device=q.device)[:, None, None]
            sample = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
            anchors = at[:, None] - steps + 1
            may = within.allows(at[:, None], anchors.clamp(min=0), head, sample) | (anchors < 0)
            if not bool(may.all()):  # of anchors that are not there the score says so
                seen = seen.masked_fill(~may, -torch.inf)
        index, _ = to_index(best(seen, self.k))
        some = index >= 0
        index = index.clamp(min=0).long()
        low, high = self._around(at[:, None], at[:, None] - steps[index] + 1)
        return torch.where(some, low, 0), torch.where(some, high, 0), scores.gather(-1, index).where(some, -torch.inf)

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """A product with the key of every anchor of every query, the queries being the last ones."""
        steps = self.steps(kv_len)
        first = torch.clamp(steps, min=kv_len - q_len + 1)  # the least t + 1 of a query that has the anchor
        return int((kv_len - first + 1).clamp(min=0).sum()) * head_dim


def _ceil(x: Tensor) -> Tensor:
    """Rounded up; a product within 1e-9 of an integer is that integer."""
    return (x - 1e-9).ceil().long()
