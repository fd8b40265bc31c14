"""What an option costs on this machine, in seconds: each one timed as it will run, on tensors of the model's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from regard.plan.groups import Group, Inputs, run_groups, run_into
from regard.plan.options import Option

__all__ = ["CostModel", "Shape"]

REPEATS = 3
LONG = 0.02
"""Seconds of a call of which one run after the first does."""

Shape = tuple[int, int, int, int, int, int, int]
"""(batch, heads, kv_heads, q_len, kv_len, head_dim, v_dim) of a call."""


def shape_of(call: Inputs) -> Shape:
    """The shape of a call."""
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, v_dim) = call.q.shape, call.v.shape
    return batch, heads, kv_heads, q_len, kv_len, head_dim, v_dim


@dataclass(eq=False)
class CostModel:
    """Seconds of one kernel call by shape, option and number of heads; between the numbers timed, straight lines, and
    beyond them the last one goes on.

    As ``call + n * head`` for the search: the line through the fewest and the most heads timed.
    """

    times: dict[tuple[Shape, str], dict[int, float]] = field(default_factory=dict)
    threads: int = field(default_factory=torch.get_num_threads)
    spent: float = 0.0
    """Seconds that timing took."""
    _taken: dict[tuple[Shape, str, int], list[float]] = field(default_factory=dict, repr=False)

    def note(self, shape: Shape, option: Option, n: int, seconds: float) -> None:
        """A call that took so long; the median of all is kept: what runs beside it will run beside a plan too."""
        taken = self._taken.setdefault((shape, option.name, n), [])
        taken.append(seconds)
        self.times.setdefault((shape, option.name), {})[n] = statistics.median(taken)

    def time(self, call: Inputs, options: Sequence[Option]) -> None:
        """Time what is not known yet of these options on this call: as a group of one head, and as two if dense.

        Threads share few heads badly, dense ones most; what all heads take is noted where they are tried.
        """
        began, shape, heads = time.perf_counter(), shape_of(call), call.q.shape[1]
        for option in options:
            for n in (1, 2) if option.kind == "dense" else (1,):
                if n <= heads and n not in self.times.get((shape, option.name), {}):
                    # heads from the end: no view of the model's tensors will do, as in most groups
                    self.note(shape, option, n, _best(call, Group(option, tuple(range(heads - n, heads)), n == heads)))
        self.spent += time.perf_counter() - began

    def seconds(self, shape: Shape, option: Option, n: int) -> float:
        """Of one call for n heads; 0 for none.

        Raises:
            KeyError: for an option that was not timed at this shape.
        """
        if n == 0:
            return 0.0
        known = self.times.get((shape, option.name))
        if known is None:
            raise KeyError(f"option {option.name!r} was not timed at {shape}")
        counts = sorted(known)
        if n > counts[-1]:
            call, head = self.line(shape, option)
            return call + n * head
        return float(np.interp(n, counts, [known[m] for m in counts]))

    def line(self, shape: Shape, option: Option) -> tuple[float, float]:
        """``(call, head)`` with ``seconds ~ call + n * head``, both >= 0."""
        known = self.times[shape, option.name]
        least, most = min(known), max(known)
        head = max(0.0, (known[most] - known[least]) / (most - least)) if most > least else known[most] / most
        return max(0.0, known[most] - most * head), head

    def layer(self, shape: Shape, groups: Sequence[Group]) -> float:
        """Seconds of a layer's attention: the sum over its groups."""
        return sum(self.seconds(shape, group.option, len(group.heads)) for group in groups)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"shape": list(shape), "option": name, "seconds": {str(n): t for n, t in found.items()}}
            for (shape, name), found in self.times.items()
        ]
        return {"threads": self.threads, "times": rows}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> CostModel:
        """What `to_plain` gave."""
        made = cls(threads=plain["threads"])
        for row in plain["times"]:
            shape: Any = tuple(row["shape"])
            made.times[shape, row["option"]] = {int(n): float(t) for n, t in row["seconds"].items()}
        return made


def _best(call: Inputs, group: Group) -> float:
    taken: list[float] = []
    while len(taken) <= (1 if taken and taken[0] > LONG else REPEATS):
        if call.q.device.type == "cuda":
            torch.cuda.synchronize(call.q.device)
        start = time.perf_counter()
        _one(call, group)
        if call.q.device.type == "cuda":
            torch.cuda.synchronize(call.q.device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one lays out blocks


def _one(call: Inputs, group: Group) -> None:
    if group.everyone:
        run_groups(call, (group,))
        return
    out = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    run_into(out, call, group)
