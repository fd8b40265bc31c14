"""PAROAttention (arXiv 2506.16054): one order of the axes for each head turns scattered patterns into dense blocks.

The map of a head is S, the mean weight between blocks of queries and of keys in an order of the grid's axes; the order
is chosen by the share of blocks below eps (many are wanted) and the mean over blocks of the largest weight over the
mean (small is wanted). The mask keeps the heaviest blocks of the map. Leaving blocks out in the kernel leaves the other
weights larger than they were; weights dropped after the softmax stay as they are. The two differ by the factor
``exp(lse_pattern - lse_full)`` a query; where nothing else is said blocks are left out in the kernel. The authors'
calibration is not released; eps and the weighting of the two figures are our reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "paro"
MODEL = "testbed:video"
FULL_ONLY = "only the full size runs the video transformer"
CLAIMS = [
    Claim(
        "map",
        "the map of block masses is one attention call whose values are the blocks' indicator columns",
        kind="instrument",
        ours="largest difference to the means of explicit weights, all six orders, four kinds of heads",
        holds_if="at most 1e-5",
    ),
    Claim(
        "dropped",
        "weights dropped after the softmax and blocks skipped in the kernel differ by exp(lse_pattern - lse_full)",
        kind="instrument",
        ours="largest difference between the skipped output times that factor and explicit dropping",
        holds_if="at most 1e-5",
    ),
    Claim(
        "dense blocks",
        "in its best order a head needs few blocks",
        kind="mechanism",
        ours="blocks that hold 0.9 of the mass in the best order over those in memory order; the worst of temporal, "
        "row and column heads, mean of draws",
        holds_if="at most 0.5",
    ),
    Claim(
        "random order",
        "not any order does it",
        kind="mechanism",
        ours="blocks that hold 0.9 of the mass in a random order over those in memory order; the least of all heads, "
        "mean of draws",
        holds_if="more than 1",
    ),
    Claim(
        "chosen",
        "the rule finds the order that needs the fewest blocks",
        kind="mechanism",
        ours="blocks needed in the order that the rule chose over the fewest of any of the six; the worst head, mean "
        "of draws",
        holds_if="at most 1.25",
    ),
    Claim(
        "bits",
        "in its best order a head loses less by 8 and 4 bits",
        kind="mechanism",
        paper="INT8 and INT4 near full precision after reordering",
        ours="error of the output with 4-bit weights and values in the best order over that in memory order; the worst "
        "of temporal, row and column heads, mean of draws",
        holds_if="less than 1, and less than 1 at 8 bits",
    ),
    Claim(
        "video",
        "reordered, a quarter of the blocks is near lossless",
        kind="mechanism",
        paper="near-identical at 20-30 % density",
        ours="PSNR to the dense video in each head's order less that in memory order, dB, at density 0.25",
        holds_if="at least 2",
    ),
    Claim(
        "masks",
        "masks found on one set of prompts serve another",
        kind="mechanism",
        ours="PSNR with the masks of the prompts themselves less that with masks of other prompts, dB",
        holds_if="at most 1",
    ),
    Claim(
        "speed",
        "sparse and quantised attention together are 1.9 to 2.7 times as fast",
        kind="replication",
        paper="1.9x to 2.7x end to end",
        ours="time of a denoising step of dense attention over that of the plan",
        holds_if="at least 1.9",
        waits="needs low-bit kernels on a GPU; the integers here are a reference, exact and slow",
    ),
]
SHAPE, HEAD_DIM, AMP, NOISE, BLOCK = (8, 8, 8), 48, 3, 0.3, 32
WIDTHS = {
    "spatial": (4, 0.05, 0.05),
    "temporal": (0.01, 4, 4),
    "row": (0.3, 4, 0.01),
    "column": (0.3, 0.01, 4),
}
REORDERED = ("temporal", "row", "column")
SHARE = 0.9
DRAWS = {"smoke": 3, "full": 10}
# The video transformer: videos judged (as many prompts give the masks), steps of a sampling and step groups, each
# how-many-th step gives the orders; block and density of the masks.
VIDEOS, STEPS, GROUPS, EVERY, VIDEO_BLOCK, DENSITY = 2, 10, 5, 4, 64, 0.25


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Plant heads that look along one axis and reorder them; at full size, reorder the video transformer."""
    draws = [planted(seed + n, device) for n in range(DRAWS[size])]
    findings = [_map(*draws[0]), _dropped(*draws[0]), *_needed(draws, seed), _bits(draws, seed)]
    if size == "full":
        return [*findings, *_video(model or MODEL, device, seed)]
    return [*findings, *(Finding(c, "not measured", reason=FULL_ONLY) for c in ("video", "masks"))]


def planted(seed: int, device: str) -> tuple[Any, Any]:
    """q and k ``[1, 4, n, head_dim]`` of heads that look along different axes, in the order of `WIDTHS`."""
    import torch

    from regard.tasks.qk import grid_qk

    generator = torch.Generator().manual_seed(seed)
    pairs = [grid_qk(SHAPE, w, AMP, NOISE, generator, dim=HEAD_DIM) for w in WIDTHS.values()]
    q, k = (torch.cat([p[i] for p in pairs], 1).to(device) for i in (0, 1))
    return q, k


def _weights(q: Any, k: Any) -> Any:
    return (q.double() @ k.double().mT / HEAD_DIM**0.5).softmax(-1)


def _map(q: Any, k: Any) -> Finding:
    from regard.plan.reorder import axis_orders, block_mass

    orders, weights, worst = axis_orders(SHAPE), _weights(q, k), 0.0
    for order, mass in zip(orders, block_mass(q, k, orders, BLOCK), strict=True):
        tokens = order.forward.to(q.device)
        explicit = weights[:, :, tokens][..., tokens].unflatten(-1, (-1, BLOCK)).sum(-1)
        explicit = explicit.unflatten(2, (-1, BLOCK)).mean(3)
        worst = max(worst, float((mass - explicit).abs().max()))
    return Finding("map", verdict(worst <= 1e-5), worst, ceiling=0.0, reason=f"blocks of {BLOCK}, {q.dtype}")


def _dropped(q: Any, k: Any) -> Finding:
    import torch

    from regard.kernels.attend import attend
    from regard.kernels.combine import complete
    from regard.plan.reorder import axis_orders, block_mass, heaviest, reordered

    orders = axis_orders(SHAPE)[:1]
    (mass,) = block_mass(q, k, orders, BLOCK)
    routed = reordered(heaviest(mass[0], 0.25), orders * len(WIDTHS), BLOCK)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(q.shape, generator=generator).to(q)
    (out, lse), (_, whole) = (attend(q, k, v, p, q_start=0, return_lse=True) for p in (routed, None))
    n = q.shape[2]
    at = torch.arange(n, device=q.device)
    allowed = routed.allows(at[:, None], at, torch.arange(len(WIDTHS), device=q.device)[:, None, None])
    explicit = (_weights(q, k) * allowed) @ v.double()
    worst = float((complete(out, (lse - whole).exp(), torch.zeros_like(out)) - explicit).abs().max())
    apart = float((out - explicit).norm() / explicit.norm())
    reason = f"density 0.25; without the factor the outputs differ by {apart:.3f} of their norm"
    return Finding("dropped", verdict(worst <= 1e-5), worst, ceiling=0.0, reason=reason)


def _needed(draws: list[tuple[Any, Any]], seed: int) -> list[Finding]:
    """How many blocks each head needs in each order: the claims of dense blocks, random orders and the rule."""
    import torch

    from regard.patterns.permuted import ListedOrder
    from regard.plan.reorder import axis_orders, block_mass, needed_density, order_figures

    orders, names = axis_orders(SHAPE), list(WIDTHS)
    generator = torch.Generator().manual_seed(seed)
    need, chosen, random = [], [], []
    for q, k in draws:
        shuffled = ListedOrder(tuple(torch.randperm(q.shape[2], generator=generator).tolist()))
        maps = block_mass(q, k, [*orders, shuffled], BLOCK)
        found = np.array([needed_density(m[0], SHARE).tolist() for m in maps])  # [orders, heads]
        need.append(found[:-1])
        random.append(found[-1])
        which = order_figures(q, k, orders, BLOCK).best().tolist()
        chosen.append([found[o, h] for h, o in enumerate(which)])
    needed, at_random, by_rule = np.array(need), np.array(random), np.array(chosen)
    own, best = needed[:, 0], needed.min(1)  # [draws, heads]
    mean = {name: (own[:, h].mean(), best[:, h].mean(), at_random[:, h].mean()) for h, name in enumerate(names)}
    told = "; ".join(f"{name} {a:.3f} -> {b:.3f} (random {c:.3f})" for name, (a, b, c) in mean.items())
    rows = [names.index(name) for name in REORDERED]
    ratio, over, rule = best[:, rows] / own[:, rows], at_random / own, by_rule / best
    details = {"needed": needed.mean(0).tolist(), "orders": [list(o.axes) for o in orders], "heads": names}
    dense = _over_draws("dense blocks", ratio.max(1), lambda x: x <= 0.5, seed, baseline=1.0)
    scattered = _over_draws("random order", over.min(1), lambda x: x > 1, seed, baseline=1.0)
    picked = _over_draws("chosen", rule.max(1), lambda x: x <= 1.25, seed, ceiling=1.0)
    each = "; ".join(f"{name} {rule[:, h].mean():.3f}" for h, name in enumerate(names))
    return [
        replace(dense, reason=f"share of the blocks, {told}; {dense.reason}", details=details),
        replace(scattered, reason=f"share of the blocks, {told}; {scattered.reason}"),
        replace(picked, reason=f"{each}; {picked.reason}"),
    ]


def _over_draws(claim: str, values: Any, holds: Callable[[float], bool], seed: int, **bounds: Any) -> Finding:
    """Judged by the mean over draws; the ends are told."""
    figure = float(values.mean())
    interval = evidence.bootstrap(values, seed=seed) if len(values) > 1 else None
    reason = f"{len(values)} draws, {values.min():.2f} to {values.max():.2f}"
    return Finding(claim, verdict(holds(figure)), figure, interval, reason=reason, **bounds)


def _bits(draws: list[tuple[Any, Any]], seed: int) -> Finding:
    """Errors of attention on integers, block by block, in memory order and in the order that the rule chose.

    Of the outputs for random values; and of the weights alone, whose values are the unit vectors, exact in any bits.
    """
    import torch

    from regard.plan.reorder import axis_orders, order_figures

    orders, names = axis_orders(SHAPE), list(WIDTHS)
    generator = torch.Generator().manual_seed(seed)
    errors = np.zeros((len(draws), 2, len(names), 2, 2))  # draw, bits, head, (output, weights), (memory, chosen)
    for n, (q, k) in enumerate(draws):
        unit = torch.eye(q.shape[2], device=q.device).expand(1, 1, -1, -1)
        values = torch.randn(q.shape, generator=generator).to(q)
        which = order_figures(q, k, orders, BLOCK).best().tolist()
        for h, chosen in enumerate(which):
            for m, v in enumerate((values[:, h : h + 1], unit)):
                for o, order in enumerate((orders[0], orders[chosen])):
                    for b, bits in enumerate((8, 4)):
                        errors[n, b, h, m, o] = _lost(q[:, h : h + 1], k[:, h : h + 1], v, order, bits)
    rows = [names.index(name) for name in REORDERED]
    ratio = errors[..., 1] / errors[..., 0]
    each = ratio[:, :, rows, 0].max(2)  # [draw, bits] of the worst head
    mean = errors.mean(0)
    told = "; ".join(
        f"{names[h]} {mean[1, h, 0, 0]:.3f} -> {mean[1, h, 0, 1]:.3f} "
        f"(weights alone {mean[1, h, 1, 0]:.3f} -> {mean[1, h, 1, 1]:.3f})"
        for h in rows
    )
    reason = (
        f"4 bits, error over norm: {told}; at 8 bits {each[:, 0].mean():.2f}; a block with more of the large "
        "weights has no smaller a scale"
    )
    eight = float(each[:, 0].mean())
    found = _over_draws("bits", each[:, 1], lambda x: x < 1 and eight < 1, seed, ceiling=0.0, baseline=1.0)
    details = {"heads": names, "errors": {"8": mean[0].tolist(), "4": mean[1].tolist()}}
    return replace(found, reason=f"{reason}; {found.reason}", details=details)


def _lost(q: Any, k: Any, v: Any, order: Any, bits: int) -> float:
    """``|out - dense| / |dense|`` of one head, its weights and values in so many bits, blocks in an order."""
    from regard.kernels.attend import attend
    from regard.kernels.quantized import quantized_attend

    slots = [order.apply(x) for x in (q, k, v)]
    out: Any = quantized_attend(slots[0], slots[1], slots[2], pv_bits=bits, block=BLOCK, q_start=0)
    dense: Any = attend(q, k, v, q_start=0)
    return float((order.undo(out) - dense).norm() / dense.norm())


def _video(model: str, device: str, seed: int) -> list[Finding]:
    """The video transformer under block masks: each head in its order and in memory order, own masks and others'."""
    from regard.models.dit import VideoDiT
    from regard.plan.block_plan import StepRoutes, record_maps, record_orders, routes_of
    from regard.plan.reorder import axis_orders
    from regard.studies.testbed import below_gate
    from regard.tasks.fidelity import noise_for
    from regard.tasks.planned_video import calibration, compare, different_prompts
    from regard.tasks.testbeds import load
    from regard.tasks.video import SHAPE as PIXELS

    loaded = load(model, device=device)
    if not isinstance(loaded.model, VideoDiT):
        raise ValueError(
            f"model must be a VideoDiT, whose sampling this study knows, got {type(loaded.model).__name__}"
        )
    missed = below_gate(loaded)
    if missed:
        return [Finding(claim, "not measured", reason=missed) for claim in ("video", "masks")]
    grid, words = loaded.model.config.grid(PIXELS), different_prompts(2 * VIDEOS, seed)
    noises = noise_for(2 * VIDEOS, PIXELS, seed).to(device)
    sets = {"own": slice(VIDEOS, None), "other": slice(0, VIDEOS)}
    inputs = {n: calibration(loaded.model, noises[s], words[s].to(device), steps=STEPS) for n, s in sets.items()}
    best = record_orders(loaded.model, inputs["other"][1::EVERY], grid, VIDEO_BLOCK)
    memory = {name: axis_orders(grid)[:1] * len(orders) for name, orders in best.items()}
    arms = {}
    for name, orders, part in (("order", best, "other"), ("memory", memory, "other"), ("own", best, "own")):
        groups = []
        for g in range(GROUPS):
            steps = [x for step, x in enumerate(inputs[part]) if step * GROUPS // STEPS == g]
            groups.append(
                routes_of(record_maps(loaded.model, steps, orders, VIDEO_BLOCK), orders, DENSITY, VIDEO_BLOCK)
            )
        arms[name] = StepRoutes(loaded.model, groups, STEPS)
    judged = sets["own"]
    outcomes = compare(loaded.model, arms, noises[judged], words[judged].to(device), steps=STEPS)
    psnr = {name: outcomes[name].psnr.double().numpy() for name in arms}
    axes = [order.axes for orders in best.values() for order in orders]
    changed = sum(a != tuple(range(len(grid))) for a in axes)
    told = (
        f"{VIDEOS} videos of {STEPS} steps, blocks of {VIDEO_BLOCK}, {GROUPS} step groups, masks of other prompts: "
        f"{psnr['order'].mean():.2f} dB in each head's order, {psnr['memory'].mean():.2f} in memory order; "
        f"{changed} of {len(axes)} heads reordered"
    )
    gain, lost = psnr["order"] - psnr["memory"], psnr["own"] - psnr["order"]
    details = {
        "psnr": {n: p.tolist() for n, p in psnr.items()},
        "axes": {n: [o.axes for o in x] for n, x in best.items()},
    }
    reason = f"{psnr['own'].mean():.2f} dB with the prompts' own masks, {psnr['order'].mean():.2f} with those of others"
    return [
        Finding(
            "video", verdict(gain.mean() >= 2), float(gain.mean()), _interval(gain, seed), 0.0, None, 0.0, told, details
        ),
        Finding(
            "masks", verdict(lost.mean() <= 1), float(lost.mean()), _interval(lost, seed), ceiling=0.0, reason=reason
        ),
    ]


def _interval(values: Any, seed: int) -> tuple[float, float] | None:
    return evidence.bootstrap(values, seed=seed) if len(values) > 1 else None
