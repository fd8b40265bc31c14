"""What studies run on: whether a testbed is good enough, and the dense weights to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.gates import dense
from regard.tasks.testbeds import PREFIX, TESTBEDS, Loaded


def below_gate(loaded: Loaded, *gates: str) -> str:
    """Which of the gates a testbed misses, as a reason not to measure; empty for none and for models without gates.

    No gate named: all that it was trained with, those that must be reached and those that must not be exceeded.
    """
    testbed = loaded.name.startswith(PREFIX)
    folder = TESTBEDS[loaded.name.removeprefix(PREFIX)] if testbed else Path(loaded.name)
    record = folder / "training.json"
    if not record.is_file():
        return ""
    measured = json.loads(record.read_text())["gates"]
    values, least, most = measured["values"], measured["thresholds"], measured.get("ceilings", {})
    missed = []
    for gate in gates or (*least, *most):
        if gate not in least and gate not in most:
            raise KeyError(f"{loaded.name} has no gate {gate!r}; it has {', '.join((*least, *most))}")
        if gate in least and values[gate] < least[gate]:
            missed.append(f"{gate} {values[gate]:.3g} < {least[gate]:g}")
        if gate in most and values[gate] > most[gate]:
            missed.append(f"{gate} {values[gate]:.3g} > {most[gate]:g}")
    return f"testbed below its gate: {', '.join(missed)}" if missed else ""


@torch.no_grad()
def dense_weights(model: Any, ids: Int[Tensor, "1 length"]) -> Tensor:
    """The weights of every layer of one sample as the model's eager attention gives them, [layer, head, row, key]."""
    with dense(model):
        return torch.stack([a[0].double() for a in model(input_ids=ids, output_attentions=True).attentions]).cpu()
