"""What a plan gains and loses, measured: attention time, whole time, loss, scores and memory, dense beside planned."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.plan.apply import label_of
from regard.plan.judge import Judge, TokenLoss, judge_of
from regard.plan.plan import Plan
from regard.watch.call import Call
from regard.watch.probe import quiet, run
from regard.watch.seam import Seam

__all__ = ["Timed", "measure"]


class Timed:
    """A model as it is, with the time inside some layers' attention calls: the dense side of a comparison."""

    def __init__(self, model: nn.Module, layers: Sequence[str]):
        self.layers = set(layers)
        self.seconds: dict[str, float] = {}
        self.shapes: set[tuple[int, ...]] = set()
        self._seam = Seam(model, self._answer, edits=True)

    def __enter__(self) -> Timed:
        self._seam.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._seam.__exit__(*error)

    def _answer(self, call: Call) -> Tensor | None:
        name = label_of(call)
        if name not in self.layers or call.kind != "self":
            return None
        _wait(call.q)
        start = time.perf_counter()
        out = call.run()
        _wait(call.q)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        (batch, heads, q_len, width), kv = call.q.shape, call.v.shape
        self.shapes.add((batch, heads, kv[1], q_len, kv[2], width, kv[3]))
        return out


def measure(
    model: nn.Module,
    plan: Plan,
    inputs: Sequence[Any],
    *,
    judge: Judge | Callable[[Any, Any], Any] | None = None,
    groups: Sequence[str] | None = None,
    repeats: int = 1,
    any_weights: bool = False,
) -> dict[str, Any]:
    """Run each input dense and planned, one after the other, and compare. Kept in ``plan.measured``.

    Times are those of the prompt pass, after one run of each kind that does not count (blocks are laid out in the
    first).

    Args:
        model: the plan's model.
        inputs: what `regard.plan` takes, best others than it was made on.
        judge, groups: as there.
        repeats: runs of each input; times are medians of them.
        any_weights: as in `Plan.applied`.

    Returns:
        plain values: ``attention_seconds``, ``forward_seconds`` (``{"dense", "planned"}``, a sequence),
        ``attention_speedup``, ``forward_speedup``; ``harm`` by group in `unit`; for language models ``loss``,
        ``perplexity`` and ``perplexity_ratio`` (of all groups the worst) and, by group where labels ask for some tokens
        only, ``score``: sequences whose asked tokens are all the first choice; ``memory``: peak bytes of a run above
        what was held before, where the system tells; ``predicted_attention_seconds`` and its ratio to the measured one
        (None at other shapes than the plan's); threads, device, date.

    Raises:
        ValueError: for no inputs, and as `Plan.applied` does.
    """
    if not inputs:
        raise ValueError("inputs must be at least one sequence, got none")
    names = ["all"] * len(inputs) if groups is None else [str(g) for g in groups]
    if len(names) != len(inputs):
        raise ValueError(f"groups must name each of the {len(inputs)} sequences, got {len(names)}")
    chosen = judge_of(judge, model, inputs[0] if isinstance(inputs[0], Mapping) else {})
    rows: list[dict[str, Any]] = []
    shapes: set[tuple[int, ...]] = set()
    with quiet(model):
        warm: set[Any] = set()
        for given in inputs:
            sizes = tuple(tuple(x.shape) for x in _tensors(given))
            mine = _given(given, chosen)
            if sizes not in warm:
                warm.add(sizes)
                for how in ("dense", "planned"):
                    _once(model, plan, mine, how, any_weights)
            runs = [(_once(model, plan, mine, "dense", any_weights), _once(model, plan, mine, "planned", any_weights))
                    for _ in range(max(1, repeats))]  # fmt: skip
            dense, planned = ([pair[n] for pair in runs] for n in (0, 1))
            shapes |= dense[0]["shapes"]
            kept = chosen.keep(dense[0]["output"], given)
            row: dict[str, Any] = {"harm": chosen.harm(kept, planned[0]["output"], given), "loss": chosen.value(kept)}
            for name, each in (("dense", dense), ("planned", planned)):
                row[name] = {key: statistics.median(x[key] for x in each) for key in ("attention", "forward")}
                row[name]["memory"] = each[0]["memory"]
                if isinstance(chosen, TokenLoss) and isinstance(given, Mapping) and given.get("labels") is not None:
                    row[name]["score"] = chosen.score(each[0]["output"], given)
            rows.append(row)
    found = _summary(plan, rows, names, chosen, shapes)
    plan.measured = found
    return found


def _given(inputs: Any, judge: Judge) -> Any:
    if not isinstance(inputs, Mapping):
        return inputs
    return {name: x for name, x in inputs.items() if name not in judge.dropped}


def _once(model: nn.Module, plan: Plan, inputs: Any, how: str, any_weights: bool) -> dict[str, Any]:
    seam: Any = Timed(model, list(plan.layers)) if how == "dense" else plan.applied(model, any_weights=any_weights)
    before = _reset_peak(model)
    start = time.perf_counter()
    with seam:
        output = run(model, inputs)
    for x in _tensors(output):
        _wait(x)
        break
    seconds = time.perf_counter() - start
    return {
        "output": output,
        "forward": seconds,
        "attention": sum(seam.seconds.values()),
        "shapes": getattr(seam, "shapes", set()),
        "memory": _peak(model, before),
    }


def _summary(
    plan: Plan, rows: list[dict[str, Any]], names: list[str], judge: Judge, shapes: set[tuple[int, ...]]
) -> dict[str, Any]:
    def mean(how: str, key: str) -> float:
        return float(np.mean([row[how][key] for row in rows]))

    def by_group(pick: Callable[[dict[str, Any]], float | None]) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for row, name in zip(rows, names, strict=True):
            value = pick(row)
            if value is not None:
                values.setdefault(name, []).append(value)
        return {name: float(np.mean(x)) for name, x in values.items()}

    attention, forward = ({how: mean(how, key) for how in ("dense", "planned")} for key in ("attention", "forward"))
    harm = by_group(lambda row: row["harm"])
    out: dict[str, Any] = {
        "sequences": len(rows),
        "attention_seconds": attention,
        "attention_speedup": attention["dense"] / attention["planned"] if attention["planned"] else None,
        "forward_seconds": forward,
        "forward_speedup": forward["dense"] / forward["planned"],
        "harm": harm,
        "unit": judge.unit,
    }
    dense = by_group(lambda row: row["loss"])
    if dense:
        out["loss"] = {name: {"dense": dense[name], "planned": dense[name] + harm[name]} for name in dense}
    if isinstance(judge, TokenLoss):
        out["perplexity"] = {name: {how: math.exp(x) for how, x in both.items()} for name, both in out["loss"].items()}
        out["perplexity_ratio"] = math.exp(max(harm.values()))
        scores = {
            "dense": by_group(lambda row: row["dense"].get("score")),
            "planned": by_group(lambda row: row["planned"].get("score")),
        }
        if scores["dense"]:
            out["score"] = {name: {how: scores[how][name] for how in scores} for name in scores["dense"]}
    peaks = {how: max(row[how]["memory"] or 0 for row in rows) for how in ("dense", "planned")}
    out["memory"] = peaks if all(peaks.values()) else None
    predicted = plan.seconds() if shapes == set(plan.shapes.values()) else None
    out["predicted_attention_seconds"] = predicted
    out["predicted_over_measured"] = predicted / attention["planned"] if predicted and attention["planned"] else None
    out["threads"] = torch.get_num_threads()
    out["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return out


# -- memory


def _reset_peak(model: nn.Module) -> int | None:
    """Bytes held now, the peak being counted from here; None where the system does not tell."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(model: nn.Module, before: int | None) -> int | None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    now = _status("VmHWM")
    return None if now is None else max(0, now - before)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(name + ":")), None)
    return None if found is None else 1024 * int(found.split()[1])


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    return [t for value in values for t in _tensors(value)]


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
