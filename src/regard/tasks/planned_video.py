"""Plans of a video model put to the test: videos from the same noise beside dense ones, and what a plan must beat."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.models.dit import VideoDiT, sample
from regard.plan.baselines import bare
from regard.plan.controls import operations_ratio, shuffled, with_patterns
from regard.plan.options import DENSE
from regard.plan.plan import Plan
from regard.plan.shape_plan import ShapeErrors, plan_shapes, planned
from regard.plan.shapes import one_for_all
from regard.tasks.fidelity import psnr
from regard.tasks.video_gates import asked

__all__ = ["Outcome", "calibration", "compare", "different_prompts", "rivals"]

Videos = Float[Tensor, "batch channels frames height width"]


class Outcome(NamedTuple):
    """Videos made under a plan beside the dense ones."""

    psnr: Float[Tensor, "batch"]
    """In dB, of each video."""
    operations: float | None
    """Pairs of dense attention over those of the plan; None: not known beforehand."""
    seconds: float
    """Of the sampling, all of the model included."""
    attention_seconds: float | None
    """Of the attention that the plan answers; None for what is no `Plan`."""


def calibration(
    model: VideoDiT,
    noise: Videos,
    words: Int[Tensor, "batch words"],
    *,
    steps: int = 20,
    guidance: float | int = 2.0,
    shift: float | int = 3.0,
) -> list[tuple[Tensor, ...]]:
    """What the model is given at each step of a dense sampling: ``steps`` inputs ``(x, t, words)``, both branches of
    the guidance in one batch. Take some of them to plan with: several prompts, steps and both branches.
    """
    seen: list[tuple[Tensor, ...]] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(tuple(x.detach().clone() for x in args))

    hook = model.register_forward_pre_hook(keep)
    try:
        sample(model, noise, words, steps=steps, guidance=guidance, shift=shift)
    finally:
        hook.remove()
    return seen


def different_prompts(n: int, seed: int) -> Int[Tensor, "n words"]:
    """n prompts of which no two are alike, of one to three objects in turn."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = []
    while len(drawn) < n:
        words = asked(1, len(drawn) % 3 + 1, generator)[0].tolist()
        if words not in drawn:
            drawn.append(words)
    return torch.tensor(drawn)


def compare(
    model: VideoDiT,
    arms: Mapping[str, Plan | AbstractContextManager[Any]],
    noise: Videos,
    words: Int[Tensor, "batch words"],
    *,
    steps: int = 20,
    guidance: float | int = 2.0,
    shift: float | int = 3.0,
) -> dict[str, Outcome]:
    """Samples the model dense and under each arm, all from the same noise; the dense one comes first, as "dense".

    Args:
        arms: plans, or contexts that change the model while open.
        noise, words, steps, guidance, shift: as in `regard.models.dit.sample`. Prompts and noise that no plan was made
            on, for an honest figure.
    """
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "shift": shift}

    def timed(arm: Plan | AbstractContextManager[Any]) -> tuple[Tensor, float, float | None]:
        context: Any = arm.applied(model) if isinstance(arm, Plan) else arm
        began = time.perf_counter()
        with context:
            videos = sample(model, noise, words, **how)
        seconds = time.perf_counter() - began
        inside = sum(context.seconds.values()) if isinstance(arm, Plan) else None
        return videos, seconds, inside

    first = next((arm for arm in arms.values() if isinstance(arm, Plan)), None)
    whole = None if first is None else _dense(first)
    if whole is None:
        began = time.perf_counter()
        dense = sample(model, noise, words, **how)
        seconds, inside = time.perf_counter() - began, None
    else:
        dense, seconds, inside = timed(whole)
    found = {"dense": Outcome(psnr(dense, dense), 1.0, seconds, inside)}
    for name, arm in arms.items():
        videos, seconds, inside = timed(arm)
        found[name] = Outcome(psnr(videos, dense), _operations(arm), seconds, inside)
    return found


def rivals(
    model: VideoDiT,
    found: ShapeErrors,
    budget: float | int,
    shape: Sequence[int],
    *,
    seed: int = 0,
    eps: float | int = 0.1,
    shuffles: int = 1,
) -> dict[str, Plan]:
    """The plan of shapes at ``budget`` of the dense operations, "plan", and what it is compared with at no lower cost:
    "shuffled", "shuffled 2", ... (its heads shuffled inside each layer) and one shape for all heads, "all diagonal",
    "all multi-diagonal", "all stripe". Where the options were timed, "plan by seconds" besides, at ``budget`` of
    the dense seconds instead.

    Raises:
        ValueError: for a budget that no choice meets.
    """
    mine = planned(model, found, plan_shapes(found, budget, eps=eps))
    arms = {"plan": mine}
    if found.seconds is not None:
        arms["plan by seconds"] = planned(model, found, plan_shapes(found, budget, eps=eps, by="seconds"))
    generator = torch.Generator().manual_seed(seed)
    for n in range(shuffles):
        arms[f"shuffled {n + 1}" if n else "shuffled"] = shuffled(mine, generator)
    least = 1 / operations_ratio(mine)
    singles = {name: one_for_all(shape, least, found.received[name], block=found.block) for name in found.layers}
    for kind in next(iter(singles.values())):
        arms[f"all {kind}"] = with_patterns(mine, {name: of[kind] for name, of in singles.items()}, kind)
    return arms


def _dense(plan: Plan) -> Plan:
    return bare(plan, {name: (DENSE,) * len(given) for name, given in plan.layers.items()})


def _operations(arm: Any) -> float | None:
    if not isinstance(arm, Plan):
        return None
    try:
        return operations_ratio(arm)
    except ValueError:  # a route decides
        return None
