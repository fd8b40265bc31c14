"""Routes: patterns decided from q and k. `Routed` is what they return."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from regard.patterns.decided import Routed, both
from regard.patterns.pattern import Pattern

__all__ = ["Refresh", "Route", "Routed", "Summary"]


@dataclass(frozen=True, eq=False)
class Summary:
    """What a route knows of the first ``length`` keys: named tensors, `[batch, kv_heads, ...]`."""

    length: int
    parts: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(x.numel() * x.element_size() for x in self.parts.values())


class Route(ABC):
    """Decides from q and k which pairs may meet: ``route(q, k)`` is a `Routed`, which is a pattern.

    In two steps, so that decoding appends keys and computes nothing of the old ones again: ``summary =
    route.summarize(k)``, later ``route.summarize(new, past=summary)``; and ``route.select(q, summary)``.
    ``route & causal`` is the same route with `within` narrowed: what it forbids is no candidate and uses up no budget.

    Routes without parameters are frozen dataclasses; routes with parameters are modules of a layer.
    """

    block: tuple[int, int]
    """(queries that share a decision, keys in a block)."""
    heads: Literal["each", "kv", "all"]
    """One decision for each query head, for each kv head, or for all."""
    within: Pattern | None
    """What may meet at all, by position; None: everything."""

    @abstractmethod
    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """What deciding needs of the keys; with ``past``, k holds the keys after those. Equal to summarizing them all
        at once."""

    def settle(self, summary: Summary) -> Summary:
        """What is needed of a summary to append to it, and to select for queries after its keys; by default all."""
        return summary

    @abstractmethod
    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The decision for these queries, over ``summary.length`` keys, inside ``self.within & within``.

        ``q_start``: position of the first query; None: they are the last ones.
        """

    @abstractmethod
    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """Multiply-adds of deciding, per query head."""

    def __call__(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        k: Float[Tensor, "batch kv_heads kv_len head_dim"],
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """``select(q, summarize(k))``."""
        return self.select(q, self.summarize(k), within=within, q_start=q_start)

    @property
    def appends(self) -> bool:
        """Whether `summarize` takes ``past``."""
        return True

    def fresh(self) -> Route:
        """A route like this with no memory of what it decided; itself where it has none."""
        return self

    def __and__(self, pattern: Pattern) -> Route:
        """The same route inside the pattern too."""
        if not isinstance(pattern, Pattern):
            return NotImplemented
        return self._with("within", both(self.within, pattern))

    __rand__ = __and__

    def _with(self, name: str, value: Any) -> Route:
        narrowed = copy.copy(self)
        object.__setattr__(narrowed, name, value)
        return narrowed


class Refresh(Route):
    """``route``, decided at every n-th call of `select`, and in between taken over for keys that came since.

    A decision is taken over where the call has as many rows of queries as the last one, the same samples, heads and
    ``within`` of its own kind, and no fewer keys; otherwise it is made. Blocks keep their number, so a new key is seen
    once the route is asked again, or where ``keep`` or a window of the route holds it: decode with a ``keep``. Holds
    state: `reset` before another sequence.

    Args:
        route: what decides.
        every: decide at the first of so many calls.
    """

    def __init__(self, route: Route, every: int) -> None:
        if not isinstance(route, Route):
            raise ValueError(f"route must be a Route, got {type(route).__name__}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self.route, self.every = route, every
        self.reset()

    def reset(self) -> None:
        """Forget the last decision: the next call decides."""
        self._calls = 0
        self._last: Routed | None = None
        self._lead: tuple[int, ...] = ()

    @property
    def block(self) -> tuple[int, int]:  # type: ignore[override]
        """The route's."""
        return self.route.block

    @property
    def heads(self) -> Literal["each", "kv", "all"]:  # type: ignore[override]
        """The route's."""
        return self.route.heads

    @property
    def within(self) -> Pattern | None:  # type: ignore[override]
        """The route's."""
        return self.route.within

    @property
    def appends(self) -> bool:
        """The route's."""
        return self.route.appends

    def fresh(self) -> Refresh:
        """The same before its first call."""
        return Refresh(self.route.fresh(), self.every)

    def __and__(self, pattern: Pattern) -> Refresh:
        return Refresh(self.route & pattern, self.every) if isinstance(pattern, Pattern) else NotImplemented

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """The route's."""
        return self.route.summarize(k, past=past)

    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The route's decision, or the last one moved to these queries."""
        start = summary.length - q.shape[2] if q_start is None else q_start
        last, lead = self._last, tuple(q.shape[:3])
        if last is None or lead != self._lead or summary.length < last.kv_len or self._calls % self.every == 0:
            self._calls = 0
            last = self.route.select(q, summary, within=within, q_start=start)
        else:
            last = last.moved(start, summary.length, both(self.route.within, within))
        self._calls += 1
        self._last, self._lead = last, lead
        return last

    def settle(self, summary: Summary) -> Summary:
        """The route's."""
        return self.route.settle(summary)

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """The route's, divided by ``every``, rounded up."""
        return -(-self.route.cost(q_len, kv_len, head_dim) // self.every)
