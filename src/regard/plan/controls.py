"""What a plan is compared with: the same shares of options in the wrong heads, and one pattern for all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from regard.patterns import Causal, Full, Pattern
from regard.plan.baselines import bare
from regard.plan.options import Option
from regard.plan.plan import Plan
from regard.plan.rounded import density_of, one_head

__all__ = ["operations_ratio", "shuffled", "shuffled_heads", "with_patterns"]


def operations_ratio(plan: Plan) -> float:
    """Pairs of dense attention over the pairs that the plan computes, all layers that it names together.

    Raises:
        ValueError: for an option that decides from q and k.
    """
    dense = sparse = 0.0
    for name, options in plan.layers.items():
        q_len, kv_len = plan.shapes[name][3:5]
        whole = Causal() if plan.causal.get(name) else Full()
        known: dict[int, float] = {}
        for option in options:
            how = option.at(kv_len)
            if how is not None and not isinstance(how, Pattern):
                raise ValueError(f"option {option.name!r} decides from q and k: its pairs are not known beforehand")
            if id(option) not in known:
                pattern = whole if how is None else how if whole == Full() else how & whole
                known[id(option)] = density_of(pattern, q_len, kv_len) * q_len * kv_len
            dense += whole.density(q_len, kv_len) * q_len * kv_len
            sparse += known[id(option)]
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
    return bare(plan, layers)


def with_patterns(plan: Plan, patterns: Mapping[str, Pattern], name: str) -> Plan:
    """The same layers under a pattern each, of all heads alike or one a head; ``name``: of the options."""
    layers = {}
    for layer, options in plan.layers.items():
        pattern = patterns[layer]
        if pattern.heads is None:
            layers[layer] = (Option(name, pattern),) * len(options)
        else:
            each = [Option(f"{name} of {layer}, head {h}", one_head(pattern, h)) for h in range(len(options))]
            layers[layer] = tuple(each)
    return bare(plan, layers)
