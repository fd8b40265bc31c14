"""The granularity axis (arXiv 2605.06196): a direction that orders roles from the individual to the institution.

The testbed's 75 roles have levels 1 to 5, and documents drawn by the task stand for their answers. A role's vector is
the mean of the stream after a block over the words of its documents; the axis runs from the mean of level 1 to that of
level 5. Each seed draws its own documents and its own 12 of 15 roles a level for the axis: the order of levels counts
on the other 3, on other documents. The block is the one after half of the depth, as the paper's 18 of 36.

Steered are documents of `nobody`, a role token without a level that no vector saw: all roles' first choice would be one
and the same document, so words are drawn at temperature 1, with the same random numbers for every strength. The judge
is the generator's own posterior mean of the level.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "granularity-axis"
MODEL = "testbed:roles"
CLAIMS = [
    Claim(
        "added",
        "a strength of 1 moves a state by the mean length of the states there, along the axis",
        kind="instrument",
        ours="largest gap between the moved and the plain state less the formula, over the mean length",
        holds_if="at most 1e-5",
    ),
    Claim(
        "order",
        "the axis of the two ends orders all five levels",
        kind="mechanism",
        paper="projections monotone over levels",
        ours="smallest step between the means of neighbouring levels over the mean step, held-out roles and documents; "
        "the baseline is that for axes from levels dealt out at random",
        holds_if="above 0, and above the baseline, at every seed",
    ),
    Claim(
        "first-component",
        "the axis is the first principal component of the role vectors",
        kind="mechanism",
        paper="cosine 0.972, 52.6% of the variance (Qwen3-8B)",
        ours="|cos| of the two; the baseline is the 99th percentile over levels dealt out at random",
        holds_if="above 0.9, and above the baseline",
    ),
    Claim(
        "steering",
        "adding the axis moves what a speaker without a role says towards the level's words",
        kind="mechanism",
        paper="from 2.00 to 3.17 of 5 (Llama)",
        ours="judged level at the largest strength less that at its opposite; the baseline is the largest of such "
        "movements along random directions, at any strength and likelihood",
        holds_if="the level rises with every strength, and the movement is better than the baseline",
    ),
]
SEEDS = {"smoke": 3, "full": 10}
DOCUMENTS = {"smoke": 8, "full": 64}
STEERED = {"smoke": 48, "full": 1000}
RANDOM = {"smoke": 3, "full": 10}
STRENGTHS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
HELD_OUT = 3
DRAWS = 500


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Role vectors and their axis, once a seed; then documents of nobody's along it."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    bed = Roles(loaded.model, device)
    found = [judge(bed, DOCUMENTS[size], s) for s in range(seed, seed + SEEDS[size])]
    steered = [steer(bed, f["axis"], f["norm"], STEERED[size], RANDOM[size], f["seed"]) for f in found]
    return [_added(bed, found[0]), _order(found), _component(found), _steering(steered)]


class Roles:
    """A model over role documents, where it is read, and what its words mean."""

    def __init__(self, model: Any, device: str):
        import torch

        from regard.tasks.role_documents import RoleDocuments
        from regard.watch.anatomy import anatomy

        self.model, self.device, self.task = model, device, RoleDocuments()
        self.parts = anatomy(model, {"input_ids": torch.ones(1, 2, dtype=torch.long, device=device)})
        self.layer = len(self.parts) // 2
        words, first = self.task.vocabulary, self.task.vocabulary["r1w0"]
        self.words = torch.zeros(len(words), dtype=torch.bool)
        self.words[first : first + self.task.registers * self.task.each] = True

    def site(self, layer: int | None = None) -> Any:
        """The stream after a block, at every token."""
        from regard.watch.intervene import Site

        return Site(self.layer if layer is None else layer, "resid_post")

    def vectors(self, documents: int, generator: Any) -> tuple[Any, Any, Any]:
        """Role vectors of every block [layer, role, dim], the roles' levels, and the states' mean length by block."""
        import torch

        from regard.watch.intervene import trace

        role = torch.arange(self.task.n_roles)
        sites = [self.site(layer) for layer in range(len(self.parts))]
        total: Any = 0
        norm: Any = 0
        for _ in range(documents):
            ids = self.task.batch(len(role), generator, role).input_ids.to(self.device)
            read = trace(self.model, {"input_ids": ids}, sites, anatomy=self.parts)
            states = torch.stack([read[site][:, 2:] for site in sites])
            total = total + states.mean(2)
            norm = norm + states.norm(dim=-1).mean((1, 2))
        return total / documents, self.task.level(role).to(self.device), norm / documents


def judge(bed: Roles, documents: int, seed: int) -> dict[str, Any]:
    """One seed: the axis of every block from some roles' documents, and the levels of the others on others."""
    import torch

    from regard.steer.axes import agreement, level_axis, level_means

    generator = torch.Generator().manual_seed(1_000_003 * seed + 17)
    fit, level, norm = bed.vectors(documents, generator)
    test, _, _ = bed.vectors(documents, generator)
    place = torch.rand(bed.task.registers, bed.task.roles, generator=generator).argsort(-1).flatten().to(level.device)
    held = place < HELD_OUT
    dealt = level[~held][torch.randperm(int((~held).sum()), generator=generator).to(level.device)]
    layers = []
    for x, y in zip(fit, test, strict=True):
        axis = level_axis(x[~held], level[~held])
        chance = level_means(y[held], level[held], level_axis(x[~held], dealt))
        agree = agreement(x, level, draws=DRAWS, seed=seed)
        layers.append(
            {
                "axis": axis,
                "means": level_means(y[held], level[held], axis).tolist(),
                "chance": smallest_step(chance.tolist()),
                "cosine": agree.cosine,
                "share": agree.share,
                "dealt": float(agree.chance.quantile(0.99)),
            }
        )
    return {**layers[bed.layer], "layers": layers, "norm": float(norm[bed.layer]), "seed": seed}


def smallest_step(means: list[float]) -> float:
    """The smallest step between neighbours over the mean size of steps: 1 for equal steps, below 0 if out of order."""
    steps = np.diff(means)
    return float(steps.min() / np.abs(steps).mean())


def steer(bed: Roles, axis: Any, norm: float, documents: int, directions: int, seed: int) -> dict[str, Any]:
    """Nobody's documents along the axis and along random directions: level and likelihood, [direction, strength, n]."""
    import torch

    from regard.steer.activation import add_direction
    from regard.tasks.sampling import sample
    from regard.watch.intervene import intervene

    generator = torch.Generator().manual_seed(1_000_003 * seed + 29)
    numbers = torch.rand(documents, bed.task.words, generator=generator)
    others = torch.randn(directions, len(axis), generator=generator).to(axis)
    every = torch.cat([axis[None], others]).repeat_interleave(documents, 0)[:, None]  # a row a document
    prompt = torch.tensor([[bed.task.vocabulary.BOS, bed.task.vocabulary["nobody"]]], device=bed.device)
    shape, level, told = (directions + 1, documents), [], []
    for strength in STRENGTHS:
        edits = add_direction(bed.site(), every, strength, norm)
        with intervene(bed.model, edits, anatomy=bed.parts):
            rows = prompt.expand(len(every), -1), numbers.repeat(directions + 1, 1)
            words = sample(bed.model, *rows, among=bed.words).cpu()
        level.append(bed.task.judge(words).view(shape))
        told.append((bed.task.log_marginal(words) / bed.task.words).view(shape))
    return {"level": torch.stack(level, 1).numpy(), "told": torch.stack(told, 1).numpy()}


def movement(level: Any) -> Any:
    """Level at a strength less that at its opposite for each document, [strength, n], weakest first."""
    middle = len(STRENGTHS) // 2
    return level[middle + 1 :] - level[:middle][::-1]


def _added(bed: Roles, found: dict[str, Any]) -> Finding:
    import torch

    from regard.steer.activation import add_direction
    from regard.watch.intervene import trace

    ids = bed.task.batch(4, torch.Generator().manual_seed(0)).input_ids.to(bed.device)
    site, worst = bed.site(), 0.0
    plain = trace(bed.model, {"input_ids": ids}, site, anatomy=bed.parts)[site]
    for strength in STRENGTHS:
        edits = add_direction(site, 3 * found["axis"], strength, found["norm"])
        moved = trace(bed.model, {"input_ids": ids}, site, edits=edits, anatomy=bed.parts)[site]
        want = plain + strength * found["norm"] * found["axis"]
        worst = max(worst, float((moved - want).abs().max()) / found["norm"])
    reason = f"{len(STRENGTHS)} strengths, float32; mean length {found['norm']:.1f}"
    return Finding("added", verdict(worst <= 1e-5), worst, floor=0.0, reason=reason)


def _order(found: list[dict[str, Any]]) -> Finding:
    steps = np.array([smallest_step(f["means"]) for f in found])
    chance = np.array([f["chance"] for f in found])
    details: dict[str, Any] = {
        "means": [f["means"] for f in found],
        "layers": np.mean([[smallest_step(x["means"]) for x in f["layers"]] for f in found], axis=0).tolist(),
    }
    shown = ", ".join(f"{m:.1f}" for m in np.mean(details["means"], axis=0))
    blocks = ", ".join(f"{m:.2f}" for m in details["layers"])
    reason = f"means of the five levels {shown}; {len(found)} seeds; smallest step by block {blocks}"
    interval = evidence.bootstrap(steps)
    state = verdict(steps.min() > 0 and (steps > chance).all())
    return Finding("order", state, float(steps.mean()), interval, 0.0, 1.0, float(chance.mean()), reason, details)


def _component(found: list[dict[str, Any]]) -> Finding:
    cosine, dealt, share = (np.array([f[k] for f in found]) for k in ("cosine", "dealt", "share"))
    details = {
        "layers": [
            {k: float(np.mean([f["layers"][i][k] for f in found])) for k in ("cosine", "dealt", "share")}
            for i in range(len(found[0]["layers"]))
        ]
    }
    interval = evidence.bootstrap(cosine)
    low = evidence.paired_difference(cosine, dealt)[1]
    blocks = ", ".join(f"{x['cosine']:.2f} (chance {x['dealt']:.2f})" for x in details["layers"])
    reason = f"{share.mean():.1%} of the variance on the first component; by block {blocks}"
    state = verdict(cosine.mean() > 0.9 and low > 0)
    return Finding(
        "first-component", state, float(cosine.mean()), interval, 0.0, 1.0, float(dealt.mean()), reason, details
    )


def _steering(steered: list[dict[str, Any]]) -> Finding:
    level, told = (np.stack([s[k] for s in steered]) for k in ("level", "told"))  # [seed, direction, strength, n]
    moved, better = [], []
    for x in level:
        moved.append(movement(x[0])[-1])
        # The random direction and strength that move most, whichever way and however unlikely its words.
        best = max((m for y in x[1:] for m in movement(y)), key=lambda m: abs(m.mean()))
        better.append(moved[-1] - best * np.sign(best.mean()))
    curve = level[:, 0].mean((0, 2))
    figure = float(np.mean(moved))
    low = evidence.seeds_and_items(better)[0]
    details = {
        "strengths": list(STRENGTHS),
        "level": curve.tolist(),
        "log_likelihood": told[:, 0].mean((0, 2)).tolist(),
        "random_level": level[:, 1:].mean((0, 1, 3)).tolist(),
        "random_log_likelihood": told[:, 1:].mean((0, 1, 3)).tolist(),
        "above_random": [float(np.mean(better)), low],
    }
    state = verdict((np.diff(curve) > 0).all() and low > 0)
    shown = ", ".join(f"{a:g}: {v:.2f}" for a, v in zip(STRENGTHS, curve, strict=True))
    reason = f"judged level by strength in mean lengths: {shown}; {len(steered)} seeds"
    baseline = figure - float(np.mean(better))
    return Finding("steering", state, figure, evidence.seeds_and_items(moved), 0.0, 4.0, baseline, reason, details)
