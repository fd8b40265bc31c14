"""Sparse-vDiT (arXiv 2506.03065): heads of a video transformer keep one of a few shapes, chosen once, offline.

Tokens are in the order (frame, row, column), L of them and n a frame. A head is full, a diagonal ``|i - j| <= w``, a
multi-diagonal ``|i - j - m n| <= w``, vertical stripes, or skipped (its output 0). The error of a shape is
``mean |W_o (O_full - O)|^2 / mean |W_o O_full|^2``; the plan has the least error that a budget allows, and a head stays
full where no other shape comes below an error of EPS. The authors have not released their code; widths, stripes and EPS
are our reading. Planted heads have scores of a known shape plus noise of standard deviation 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "sparse-vdit"
MODEL = "testbed:video"
FULL_ONLY = "only the full size runs the video transformer"
CLAIMS = [
    Claim(
        "shapes",
        "a multi-diagonal is min(r, n - r) <= w with r = (i - j) mod n, and a skipped head meets no key",
        kind="instrument",
        ours="pairs that differ from the formula, over 200 drawn periods and widths",
        holds_if="none",
    ),
    Claim(
        "named",
        "the search finds the shape of each head",
        kind="mechanism",
        ours="heads of 12 whose chosen option is of the planted shape, at a budget of a quarter of full attention",
        holds_if="at least 11 in every draw",
    ),
    Claim(
        "error",
        "a shape for each head loses less than any one shape for all heads",
        kind="mechanism",
        ours="summed error of the plan over that of the best single shape of no lower cost",
        holds_if="at most 0.5",
    ),
    Claim(
        "agree",
        "the shape depends on layer and head, little on content",
        kind="mechanism",
        paper="patterns correlate with depth and head position, with limited dependence on content",
        ours="share of heads with the same shape in plans from two sets of prompts that share none",
        holds_if="at least 0.9",
    ),
    Claim(
        "shuffled",
        "it matters which head has which shape",
        kind="mechanism",
        ours="PSNR to the dense video of the plan less that of the same plan with heads shuffled inside each layer, "
        "dB, at operations / 1.6",
        holds_if="at least 2",
    ),
    Claim(
        "skipped",
        "a few heads can be left out altogether",
        kind="mechanism",
        paper="3-6 % of heads",
        ours="share of heads that the plan skips",
        holds_if="at least 0.03",
    ),
    Claim(
        "models",
        "CogVideoX1.5, HunyuanVideo and Wan 2.1 take 2.09, 2.38 and 1.67 times fewer operations at PSNR 24.13, 27.09 "
        "and 22.59, and 1.76, 1.85 and 1.58 times less time",
        kind="replication",
        paper="operations / 2.38 at PSNR 27.09 (HunyuanVideo)",
        ours="PSNR at the paper's ratio of operations, dB",
        holds_if="at least the paper's",
        waits="needs one of these models and a GPU that holds it; regard plan has the search",
    ),
]
EPS = 0.1
BUDGET = 0.25
SHAPE, HEADS, HEAD_DIM = (8, 8, 8), 12, 48
SPATIAL, TEMPORAL, AMP, NOISE = (4, 0.05, 0.05), (0.01, 4, 4), 3, 0.3
SPREAD, STRIPES, RAISED = 2.0, 32, 6.0
PLANTED = ["diagonal"] * 3 + ["multi-diagonal"] * 3 + ["stripe"] * 3 + ["full"] * 2 + ["skip"]
DRAWS = {"smoke": 3, "full": 10}
# The video transformer: prompts of each of the two sets, videos judged, steps of a sampling, each how-many-th of them
# planned on, dense operations over those of the plan, and the blocks to which shapes are rounded up, as kernels want.
PROMPTS, VIDEOS, STEPS, EVERY, RATIO, BLOCK = 2, 2, 8, 3, 1.6, 64


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Plant heads and find their shapes; at full size, plan the video transformer."""
    draws = [planted(seed + n, device) for n in range(DRAWS[size])]
    findings = [_shapes(seed), *_planted(draws)]
    if size == "full":
        return [*findings, *_video(model or MODEL, device, seed)]
    return [*findings, *(Finding(c, "not measured", reason=FULL_ONLY) for c in ("agree", "shuffled", "skipped"))]


def planted(seed: int, device: str) -> dict[str, Any]:
    """q, k, v and bias of 12 heads of the shapes `PLANTED`, and the output weights ``[heads, head_dim, dim]``."""
    import torch

    from regard.tasks.qk import grid_qk

    generator, n = torch.Generator().manual_seed(seed), int(np.prod(SHAPE))
    pairs = [grid_qk(SHAPE, w, AMP, NOISE, generator, dim=HEAD_DIM, heads=3) for w in (SPATIAL, TEMPORAL)]
    none = torch.zeros(1, HEADS - 6, n, HEAD_DIM)
    q, k = (torch.cat([pairs[0][i], pairs[1][i], none], 1) for i in (0, 1))
    bias = SPREAD * torch.randn(1, HEADS, n, n, generator=generator)
    for head in (h for h, shape in enumerate(PLANTED) if shape == "stripe"):
        bias[0, head, :, torch.randperm(n, generator=generator)[:STRIPES]] += RAISED
    v = torch.randn(1, HEADS, n, HEAD_DIM, generator=generator)
    v[:, PLANTED.index("skip")] = 0
    out = torch.randn(HEADS, HEAD_DIM, 2 * HEAD_DIM, generator=generator)
    return {name: x.to(device) for name, x in (("q", q), ("k", k), ("v", v), ("bias", bias), ("out", out))}


def _errors(heads: dict[str, Any], patterns: dict[str, Any]) -> np.ndarray:
    """Error of each pattern and head after the output weights, float64 [heads, patterns]."""
    import torch

    from regard.kernels.attend import attend

    def through(pattern: Any) -> Any:
        q, k, v = heads["q"], heads["k"], heads["v"]
        return torch.einsum("bhld,hde->bhle", attend(q, k, v, pattern, q_start=0, bias=heads["bias"]), heads["out"])

    dense = through(None)
    size = dense.double().square().mean((0, 2, 3))
    lost = torch.stack([(through(p) - dense).double().square().mean((0, 2, 3)) for p in patterns.values()], 1)
    # a head that says nothing loses nothing
    return torch.where(size[:, None] > 0, lost / torch.where(size > 0, size, 1)[:, None], 0).cpu().numpy()


def _received(heads: dict[str, Any]) -> Any:
    import torch

    from regard.kernels.fused import column_mass

    ones = torch.ones(1, heads["q"].shape[2], 1, device=heads["q"].device)
    return column_mass(heads["q"], heads["k"], ones, mask=heads["bias"])[0, :, 0]


def _shapes(seed: int) -> Finding:
    import torch

    from regard.patterns import Diagonals, Full

    generator = np.random.default_rng(seed)
    i, j = torch.arange(96)[:, None], torch.arange(96)[None]
    wrong = 0
    for _ in range(200):
        n = int(generator.integers(1, 40))
        w = int(generator.integers(0, n))
        r = torch.remainder(i - j, n)
        wrong += int((Diagonals(n, w, causal=False).allows(i, j) != (torch.minimum(r, n - r) <= w)).sum())
    wrong += int((~Full()).allows(i, j).sum())
    return Finding("shapes", verdict(wrong == 0), float(wrong), ceiling=0.0, reason="96 x 96 pairs each")


def _planted(draws: list[dict[str, Any]]) -> list[Finding]:
    from regard.plan.shapes import kind_of_shape, one_for_all, search_shapes, video_options

    n = int(np.prod(SHAPE))
    right, ratios, costs, best, limits = [], [], [], [], []
    for heads in draws:
        received = _received(heads)
        options = video_options(SHAPE, received)
        errors, cost = _errors(heads, options), np.array([p.density(n, n, 0) for p in options.values()])
        found, eps = search_shapes(errors[None], list(options), cost, BUDGET * HEADS, EPS)
        limits.append(eps)
        names = [kind_of_shape(list(options)[m]) for m in found.which[0]]
        right.append(sum(a == b for a, b in zip(names, PLANTED, strict=True)))
        singles = one_for_all(SHAPE, found.cost / HEADS, received)
        alone = dict(zip(singles, _errors(heads, singles).sum(0), strict=True))
        best.append(min(alone, key=lambda name: alone[name]))
        ratios.append(float(found.error / alone[best[-1]]))
        costs.append(found.cost / HEADS)
    told = f"{len(draws)} draws; cost {np.mean(costs):.3f} of full attention"
    named = Finding(
        "named",
        verdict(min(right) >= 11),
        float(min(right)),
        floor=HEADS / 5,
        ceiling=float(HEADS),
        reason=f"{told}; right heads of each draw: {', '.join(map(str, right))}",
        details={"right": right, "cost": costs, "planted": PLANTED, "eps": limits},
    )
    error = Finding(
        "error",
        verdict(max(ratios) <= 0.5),
        float(max(ratios)),
        ceiling=0.0,
        baseline=1.0,
        reason=f"{told}; largest of the draws; the best single shape was {', '.join(sorted(set(best)))}",
        details={"ratios": ratios, "best": best},
    )
    return [named, error]


def _video(model: str, device: str, seed: int) -> list[Finding]:
    """Plans of the video transformer from two sets of prompts, and what the first makes of other prompts' videos."""
    from regard.models.dit import VideoDiT
    from regard.plan.shape_plan import plan_shapes, record_shapes
    from regard.plan.shapes import kind_of_shape
    from regard.studies.testbed import below_gate
    from regard.tasks.fidelity import noise_for
    from regard.tasks.planned_video import calibration, compare, different_prompts, rivals
    from regard.tasks.testbeds import load
    from regard.tasks.video import SHAPE as PIXELS

    claims = ("agree", "shuffled", "skipped")
    loaded = load(model, device=device)
    if not isinstance(loaded.model, VideoDiT):
        raise ValueError(
            f"model must be a VideoDiT, whose sampling this study knows, got {type(loaded.model).__name__}"
        )
    missed = below_gate(loaded)
    if missed:
        return [Finding(claim, "not measured", reason=missed) for claim in claims]
    grid = loaded.model.config.grid(PIXELS)
    words = different_prompts(2 * PROMPTS + VIDEOS, seed)
    noises = noise_for(2 * PROMPTS + VIDEOS, PIXELS, seed).to(device)
    sets = [slice(n * PROMPTS, (n + 1) * PROMPTS) for n in (0, 1)]
    judged = slice(2 * PROMPTS, 2 * PROMPTS + VIDEOS)
    found, choices = [], []
    for part in sets:
        inputs = calibration(loaded.model, noises[part], words[part].to(device), steps=STEPS)
        found.append(record_shapes(loaded.model, inputs[1::EVERY], grid, block=BLOCK))
        choices.append(plan_shapes(found[-1], 1 / RATIO, eps=EPS))
    arms = rivals(loaded.model, found[0], 1 / RATIO, grid, seed=seed, eps=EPS)
    arms = {name: arms[name] for name in ("plan", "shuffled")}
    outcomes = compare(loaded.model, arms, noises[judged], words[judged].to(device), steps=STEPS)
    kinds = [[[kind_of_shape(f.options[m]) for m in row] for row in w] for f, w in zip(found, choices, strict=True)]
    return [_agree(kinds, choices), _shuffled(outcomes, found[0].projected, seed), _skipped(kinds[0])]


def _agree(kinds: list[list[list[str]]], choices: list[Any]) -> Finding:
    same = np.array(kinds[0]) == np.array(kinds[1])
    exact = float((choices[0] == choices[1]).mean())
    chance = sum(float((np.array(kinds[0]) == k).mean() * (np.array(kinds[1]) == k).mean()) for k in set(_flat(kinds)))
    reason = f"{same.size} heads, {PROMPTS} prompts a set; the very same width in {exact:.2f}"
    interval = evidence.bootstrap(same.ravel())
    details = {"shapes": kinds, "exact": exact}
    figure = float(same.mean())
    return Finding("agree", verdict(figure >= 0.9), figure, interval, chance, 1.0, None, reason, details)


def _flat(kinds: Any) -> list[str]:
    return [kind for plan in kinds for layer in plan for kind in layer]


def _shuffled(outcomes: Any, projected: bool, seed: int) -> Finding:
    mine, other = outcomes["plan"], outcomes["shuffled"]
    gain = (mine.psnr - other.psnr).double().numpy()
    figure = float(gain.mean())
    reason = (
        f"{len(gain)} videos of {STEPS} steps: {float(mine.psnr.mean()):.2f} dB against {float(other.psnr.mean()):.2f} "
        f"at operations / {mine.operations:.2f}" + ("" if projected else "; errors before the output projection")
    )
    details = {
        name: {"psnr": o.psnr.tolist(), "operations": o.operations, "seconds": o.seconds}
        for name, o in outcomes.items()
        if name != "dense"
    }
    interval = evidence.bootstrap(gain, seed=seed) if len(gain) > 1 else None
    return Finding("shuffled", verdict(figure >= 2), figure, interval, 0.0, None, 0.0, reason, details)


def _skipped(kinds: list[list[str]]) -> Finding:
    heads = [kind for layer in kinds for kind in layer]
    share = heads.count("skip") / len(heads)
    told = ", ".join(f"{heads.count(kind)} {kind}" for kind in dict.fromkeys(heads))
    return Finding("skipped", verdict(share >= 0.03), share, floor=0.0, reason=f"of {len(heads)} heads: {told}")
