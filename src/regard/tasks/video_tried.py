"""Patterns tried on a video model: what each head keeps and loses under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.kernels.attend import attend
from regard.models.dit import VideoDiT
from regard.patterns import Pattern
from regard.tasks.video_inputs import TIMES, run_noised
from regard.watch.call import Call
from regard.watch.seam import Seam

__all__ = ["Tried", "tried"]


class Tried(NamedTuple):
    """Means over samples, times and queries, float64 ``[layers, heads]``."""

    mass: Float[Tensor, "layers heads"]
    """Of dense attention that the pattern keeps: ``exp(lse_pattern - lse)``."""
    error: Float[Tensor, "layers heads"]
    """``sum |O - O_pattern|^2 / sum |O|^2`` of the heads' own outputs."""


@torch.no_grad()
def tried(
    model: VideoDiT,
    x: Float[Tensor, "batch 1 frames height width"],
    words: Int[Tensor, "batch words"],
    patterns: Mapping[str, Pattern],
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
) -> dict[str, Tried]:
    """Every self-attention head under each pattern beside dense, on videos noised to each of the times.

    Layers see what dense layers before them give. Patterns are over the grid's tokens, alike for all heads or one each.
    """
    sums: dict[str, dict[str, list[Tensor]]] = {}  # by pattern and layer: mass, lost, size

    def look(call: Call) -> None:
        if call.kind != "self":
            return
        inputs = (call.q, call.k, call.v)
        full, lse = attend(*inputs, q_start=0, scale=call.scale, return_lse=True)
        size = full.double().square().sum((0, 2, 3))
        for name, pattern in patterns.items():
            out, kept = attend(*inputs, pattern, q_start=0, scale=call.scale, return_lse=True)
            new = [
                (kept - lse).exp().double().mean((0, 2)),
                (full - out).double().square().sum((0, 2, 3)),
                size,
            ]
            layers = sums.setdefault(name, {})
            layers[call.layer] = (
                [a + b for a, b in zip(layers[call.layer], new, strict=True)] if call.layer in layers else new
            )

    with Seam(model, look):
        run_noised(model, x, words, times, seed)
    found = {}
    for name, layers in sums.items():
        mass, lost, size = (torch.stack(parts).cpu() for parts in zip(*layers.values(), strict=True))
        found[name] = Tried(mass / len(times), lost / size.clamp(min=1e-300))
    return found
