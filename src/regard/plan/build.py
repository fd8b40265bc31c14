"""`regard.plan(model, inputs)`: record, search, verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from regard.patterns import Pattern
from regard.patterns.routed import Route
from regard.plan.cost import CostModel
from regard.plan.groups import grouped
from regard.plan.identity import identity
from regard.plan.judge import Judge, judge_of
from regard.plan.options import DENSE, Option
from regard.plan.plan import Plan
from regard.plan.record import LayerRecord, Recording, projections
from regard.plan.search import search
from regard.watch.anatomy import Anatomy
from regard.watch.anatomy import anatomy as find_anatomy
from regard.watch.probe import quiet, run

__all__ = ["plan"]

TRIES = 6
"""Plans that are verified on the calibration sequences at most."""
PASSES = 5.0
"""Forward passes for each calibration sequence that planning may take; verification stops before."""
STEP = 3.0
"""By what factor the effect allowed changes from one verification to the next at most."""
GAP = 0.005
"""By how much a search may miss its bound: errors are estimates."""


def plan(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    loss: float | int | None = None,
    speed: float | int | None = None,
    judge: Judge | Callable[[Any, Any], Any] | None = None,
    groups: Sequence[str] | None = None,
    windows: Sequence[int | float] | None = None,
    patterns: Sequence[Pattern] = (),
    routes: Sequence[Route] | None = None,
    roles: Any = None,
    anatomy: Anatomy | None = None,
    costs: CostModel | None = None,
    sensitivity: Literal["gradient", "error"] = "gradient",
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """What each head can leave out: a plan that meets a budget on loss or on attention time.

    A dense run of a quarter of the calibration sequences (of each group at least one) tries every candidate of every
    head: kept mass, error after the output projection, effect on the loss, seconds on this machine. A search picks one
    a head, and the plans it finds are verified by their measured loss on all sequences. All of it takes as long as
    ``calibration["passes_per_sequence"]`` forward passes for each of them.

    Args:
        model: in evaluation mode or not; it is run without gradients and in evaluation mode.
        inputs: calibration sequences: dicts for ``model(**inputs)``, tuples or tensors. Language models judge the
            tokens of ``labels`` where a dict has them (below 0: not counted), else all.
        loss: the most that the judge's figure may grow: nats a token for language models (0.01: 1 % of perplexity),
            in each of `groups`. The default, 0.01, where `speed` is not given either.
        speed: how many times faster attention shall be, by the predicted time; the loss is then what it costs.
        judge: see `regard.plan.judge`; None: next-token loss of language models, else relative output error.
        groups: names of kinds of sequences, one a sequence ("text", "needle", ...): each must keep the loss.
        windows: widths of windows to try; below 1: shares of the length, which grow with it.
        patterns: more candidates, for every head.
        routes: tried for every head; None: `BlockTopK` over 1/16 and 1/8 of the blocks.
        roles: a `RoleTable` of `regard.roles`; None: roles are read off some rows of the first sequence.
        anatomy: the model's parts, where they cannot be found; without an output projection errors are those of the
            heads' own outputs.
        costs: seconds known already, as those of another plan of this model on this machine (`Plan.costs`); what is not
            among them is timed.
        sensitivity: "gradient": a backward pass of the recorded runs says what a change of each head's output costs;
            "error": without one (less memory), squared relative errors stand for it.
        progress: called with a line for each step.

    Raises:
        ValueError: for no inputs, two budgets, one that cannot be met (with the nearest that can), and calls that no
            plan can change, with their layer.
    """
    sequences = list(inputs)
    loss, speed, names = _check(sequences, loss, speed, groups)
    if sensitivity not in ("gradient", "error"):
        raise ValueError(f"sensitivity must be 'gradient' or 'error', got {sensitivity!r}")
    say = progress or (lambda line: None)
    began = time.perf_counter()
    with quiet(model):
        work = _Work(model, sequences, names, judge_of(judge, model, _dict(sequences[0])), began)
        parts = _anatomy(model, sequences[0], anatomy)
        how = {"windows": windows, "extra": tuple(patterns), "routes": routes}
        recording = Recording(
            model=model,
            costs=CostModel() if costs is None else costs,
            how=how,
            roles=_roles(roles),
            projections=projections(model, parts),
            judge=work.judge,
            gradients=sensitivity == "gradient",
        )
        recorded = work.record(recording)
        say(f"{len(recording.layers)} layers recorded on {recorded} of {len(sequences)} sequences")
        problem = _Problem(list(recording.layers.values()), recording.costs)
        found = _meet_speed(problem, work, speed) if speed is not None else _meet_loss(problem, work, loss, say)
        which, harms, tries = found
        forward = work.forward
    seconds = time.perf_counter() - began
    made = problem.plan(model, which)
    made.calibration = {
        "budget": f"loss {loss:g}" if speed is None else f"speed {speed:g}",
        "unit": work.judge.unit,
        "harm": harms,
        "dense_loss": work.dense_loss(),
        "sequences": len(sequences),
        "verified": tries,
        "seconds": seconds,
        "forward_seconds": forward,
        "passes_per_sequence": seconds / (forward * len(sequences)),
    }
    say(str(made))
    return made


def _check(
    sequences: list[Any], loss: Any, speed: Any, groups: Sequence[str] | None
) -> tuple[float, float | None, list[str]]:
    if not sequences:
        raise ValueError("inputs must be at least one calibration sequence, got none")
    if loss is not None and speed is not None:
        raise ValueError(f"loss and speed are two budgets: give one, got loss={loss!r} and speed={speed!r}")
    for name, value, least in (("loss", loss, 0), ("speed", speed, 1)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and (not number or not value >= least):
            raise ValueError(f"{name} must be a number >= {least}, got {value!r}")
    names = ["all"] * len(sequences) if groups is None else [str(g) for g in groups]
    if len(names) != len(sequences):
        raise ValueError(f"groups must name each of the {len(sequences)} sequences, got {len(names)}")
    return (0.01 if loss is None else float(loss)), None if speed is None else float(speed), names


def _dict(inputs: Any) -> Mapping[str, Any]:
    return inputs if isinstance(inputs, Mapping) else {}


def _anatomy(model: nn.Module, inputs: Any, given: Anatomy | None) -> Anatomy | None:
    if given is not None:
        return given
    try:
        return find_anatomy(model)
    except (ValueError, LookupError):
        pass
    try:
        return find_anatomy(model, inputs)
    except (ValueError, LookupError):
        return None


def _roles(table: Any) -> dict[str, list[str]]:
    if table is None:
        return {}
    names = table.names
    return {
        str(layer): [str(role) for role in names.sel(layer=layer).values.tolist() if role]
        for layer in names["layer"].values.tolist()
    }


@dataclass(eq=False)
class _Work:
    """The calibration sequences: run dense once, and again under plans."""

    model: nn.Module
    sequences: list[Any]
    names: list[str]
    judge: Judge
    began: float
    kept: list[Any] = field(default_factory=list)
    forward: float = 0.0
    """Seconds of a plain forward pass, the mean over sequences."""
    longest: float = 0.0
    """Seconds of the longest verification so far."""

    def _given(self, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping):
            return inputs
        return {name: x for name, x in inputs.items() if name not in self.judge.dropped}

    def record(self, recording: Recording) -> int:
        """The dense runs; gives how many of them were recorded: a quarter of each group, rounded up."""
        many = {name: -(-self.names.count(name) // 4) for name in self.names}
        plain: list[float] = []
        recorded = 0
        for inputs, name in zip(self.sequences, self.names, strict=True):
            given = self._given(inputs)
            if many[name]:
                many[name] -= 1
                recorded += 1
                output = recording.run(given, inputs)
            else:
                output = self._plain(given, plain)
            self.kept.append(self.judge.keep(output, inputs))
        if not plain:
            self._plain(self._given(self.sequences[0]), plain)
        self.forward = float(np.mean(plain))
        return recorded

    def _plain(self, given: Any, seconds: list[float]) -> Any:
        start = time.perf_counter()
        output = run(self.model, given)
        seconds.append(time.perf_counter() - start)
        return output

    @property
    def passes(self) -> float:
        """Forward passes a sequence that planning has taken so far, with one more verification."""
        return (time.perf_counter() - self.began + self.longest) / (self.forward * len(self.sequences))

    def harms(self, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
        """The judge's figure under a plan, by group: the mean, and the mean with its standard error added."""
        found: dict[str, list[float]] = {}
        start = time.perf_counter()
        for inputs, kept, name in zip(self.sequences, self.kept, self.names, strict=True):
            with plan.applied(self.model):
                output = run(self.model, self._given(inputs))
            value = self.judge.harm(kept, output, inputs)
            if np.isnan(value):
                raise ValueError("the judge's figure is NaN under a plan: its loss is not defined on these sequences")
            found.setdefault(name, []).append(value)
        self.longest = max(self.longest, time.perf_counter() - start)
        means = {name: float(np.mean(x)) for name, x in found.items()}
        errors = {name: float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else 0.0 for name, x in found.items()}
        return means, {name: means[name] + errors[name] for name in means}

    def dense_loss(self) -> dict[str, float]:
        """The judge's own loss of the dense runs, by group, where it has one."""
        found: dict[str, list[float]] = {}
        for kept, name in zip(self.kept, self.names, strict=True):
            value = self.judge.value(kept)
            if value is not None:
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(x)) for name, x in found.items()}


@dataclass(eq=False)
class _Problem:
    """Errors and seconds of all heads, as the search wants them."""

    layers: list[LayerRecord]
    costs: CostModel

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("the model made no self-attention call that a plan could change")
        self.options: list[Option] = list({id(o): o for r in self.layers for o in r.options}.values())
        heads = max(r.shape[1] for r in self.layers)
        shape = (len(self.layers), heads, len(self.options) + 1)  # the last one: a head that a layer has not
        self.errors = np.full(shape, np.inf)
        self.seconds, self.calls = np.zeros(shape), np.zeros((len(self.layers), len(self.options) + 1))
        for row, layer in enumerate(self.layers):
            own, error = layer.shape[1], _objective(layer)
            self.errors[row, own:, -1] = 0.0
            for n, option in enumerate(layer.options):
                at = self.options.index(option)
                offered = layer.offered[:, n]
                self.errors[row, :own, at] = np.where(offered, error[:, n], np.inf)
                self.calls[row, at], self.seconds[row, :own, at] = self.costs.line(layer.shape, option)

    @property
    def dense_seconds(self) -> float:
        """All heads dense."""
        return sum(self.costs.seconds(r.shape, DENSE, r.shape[1]) for r in self.layers)

    @property
    def most(self) -> float:
        """The error of the worst choice."""
        return float(np.where(np.isfinite(self.errors), self.errors, -np.inf).max(-1).sum())

    def within(self, budget: float, on: Literal["cost", "error"]) -> np.ndarray:
        """The search's choice, ``[layers, heads]``."""
        return search(self.errors, self.seconds, budget, on=on, calls=self.calls, gap=GAP).which

    def error(self, which: np.ndarray) -> float:
        """The sum of errors of a choice."""
        return float(np.take_along_axis(self.errors, which[..., None], -1).sum())

    def plan(self, model: nn.Module, which: np.ndarray) -> Plan:
        """The plan of a choice, with the record of each head."""
        layers = {
            r.name: tuple(self.options[n] for n in row[: r.shape[1]]) for r, row in zip(self.layers, which, strict=True)
        }
        made = Plan(
            layers, {r.name: r.shape for r in self.layers}, identity(model, [r.name for r in self.layers]),
            causal={r.name: r.evidence.causal for r in self.layers}, costs=self.costs,
        )  # fmt: skip
        kept = []
        for r in self.layers:
            for head in range(r.shape[1]):
                made.heads.append(self._head(r, head, layers[r.name]))
                kept.append(made.heads[-1]["mass"])
        planned, dense = made.seconds(), made.seconds(dense=True)
        assert planned is not None
        assert dense is not None
        made.predicted = {
            "attention_seconds": planned,
            "dense_attention_seconds": dense,
            "attention_speedup": dense / planned if planned else None,
            "kept_mass": float(np.mean(kept)),
            "effect": self.error(which),
        }
        return made

    def _head(self, r: LayerRecord, head: int, given: tuple[Option, ...]) -> dict[str, Any]:
        option = given[head]
        sizes = {id(g.option): len(g.heads) for g in grouped(given)}
        considered = []
        for n, tried in enumerate(r.options):
            if r.offered[head, n]:
                share = max(1, sizes.get(id(tried), 1))
                considered.append(
                    {
                        "name": tried.name,
                        "kind": tried.kind,
                        "error": float(r.mean("error")[head, n]),
                        "worst_error": float(r.mean("worst")[head, n]),
                        "effect": float(r.mean("effect")[head, n]),
                        "mass": float(r.mean("mass")[head, n]),
                        "least_mass": float(r.mean("least_mass")[head, n]),
                        "seconds": self.costs.seconds(r.shape, tried, share) / share,
                    }
                )
        mine = next(c for c in considered if c["name"] == option.name)
        return {
            "layer": r.name,
            "head": head,
            "role": r.roles[head],
            "given": option.name,
            "why": _why(mine, considered),
            **{name: mine[name] for name in ("error", "worst_error", "effect", "mass", "least_mass", "seconds")},
            "candidates": considered,
        }


def _objective(layer: LayerRecord) -> np.ndarray:
    """What is summed over heads: the effect on the judge's figure, and the squared error at the queries it asks for.

    An effect is a gradient times a change, and gradients vanish where the model is sure of its answer, though without
    what it looked up it would not be. There the error itself counts.
    """
    return layer.mean("effect") + layer.mean("asked")


def _why(mine: dict[str, Any], considered: list[dict[str, Any]]) -> str:
    dense = next(c for c in considered if c["kind"] == "dense")
    saved = 1e3 * (dense["seconds"] - mine["seconds"])
    if mine["kind"] != "dense":
        return (
            f"saves {saved:.2f} of {1e3 * dense['seconds']:.2f} ms at an error of {mine['error']:.3g} "
            f"({mine['worst_error']:.3g} at its worst queries)"
        )
    others = [c for c in considered if c["kind"] != "dense" and c["seconds"] < dense["seconds"]]
    if not others:
        return "no candidate is faster"
    best = min(others, key=lambda c: c["error"])
    return (
        f"the nearest candidate, {best['name']}, has an error of {best['error']:.3g} ({best['worst_error']:.3g} at its "
        f"worst queries) for {1e3 * (dense['seconds'] - best['seconds']):.2f} ms"
    )


def _meet_speed(problem: _Problem, work: _Work, speed: float) -> tuple[np.ndarray, dict[str, float], int]:
    """The least error at this speed, and what it costs."""
    dense = problem.dense_seconds
    try:
        which = problem.within(dense / speed, "cost")
    except ValueError as error:
        least = problem.plan(work.model, problem.within(problem.most, "error")).predicted["attention_seconds"]
        raise ValueError(f"speed={speed:g} is met by no plan; the fastest is {dense / least:.2f}") from error
    means, _ = work.harms(problem.plan(work.model, which))
    return which, means, 1


def _meet_loss(
    problem: _Problem, work: _Work, loss: float, say: Callable[[str], None]
) -> tuple[np.ndarray, dict[str, float], int]:
    """The fastest verified plan: the error budget goes up and down until the measured loss is near its own."""
    most = problem.most
    dense = np.array(problem.within(0.0, "error"))
    best, best_harms = dense, dict.fromkeys(work.names, 0.0)
    low, high, budget, tries = 0.0, most, min(most, work.judge.guess * loss), 0
    tried: dict[bytes, float] = {}
    while tries < TRIES and budget > 1e-9 * max(most, 1e-30) and (tries < 2 or work.passes < PASSES):
        which = problem.within(budget, "error")
        if which.tobytes() in tried:
            break
        means, upper = work.harms(problem.plan(work.model, which))
        tries += 1
        worst = max(upper.values())
        tried[which.tobytes()] = worst
        say(f"effect {budget:.4g}: {', '.join(f'{n} {v:+.5f}' for n, v in means.items())} {work.judge.unit}")
        fits = worst <= loss
        if fits:
            best, best_harms, low = which, means, budget
        else:
            high = budget
        if low and high < most:  # known from both sides: the middle, on a scale of logarithms
            if high < 1.1 * low:
                break
            budget = (low * high) ** 0.5
            continue
        # the loss grows faster than the effect: half the way on a scale of logarithms
        step = min(STEP, max(1 / STEP, (0.8 * loss / worst) ** 0.5)) if worst > 0 else STEP
        budget = min(max(budget * step, low * 1.1), high * 0.9 if high < most or not fits else most)
        if budget <= low:
            break
    return best, best_harms, tries
