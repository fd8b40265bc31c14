"""One option for each head under a budget: a multiple-choice knapsack by a Lagrangian, closed to the optimum.

Heads of a layer that share an option run as one kernel call, so an option costs something once a layer (``calls``),
once a group of heads that read the same keys (``units``), and something a head (``costs``). For a price ``p`` of the
budget the layers separate, and in a layer the best set of options is found over all sets of at most `SETS` options;
the price at which the budget is met exactly gives a bound, and what lies between the bound and the best choice is
searched head by head over the choices that no other beats (Nemhauser and Ullmann), as far as they can still win.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

__all__ = ["Found", "search"]

SETS = 10
"""Options of a layer whose sets are all tried; of more, the sets are made smaller one option at a time."""
STATES = 4_000
"""Partial choices that are carried from head to head, of up to 64 heads in all (fewer of more heads); of more, the
most promising."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a search chose."""

    which: np.ndarray
    """int ``[layers, heads]``: the option of each head."""
    error: float
    """Sum of the errors of the chosen options."""
    cost: float
    """Sum of their costs, calls and units included."""
    bound: float
    """No choice within the budget has less of what was minimised than this."""
    optimal: bool
    """No choice within the budget is better (up to rounding)."""
    price: float
    """What one unit of the budget is worth, in units of what was minimised; 0.0 where the budget binds nothing."""


def search(
    errors: Any,
    costs: Any,
    budget: float | int,
    *,
    on: Literal["cost", "error"] = "cost",
    calls: Any = None,
    units: Any = None,
    group: int = 1,
    gap: float | int = 0.0,
) -> Found:
    """The choice of one option a head with the least total error at a total cost of at most `budget`, or the reverse.

    ``error = sum_lh errors[l, h, w_lh]`` and ``cost = sum_lh costs[l, h, w_lh] + sum_l sum_{o used in l} calls[l, o]
    + sum_l sum_g sum_{o used in group g of l} units[l, o]``.

    Args:
        errors: ``[layers, heads, options]``, anything that adds up; infinite: the option is not on offer to that head.
        costs: ``[options]`` or ``[layers, heads, options]``, of a head.
        budget: the most that may be spent, of `on`.
        on: "cost": the budget is on the cost and the error is minimised; "error": the other way round.
        calls: ``[options]`` or ``[layers, options]``, once for each option that some head of a layer has.
        units: the same shapes, once for each option that some head of a group has.
        group: consecutive heads in a group (query heads of one kv head); divides the heads.
        gap: share of what is minimised by which the choice may be worse than the bound; 0: the optimum is looked for.

    Raises:
        ValueError: for shapes that do not fit, NaN, negative costs, a head without an option, and a budget that no
            choice meets (with the least that one does).
    """
    if on not in ("cost", "error"):
        raise ValueError(f"on must be 'cost' or 'error', got {on!r}")
    error = np.array(errors, dtype=float)
    if error.ndim != 3 or 0 in error.shape:
        raise ValueError(f"errors must be [layers, heads, options], got shape {list(error.shape)}")
    layers, heads, options = error.shape
    cost = _broadcast("costs", costs, error.shape)
    called, shared = (_broadcast(n, x, (layers, options)) for n, x in (("calls", calls), ("units", units)))
    if np.isnan(error).any():
        at = tuple(map(int, np.argwhere(np.isnan(error))[0]))
        raise ValueError(f"errors must be numbers, or infinite where an option is not on offer; NaN at {at}")
    offered = np.isfinite(error)
    if not offered.any(-1).all():
        at = tuple(map(int, np.argwhere(~offered.any(-1))[0]))
        raise ValueError(f"errors: head {at[1]} of layer {at[0]} has no option with a finite error")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or heads % group:
        raise ValueError(f"group must divide the {heads} heads of a layer, got {group!r}")
    budget = float(budget)
    if np.isnan(budget):
        raise ValueError("budget must be a number, got NaN")
    shape = (layers, heads // group, group, options)
    spent = _Sum(cost.reshape(shape), called, shared)
    harm = _Sum(np.where(offered, error, 0).reshape(shape), np.zeros_like(called), np.zeros_like(shared))
    goal, limit = (harm, spent) if on == "cost" else (spent, harm)
    problem = _Problem(goal, limit, offered.reshape(shape), budget, float(gap))
    which, bound, price, optimal = problem.solve(on)
    return Found(which.reshape(layers, heads), harm.of(which), spent.of(which), bound, optimal, price)


def _broadcast(name: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    x = np.zeros(shape[-1]) if given is None else np.array(given, dtype=float)
    if x.shape not in (shape[-1:], shape):
        raise ValueError(f"{name} must be {list(shape[-1:])} or {list(shape)}, got shape {list(x.shape)}")
    if not np.isfinite(x).all() or (x < 0).any():
        raise ValueError(f"{name} must be finite and >= 0")
    return np.broadcast_to(x, shape)


@dataclass(frozen=True, eq=False)
class _Sum:
    """A total over heads, over the options used in a layer, and over those used in a group."""

    head: np.ndarray  # [layers, groups, group, options]
    call: np.ndarray  # [layers, options]
    unit: np.ndarray  # [layers, options]

    def of(self, which: np.ndarray) -> float:
        """The total of a choice ``[layers, groups, group]``."""
        total = float(np.take_along_axis(self.head, which[..., None], -1).sum())
        used = (which[..., None] == np.arange(self.call.shape[1])).any(2)  # [layers, groups, options]
        return total + float((used.any(1) * self.call).sum()) + float((used.sum(1) * self.unit).sum())

    def plus(self, other: _Sum, price: float) -> _Sum:
        """``self + price * other``."""
        return _Sum(*(a + price * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(eq=False)
class _Problem:
    """Minimise `goal` with `limit` at most `budget`."""

    goal: _Sum
    limit: _Sum
    offered: np.ndarray
    budget: float
    gap: float

    def solve(self, on: str) -> tuple[np.ndarray, float, float, bool]:
        """``(which, bound, price, optimal)``."""
        scale = _size(self.goal) / max(_size(self.limit), 1e-300)
        free, exact = self._least(self.goal.plus(self.limit, 1e-12 * scale))
        if self.limit.of(free) <= self._most:
            return free, self.goal.of(free), 0.0, exact
        tight, sure = self._least(self.limit.plus(self.goal, 1e-12 / max(scale, 1e-300)))
        least = self.limit.of(tight)
        if least > self._most:
            other = "" if sure else " that was found"
            raise ValueError(f"budget={self.budget:g} on {on} is met by no choice; the least{other} is {least:g}")
        bound, price, all_exact = -np.inf, 0.0, exact and sure
        for _ in range(100):
            a, b = self.limit.of(free), self.limit.of(tight)
            price = (self.goal.of(tight) - self.goal.of(free)) / (a - b)
            mixed = self.goal.plus(self.limit, price)
            which, exact = self._least(mixed)
            all_exact &= exact
            value = mixed.of(which)
            bound = value - price * self.budget
            if value >= mixed.of(tight) * (1 - 1e-12) - 1e-300:
                break
            if self.limit.of(which) <= self._most:
                tight = which
            else:
                free = which
        best = min((tight, self._between(free, tight)), key=lambda w: self._rank(w))
        if not all_exact or self.goal.of(best) <= bound * (1 + self.gap) - 1e-300:
            return best, min(bound, self.goal.of(best)), price, False
        better, whole = self._close(best, price, bound)
        return better, min(bound, self.goal.of(better)) if not whole else self.goal.of(better), price, whole

    @property
    def _most(self) -> float:
        return self.budget + 1e-9 * abs(self.budget)

    def _rank(self, which: np.ndarray) -> tuple[bool, float]:
        return self.limit.of(which) > self._most, self.goal.of(which)

    # -- one price

    def _least(self, total: _Sum) -> tuple[np.ndarray, bool]:
        """The choice with the least total, and whether it surely is."""
        head = np.where(self.offered, total.head, np.inf)
        if not total.call.any() and not total.unit.any():
            return head.argmin(-1), True
        which, exact = np.empty(head.shape[:3], dtype=int), True
        for layer in range(len(head)):
            which[layer], sure = _layer(head[layer], total.call[layer], total.unit[layer])
            exact &= sure
        return which, exact

    def _between(self, free: np.ndarray, tight: np.ndarray) -> np.ndarray:
        """From a choice over the budget to one within it, layer by layer, what costs the least goal a unit first."""
        which = free.copy()
        rates = []
        for layer in np.flatnonzero((free != tight).any((1, 2))).tolist():
            less, more = (self._only(x, layer) for x in (self.goal, self.limit))
            saved = more.of(free[[layer]]) - more.of(tight[[layer]])
            lost = less.of(tight[[layer]]) - less.of(free[[layer]])
            rates.append((lost / saved if saved > 0 else np.inf, layer))
        for _, layer in sorted(rates):
            if self.limit.of(which) <= self._most:
                break
            which[layer] = tight[layer]
        return which

    @staticmethod
    def _only(total: _Sum, layer: int) -> _Sum:
        part = slice(layer, layer + 1)
        return _Sum(total.head[part], total.call[part], total.unit[part])

    # -- from the bound to the optimum

    def _close(self, best: np.ndarray, price: float, bound: float) -> tuple[np.ndarray, bool]:
        """The best choice of all, by states ``(options used here, goal, limit)`` from head to head."""
        upper = self.goal.of(best)
        if upper <= bound * (1 + 1e-12) + 1e-300:
            return best, True
        mixed = self.goal.plus(self.limit, price)
        head = np.where(self.offered, mixed.head, np.inf)
        layers, groups, group, options = head.shape
        best_each, _ = self._least(mixed)
        cheapest = np.array([self._only(mixed, n).of(best_each[[n]]) for n in range(layers)])
        after = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0.0)
        room = upper + price * self.budget
        most = max(16, STATES * 64 // max(64, layers * groups * group))
        state = _States.empty()
        picks: list[tuple[np.ndarray, np.ndarray]] = []
        whole = True
        for layer in range(layers):
            least = head[layer].reshape(-1, options).min(-1)
            left = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0)
            state = state.fresh(layer=True)
            for n, (g, h) in enumerate(np.ndindex(groups, group)):
                state = state.fresh(layer=False) if h == 0 else state
                state, origin, option = state.extended(self, layer, g, h)
                value = state.goal + price * state.limit + left[n] + after[layer]
                keep = state.unbeaten(np.flatnonzero((value <= room * (1 + 1e-12)) & (state.limit <= self._most)))
                if len(keep) > most:
                    keep, whole = np.sort(keep[np.argsort(value[keep], kind="stable")[:most]]), False
                state = state[keep]
                picks.append((origin[keep], option[keep]))
        if not len(state.goal):
            return best, whole
        at = int(state.goal.argmin())
        if state.goal[at] >= upper:
            return best, whole
        chosen = []
        for origin, option in reversed(picks):
            chosen.append(int(option[at]))
            at = int(origin[at])
        return np.array(chosen[::-1]).reshape(best.shape), whole


@dataclass(eq=False)
class _States:
    """Partial choices: which options their layer and their group use so far (bits), and both totals."""

    used: np.ndarray
    here: np.ndarray
    goal: np.ndarray
    limit: np.ndarray

    @classmethod
    def empty(cls) -> _States:
        return cls(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), np.zeros(1))

    def __getitem__(self, at: np.ndarray) -> _States:
        return _States(*(x[at] for x in vars(self).values()))

    def fresh(self, layer: bool) -> _States:
        """At the start of a layer, or of a group."""
        nothing = np.zeros_like(self.used)
        return replace(self, used=nothing, here=nothing) if layer else replace(self, here=nothing)

    def extended(self, problem: _Problem, layer: int, g: int, h: int) -> tuple[_States, np.ndarray, np.ndarray]:
        """Every state with every option of the next head; where each came from, and its option."""
        options = np.flatnonzero(problem.offered[layer, g, h])
        bit = np.int64(1) << options
        first, new = (self.used[:, None] & bit) == 0, (self.here[:, None] & bit) == 0
        sums = []
        for total, before in ((problem.goal, self.goal), (problem.limit, self.limit)):
            more = total.head[layer, g, h, options] + first * total.call[layer, options]
            sums.append((before[:, None] + more + new * total.unit[layer, options]).ravel())
        origin = np.repeat(np.arange(len(self.used)), len(options))
        option = np.tile(options, len(self.used))
        used, here = (self.used[:, None] | bit).ravel(), (self.here[:, None] | bit).ravel()
        return _States(used, here, *sums), origin, option

    def unbeaten(self, among: np.ndarray) -> np.ndarray:
        """Those which no other with the same options in use equals or beats on both totals."""
        part = self[among]
        order = np.lexsort((part.goal, part.limit, part.here, part.used))
        used, here, goal = part.used[order], part.here[order], part.goal[order]
        start = np.r_[True, (used[1:] != used[:-1]) | (here[1:] != here[:-1])] if len(order) else np.zeros(0, bool)
        kind = np.cumsum(start)
        # a running minimum in each kind: kinds are set apart by more than any goal
        apart = (goal.max() - goal.min() + 1.0) if len(goal) else 1.0
        least = np.minimum.accumulate(goal - kind * apart)
        keep = start.copy()
        keep[1:] |= (goal - kind * apart)[1:] < least[:-1]
        return np.sort(among[order[keep]])


def _layer(head: np.ndarray, call: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, bool]:
    """The least choice ``[groups, group]`` of one layer, and whether it surely is; `head` [groups, group, options]."""
    options = np.flatnonzero(np.isfinite(head).any((0, 1)))
    if len(options) > SETS:
        return _shrunk(head, call, unit, options), False
    member = (np.arange(1 << len(options))[:, None] >> np.arange(len(options))) & 1 == 1  # [sets, options]
    chosen = np.where(member[:, None, None], head[..., options], np.inf)  # [sets, groups, group, options]
    best = chosen.min(-1).sum(-1) + (member * unit[options]).sum(-1)[:, None]  # a group that uses just this set
    within = best.copy()
    source = np.broadcast_to(np.arange(len(member))[:, None], best.shape).copy()
    for n in range(len(options)):  # the best over all subsets, one option at a time
        big = np.flatnonzero(member[:, n])
        small = big ^ (1 << n)
        better = within[small] <= within[big]
        within[big] = np.where(better, within[small], within[big])
        source[big] = np.where(better, source[small], source[big])
    total = within.sum(-1) + (member * call[options]).sum(-1)
    of_group = source[int(total.argmin())]
    picked = [chosen[s, g].argmin(-1) for g, s in enumerate(of_group)]
    return options[np.stack(picked)], True


def _shrunk(head: np.ndarray, call: np.ndarray, unit: np.ndarray, options: np.ndarray) -> np.ndarray:
    """A good choice of a layer with many options: all of them, then one fewer as long as that costs less."""

    def best(allowed: np.ndarray) -> tuple[float, np.ndarray]:
        which = allowed[head[..., allowed].argmin(-1)]
        value = float(np.take_along_axis(head, which[..., None], -1).sum())
        used = (which[..., None] == allowed).any(1)
        return value + float((used.any(0) * call[allowed]).sum() + (used.sum(0) * unit[allowed]).sum()), which

    value, which = best(options)
    while len(options) > 1:
        tried = [best(np.delete(options, n)) for n in range(len(options))]
        n = int(np.argmin([v for v, _ in tried]))
        if not tried[n][0] < value:
            break
        (value, which), options = tried[n], np.delete(options, n)
    return which


def _size(total: _Sum) -> float:
    return float(max(np.abs(x).max() for x in vars(total).values()))
