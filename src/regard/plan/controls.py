"""What a plan is compared with: the same shares of options in the wrong heads, and one pattern for all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from regard.patterns import Pattern
from regard.plan.options import Option
from regard.plan.plan import Plan

__all__ = ["operations_ratio", "shuffled", "shuffled_heads", "with_options", "with_patterns"]


def operations_ratio(plan: Plan) -> float:
    """Pairs of dense attention over the pairs that the plan computes, all layers that it names together."""
    dense = sparse = 0
    for name, options in plan.layers.items():
        _, _, _, q_len, kv_len, _, _ = plan.shapes[name]
        for option in options:
            how = option.at(kv_len)
            if how is not None and not isinstance(how, Pattern):
                raise ValueError(f"option {option.name!r} decides from q and k: its pairs are not known beforehand")
            pairs = q_len * kv_len
            dense += pairs
            sparse += pairs if how is None else round(how.density(q_len, kv_len, 0) * pairs)
    return dense / sparse if sparse else float("inf")


def shuffled_heads(which: Any, generator: torch.Generator) -> np.ndarray:
    """A choice ``[layers, heads]`` whose heads are shuffled inside each layer: the same cost, the wrong heads.

    A layer whose heads are not all alike comes out different from what it was.
    """
    found = np.array(which)
    for layer, row in enumerate(found):
        while len(set(row.tolist())) > 1 and np.array_equal(found[layer], which[layer]):
            found[layer] = row[torch.randperm(len(row), generator=generator).numpy()]
    return found


def shuffled(plan: Plan, generator: torch.Generator) -> Plan:
    """The same plan with heads shuffled inside each layer (see `shuffled_heads`): equal operations, the wrong heads.

    The records of heads are left out: they are of what the heads were given before.
    """
    layers = {}
    for name, options in plan.layers.items():
        (order,) = shuffled_heads(np.array([[id(o) for o in options]]), generator)
        by = {id(o): o for o in options}
        layers[name] = tuple(by[i] for i in order.tolist())
    return with_options(plan, layers)


def with_patterns(plan: Plan, patterns: Mapping[str, Pattern], name: str) -> Plan:
    """The same layers under a pattern each, of all heads alike or one a head; ``name``: of the options."""
    layers = {}
    for layer, options in plan.layers.items():
        known: dict[Pattern, Option] = {}
        given = []
        for head in range(len(options)):
            pattern = patterns[layer].of(head)
            if pattern not in known:
                own = f" of {layer}, head {head}" if patterns[layer].heads else ""
                known[pattern] = Option(f"{name}{own}", pattern)
            given.append(known[pattern])
        layers[layer] = tuple(given)
    return with_options(plan, layers)


def with_options(plan: Plan, layers: Mapping[str, Sequence[Option]]) -> Plan:
    """The same plan with other options; what was recorded of it is left out."""
    given = {name: tuple(options) for name, options in layers.items()}
    return replace(plan, layers=given, heads=[], predicted={}, calibration={}, measured=None)
