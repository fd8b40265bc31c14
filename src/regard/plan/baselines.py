"""What a searched plan must beat: one pattern for all heads, and random blocks at its density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from regard.kernels.recall import random_blocks
from regard.patterns import Causal, Full, Pattern
from regard.patterns.decided import Routed
from regard.patterns.routed import Route
from regard.plan.options import Option
from regard.plan.plan import Plan

__all__ = ["random_plan", "single"]

BLOCK = 64


def single(like: Plan, pattern: Pattern | Route) -> Plan:
    """The same layers with one pattern (or route) for every head."""
    option = Option(f"all heads: {pattern}", pattern)
    return bare(like, {name: (option,) * len(options) for name, options in like.layers.items()})


def random_plan(like: Plan, generator: torch.Generator) -> Plan:
    """Heads shuffled inside each layer, and in place of each pattern as many blocks of 64 keys, drawn at random.

    Rows of 64 queries have as many blocks as the pattern has there, their own always among them; a route's rows have as
    many as it takes of random queries and keys, beside what it always keeps. Dense heads and those given nothing stay
    what they are. It holds for the plan's own length, and costs what the plan costs.

    Raises:
        ValueError: for routes that decide on spans or groups.
    """
    layers = {}
    for name, options in like.layers.items():
        order = torch.randperm(len(options), generator=generator).tolist()
        drawn: dict[int, Option] = {}
        for option in options:
            if id(option) not in drawn:
                n = sum(o is option for o in options)
                drawn[id(option)] = _drawn(like, name, option, n, generator)
        layers[name] = tuple(drawn[id(options[head])] for head in order)
    return bare(like, layers)


def _drawn(like: Plan, name: str, option: Option, heads: int, generator: torch.Generator) -> Option:
    """Random blocks for so many heads, as one pattern."""
    if option.kind in ("dense", "nothing"):
        return option
    q_len, kv_len = like.shapes[name][3:5]
    how: Any = option.at(kv_len)
    within = Causal() if like.causal.get(name) else Full()
    if isinstance(how, Route):
        q, k = (torch.randn(1, heads, n, 4, generator=generator) for n in (q_len, kv_len))
        made = how(q, k, within=within)
        if made.index is None:
            raise ValueError(
                f"option {option.name!r} of {name} decides on spans or groups, which no random blocks match"
            )
        return Option(f"random blocks, as many as {option.name} takes, in {name}", random_blocks(made, generator))
    layout = (how & within).layout(q_len, kv_len, BLOCK)
    some, _ = layout.dense()
    count = some[0, 0].sum(-1, dtype=torch.int32)
    index = torch.full((len(count), int(count.max()) if len(count) else 0), -1, dtype=torch.int32)
    for row, n in enumerate(count.tolist()):
        index[row, :n] = some[0, 0, row].nonzero()[:, 0]
    model = Routed.blocks(
        index.expand(1, heads, -1, -1).contiguous(),
        count.expand(1, heads, -1).contiguous(),
        block=BLOCK,
        q_len=q_len,
        kv_len=kv_len,
        within=within,
    )
    chosen = random_blocks(model, generator)
    own = torch.arange(len(count), dtype=torch.int32)[:, None].expand(1, heads, -1, 1)
    if q_len == kv_len:  # a row that was not given its own block has it in place of the first drawn
        assert chosen.index is not None
        assert chosen.count is not None
        lacks = ~(chosen.index == own).any(-1, keepdim=True) & (chosen.count[..., None] > 0)
        first = torch.where(lacks, own, chosen.index[..., :1])
        index = torch.cat([first, chosen.index[..., 1:]], -1)
        last = torch.iinfo(torch.int32).max
        index = torch.where(index < 0, last, index).sort(-1).values
        chosen = replace(chosen, index=torch.where(index == last, -1, index))
    return Option(f"random blocks at the density of {option.name}, in {name}", chosen)


def bare(like: Plan, layers: Mapping[str, Sequence[Option]]) -> Plan:
    """The same plan with other options; what was found of it is left out."""
    given = {name: tuple(options) for name, options in layers.items()}
    return replace(like, layers=given, heads=[], predicted={}, calibration={}, measured=None)
