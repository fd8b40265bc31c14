"""The gates of the video testbed: does it show what the prompt asks for, and which heads does it hold."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.measures.roles import RoleTable, roles
from regard.models.dit import VideoDiT, sample
from regard.tasks.fidelity import noise_for
from regard.tasks.moving_digits import NULL
from regard.tasks.video import SHAPE, SIZES
from regard.tasks.video_inputs import TIMES, watch_video
from regard.tasks.video_reading import counts, kinds, steadiness

__all__ = ["GATES", "gates", "head_roles"]

#: What must be reached for the testbed to count as ready; chance is 1/3, 1/14 and the roles' own.
GATES = {"count": 0.6, "kind": 0.6, "steady": 0.8, "temporal_heads": 1, "spatial_heads": 1}

SEED = 20_000_003


def asked(n: int, objects: int, generator: torch.Generator) -> Int[Tensor, "n words"]:
    """n prompts of so many different objects."""
    drawn = torch.rand(n, NULL - 1, generator=generator).argsort(1)[:, :objects] + 1
    words = torch.zeros(n, 3, dtype=torch.long)
    words[:, :objects] = drawn.sort(1, descending=True).values
    return words


def head_roles(
    model: VideoDiT,
    x: Float[Tensor, "batch 1 frames height width"],
    words: Int[Tensor, "batch words"],
    *,
    times: tuple[float, ...] = TIMES,
    seed: int = SEED,
) -> RoleTable:
    """The role of every self-attention head on noised videos, over several times of the flow (see `watch_video`)."""
    statistics = ("entropy", "distance", "group", "stripe", "template", "top1")
    return roles(watch_video(model, x, words, statistics, times=times, seed=seed))


@torch.no_grad()
def gates(model: VideoDiT, *, quick: bool = False, seed: int = SEED) -> dict[str, Any]:
    """Measures every gate on samples of held-out noise, at the grid of training.

    ``count``: share of samples, prompts of one to three objects in turn, whose number of components is the asked one in
    most frames. ``kind``: share of one-object samples read as the asked digit or shape. ``steady``: `steadiness` of
    the latter. ``temporal_heads``, ``spatial_heads``: heads whose role is "multi-diagonal", and "diagonal" or "block".

    Returns:
        ``values``, ``thresholds``, ``roles`` (how many heads of each, and each head's by layer), ``ready``; and
        ``true``: the same readings on the task's own videos, which no model can be asked to exceed.
    """
    generator = torch.Generator().manual_seed(seed)
    n, steps = (2, 2) if quick else (24, 20)
    words = torch.cat([asked(n, objects, generator) for objects in (1, 2, 3)])
    parts = zip(noise_for(3 * n, SHAPE, seed).split(8), words.split(8), strict=True)
    made = torch.cat([sample(model, z, w, steps=steps) for z, w in parts])
    task = SIZES["long"].task(SHAPE, 3, "test")
    held_out = task.batch(len(words), generator, words)
    few = task.batch(2, generator)
    table = head_roles(model, few.x, few.words)
    found = table.counts()
    values = _read(made, words, n) | {
        "temporal_heads": found.get("multi-diagonal", 0),
        "spatial_heads": found.get("diagonal", 0) + found.get("block", 0),
    }
    return {
        "values": values,
        "thresholds": GATES,
        "true": _read(held_out.x, words, n),
        "roles": {"counts": found, "heads": [[str(r) for r in row] for row in table.names.values]},
        "ready": all(values[name] >= least for name, least in GATES.items()),
    }


def _read(x: Tensor, words: Tensor, alone: int) -> dict[str, float]:
    told = (words > 0).sum(1)
    found = {
        "count": (counts(x).mode(1).values == told).double().mean(),
        "kind": (kinds(x[:alone]) == words[:alone, 0]).double().mean(),
        "steady": steadiness(x[:alone], SIZES["full"].step).double().mean(),
    }
    return {name: round(float(value), 4) for name, value in found.items()}
