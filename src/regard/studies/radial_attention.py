"""Radial attention (arXiv 2506.19852): spatial windows that halve each time the frame distance doubles.

The heads are planted: queries and keys whose scores are ``-ALPHA D - BETA |u - v|`` plus noise, exactly, D the frame
distance. A pattern's error is the mean over queries of ``sum |P - P_pattern|``, P_pattern the softmax over the kept
keys, which is twice the mass left out. A window family meets Radial's density by mixing its two nearest windows, which
is what a random part of the wider one's last step would give. Radial is without its sink, which makes frame 0 dense.
The released code rounds its own rule to blocks: a block is kept where more than 60% of its non-empty columns are more
than a third full.
"""

from __future__ import annotations

from math import log2, prod
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "radial-attention"
MODEL = "testbed:video"
FULL_ONLY = "only the full size runs the video transformer"
CLAIMS = [
    Claim(
        "recall",
        "the mass that the pattern keeps is exp(lse_pattern - lse_full), both from fused attention",
        kind="instrument",
        ours="largest difference to the mass from explicit weights, over queries and heads",
        holds_if="at most 1e-5",
    ),
    Claim(
        "decay",
        "the measured energy decay is the planted one",
        kind="instrument",
        ours="largest relative error of the two slopes, over heads",
        holds_if="at most 0.05",
    ),
    Claim(
        "complexity",
        "the pattern has O(n log n) pairs",
        kind="instrument",
        paper="at most 4 s n (log2 n - log2 s)",
        ours="largest share of that bound over 8 to 512 frames of 64 tokens",
        holds_if="at most 1, and density * frames / log2(frames) changes by less than 1.5 times over the range",
    ),
    Claim(
        "error",
        "where energy decays over frames and space, shrinking windows lose less than a window of either kind",
        kind="mechanism",
        paper="attention error 3.9e-3, against 4.4e-3 (SVG) and 1.5e-2 (STA), in a video model",
        ours="mean l1 error of the weights",
        holds_if="below 0.7 of a temporal and of a spatial window's and below 0.3 of random keys', at equal density",
    ),
    Claim(
        "released",
        "the released rule, rounded to blocks, loses less than windows at its own density",
        kind="mechanism",
        ours="mean l1 error of the weights, as a share of the better window's",
        holds_if="below 1",
    ),
    Claim(
        "global",
        "a head that looks everywhere gains nothing: the pattern must fit the head",
        kind="mechanism",
        ours="error of Radial as a share of random keys', without decay",
        holds_if="0.95 to 1.05",
    ),
    Claim(
        "video",
        "in a video model, Radial keeps more mass and less output error than windows at equal density",
        kind="mechanism",
        paper="PSNR and VBench on par with dense attention",
        ours="share of the video testbed's heads in which Radial keeps more mass at less error than each other pattern",
        holds_if="over half: temporal and spatial windows, the smallest neighborhood of as many keys, random keys",
    ),
    Claim(
        "speed",
        "video generation is faster at its default length and reaches 4 times longer videos",
        kind="replication",
        paper="1.9x at default length; 4x longer at 4.4x less tuning and 3.7x faster inference",
        ours="time of a denoising step against dense attention",
        holds_if="at least 1.5x at the default length",
        waits="needs HunyuanVideo or Wan 2.1 and a GPU that holds them",
    ),
]
ALPHA, BETA, NOISE_DIM = 0.4, 0.1, 16
SHAPE = {"smoke": (16, 64), "full": (64, 128)}
HEADS = {"smoke": 2, "full": 2}
SEEDS = {"smoke": 1, "full": 3}
BLOCK = {"smoke": 8, "full": 16}
RELEASE_DECAY = 0.95
VIDEOS = 2


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Plant heads that fade, and compare what patterns of equal density keep; in full, in a video transformer too."""
    frames, tokens = SHAPE[size]
    seeds = range(seed, seed + SEEDS[size])
    heads = [planted(frames, tokens, ALPHA, BETA, HEADS[size], s, device) for s in seeds]
    flat = planted(frames, tokens, 0.0, 0.0, HEADS[size], seed, device)
    return [
        _recall(*heads[0], frames, tokens),
        _decay(heads, frames, tokens),
        _complexity(),
        *_errors(heads, frames, tokens, BLOCK[size], seeds),
        _global(*flat, frames, tokens, seed),
        _video(model or MODEL, device, seed) if size == "full" else Finding("video", "not measured", reason=FULL_ONLY),
    ]


def planted(frames: int, tokens: int, alpha: float, beta: float, heads: int, seed: int, device: str) -> tuple[Any, Any]:
    """q and k, [1, heads, n, dim], whose products are ``-alpha |i - j| - beta |u - v|`` and noise of variance 1.

    ``|u - v| = u + v - 2 min(u, v)`` and ``min(u, v) = sum_{t >= 1} [t <= u] [t <= v]``: staircases for features.
    """
    import torch

    n = frames * tokens
    place = torch.arange(n)
    parts_q, parts_k, height = [], [], torch.zeros(n, 1)
    for coordinate, size, slope in ((place % tokens, tokens, beta), (place // tokens, frames, alpha)):
        stairs = (torch.arange(1, size) <= coordinate[:, None]).float() * (2 * slope) ** 0.5
        parts_q.append(stairs)
        parts_k.append(stairs)
        height = height - slope * coordinate[:, None]
    one = torch.ones(n, 1)
    both = torch.cat([*parts_q, height, one], 1), torch.cat([*parts_k, one, height], 1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, heads, n, NOISE_DIM, generator=generator) / NOISE_DIM**0.25
    q, k = (torch.cat([x.expand(heads, -1, -1), e], -1)[None].to(device) for x, e in zip(both, noise, strict=True))
    return q, k


def masses(q: Any, k: Any, frames: int, tokens: int, patterns: dict[str, Any]) -> dict[str, Any]:
    """Mass that each pattern keeps, [heads, n]; and the most that any pattern with Radial's counts keeps, "best".

    One query frame at a time. A pattern is a `Pattern`, or a function of a query frame that gives its mask.
    """
    import torch

    kept: dict[str, list[Any]] = {name: [] for name in [*patterns, "best"]}
    keys = torch.arange(frames * tokens, device=q.device)
    for i in range(frames):
        rows = keys[i * tokens : (i + 1) * tokens]
        weights = (q[0, :, rows].double() @ k[0].double().mT).softmax(-1)
        for name, pattern in patterns.items():
            mask = pattern(i) if callable(pattern) else pattern.allows(rows[:, None], keys[None])
            kept[name].append((weights * mask).sum(-1))
            if name == "radial":
                last = mask.sum(-1, keepdim=True).expand(len(weights), -1, -1) - 1
                most = weights.sort(-1, descending=True).values.cumsum(-1).gather(-1, last)
                kept["best"].append(most[..., 0])
    return {name: torch.cat(parts, -1) for name, parts in kept.items()}


def windows(frames: int, tokens: int, pairs: int) -> dict[str, tuple[tuple[Any, float], ...]]:
    """For each family the widest window with at most `pairs` pairs and the next one, with shares that meet `pairs`."""
    from regard.patterns import Full, Grid, Window

    n = frames * tokens
    found = {}
    for name, size, other in (("temporal", frames, tokens), ("spatial", tokens, frames)):
        counts = [int(Window(w, w).row_counts(size, size).sum()) * other * other for w in range(size)]
        wider = next((w for w, count in enumerate(counts) if count >= pairs), size - 1)
        below, above = counts[wider - 1] if wider else 0, counts[wider]
        share = min((pairs - below) / (above - below), 1.0)

        def window(w: int, name: str = name) -> Any:
            axes = (Window(w, w), Full()) if name == "temporal" else (Full(), Window(w, w))
            return Grid(axes, (frames, tokens))

        chosen = [(window(wider), share)]
        if wider and share < 1:
            chosen.append((window(wider - 1), 1 - share))
        found[name] = tuple(chosen)
        assert abs(sum(x.density(n, n) * part for x, part in chosen) - pairs / n**2) < 1e-9
    return found


def released_blocks(frames: int, tokens: int, block: int, decay: float) -> Any:
    """The released rule (without the sink) rounded to blocks as the authors do, [n / block, n / block].

    Frames whose edges lie inside a block are padded into blocks of their own before rounding, and joined by "or".
    """
    import torch

    from regard.patterns import Radial

    rule = Radial(frames, tokens, sink=False, rule="release", decay=decay, block=block)
    n = frames * tokens // block
    kept = torch.zeros(n + 1, n + 1, dtype=torch.bool)  # one more for a last short block
    place = torch.arange(tokens)
    for i in range(frames):
        for j in range(frames):
            mask = rule.allows((place + i * tokens)[:, None], (place + j * tokens)[None])
            top, left = i * tokens % block, j * tokens % block
            room = [r + -(-tokens // block) * block for r in (top, left)]
            padded = torch.zeros(room[0] // block * block, room[1] // block * block)
            height, width = (min(tokens, size - r) for size, r in zip(padded.shape, (top, left), strict=True))
            padded[top : top + height, left : left + width] = mask[:height, :width]
            columns = padded.unflatten(0, (-1, block)).mean(1).unflatten(1, (-1, block))
            dense = (columns > 1 / 3).sum(-1) / ((columns > 0).sum(-1) + 1e-9) > 0.6
            a, b = i * tokens // block, j * tokens // block
            view = kept[a : a + len(dense), b : b + dense.shape[1]]
            view |= dense[: view.shape[0], : view.shape[1]]
    return kept[:n, :n]


def _recall(q: Any, k: Any, frames: int, tokens: int) -> Finding:
    import torch

    from regard.kernels.attend import attend
    from regard.patterns import Radial

    pattern = Radial(frames, tokens, sink=False)
    value = torch.ones_like(q[..., :8])
    lse = [attend(q, k, value, p, scale=1.0, return_lse=True)[1] for p in (pattern, None)]
    kept = masses(q, k, frames, tokens, {"radial": pattern})["radial"]
    worst = float(((lse[0] - lse[1]).exp()[0] - kept).abs().max())
    return Finding("recall", verdict(worst <= 1e-5), worst, ceiling=0.0, reason=f"{kept.numel()} queries, {q.dtype}")


def _decay(heads: list[tuple[Any, Any]], frames: int, tokens: int) -> Finding:
    import torch

    from regard.measures.energy import energy_by_distance, energy_decay

    found = [energy_decay(energy_by_distance(q, k, frames, tokens, scale=1.0)) for q, k in heads]
    frame, space, fit = (torch.cat(x) for x in zip(*found, strict=True))
    wrong = torch.cat([frame / ALPHA - 1, space / BETA - 1]).abs()
    details = {"frame": frame.tolist(), "space": space.tolist(), "fit": fit.tolist()}
    reason = f"planted {ALPHA} a frame and {BETA} a token; measured {frame.mean():.4f} and {space.mean():.4f}"
    worst = float(wrong.max())
    return Finding("decay", verdict(worst <= 0.05), worst, ceiling=0.0, reason=reason, details=details)


def _complexity() -> Finding:
    from regard.patterns import Radial

    tokens, share, level = 64, {}, {}
    for frames in (8, 16, 32, 64, 128, 256, 512):
        pattern, n = Radial(frames, tokens, sink=False), frames * tokens
        step = max(1, (1 << 19) // frames)
        starts = range(0, n, step)
        pairs = sum(int(pattern.row_counts(min(step, n - a), n, a).sum()) for a in starts)
        share[frames] = pairs / (4 * tokens * n * log2(frames))
        level[frames] = pairs / n**2 * frames / log2(frames)
    spread = max(level.values()) / min(level.values())
    reason = f"density * frames / log2(frames) goes from {level[8]:.2f} to {level[512]:.2f}"
    details = {"share_of_bound": share, "density_level": level}
    worst = max(share.values())
    return Finding(
        "complexity", verdict(worst <= 1 and spread < 1.5), worst, ceiling=1.0, reason=reason, details=details
    )


def _errors(heads: list[tuple[Any, Any]], frames: int, tokens: int, block: int, seeds: Any) -> list[Finding]:
    """Errors of Radial, of the released blocks, and of windows and random keys at the density of each."""
    import torch

    from regard.patterns import Radial

    n = frames * tokens
    radial = Radial(frames, tokens, sink=False)
    blocks = released_blocks(frames, tokens, block, RELEASE_DECAY)
    pairs = {"radial": int(radial.row_counts(n, n).sum()), "released": int(blocks.sum()) * block**2}
    patterns: dict[str, Any] = {"radial": radial}
    families = {name: windows(frames, tokens, count) for name, count in pairs.items()}
    for rule, mixed in families.items():
        patterns |= {f"{rule}/{w}/{m}": x for w, parts in mixed.items() for m, (x, _) in enumerate(parts)}
    lost: dict[str, list[Any]] = {}
    for (q, k), s in zip(heads, seeds, strict=True):
        generator = torch.Generator().manual_seed(s)

        def random(i: int, generator: Any = generator, q: Any = q) -> Any:
            return (torch.rand(tokens, n, generator=generator) < pairs["radial"] / n**2).to(q.device)

        def released(i: int, q: Any = q) -> Any:
            rows = (torch.arange(tokens) + i * tokens) // block
            return blocks[rows].repeat_interleave(block, 1).to(q.device)

        kept = masses(q, k, frames, tokens, patterns | {"random": random, "released": released})
        of = {name: 2 * (1 - kept[name]) for name in ("radial", "released", "random", "best")}
        for rule, mixed in families.items():
            for w, parts in mixed.items():
                of[f"{rule}/{w}"] = sum(2 * (1 - kept[f"{rule}/{w}/{m}"]) * part for m, (_, part) in enumerate(parts))
        for name, values in of.items():
            lost.setdefault(name, []).append(values.flatten().cpu().numpy())
    error = {name: np.stack(values) for name, values in lost.items()}  # [seeds, heads * queries]
    mean = {name: float(values.mean()) for name, values in error.items()}
    return [_better(error, mean, pairs["radial"] / n**2), _released(error, mean, pairs["released"] / n**2)]


def _better(error: dict[str, Any], mean: dict[str, float], density: float) -> Finding:
    own, temporal, spatial = mean["radial"], mean["radial/temporal"], mean["radial/spatial"]
    holds = own < 0.7 * min(temporal, spatial) and own < 0.3 * mean["random"]
    shown = f"temporal window {temporal:.3f}, spatial window {spatial:.3f}, random keys {mean['random']:.3f}"
    return Finding(
        "error",
        verdict(holds),
        own,
        evidence.seeds_and_items(error["radial"], draws=200),
        floor=mean["random"],
        ceiling=mean["best"],
        baseline=min(temporal, spatial),
        reason=f"density {density:.3f}; {shown}; the best keys of each query, as many, {mean['best']:.3f}",
        details={"errors": mean},
    )


def _released(error: dict[str, Any], mean: dict[str, float], density: float) -> Finding:
    best = min(("released/temporal", "released/spatial"), key=lambda name: mean[name])
    share = mean["released"] / mean[best]
    reason = f"density {density:.3f}, error {mean['released']:.3f}; the better window at that density {mean[best]:.3f}"
    paired = np.stack([error["released"].ravel(), error[best].ravel()], 1)
    interval = evidence.bootstrap(paired, lambda x: float(x[:, 0].mean() / x[:, 1].mean()), draws=200)
    return Finding("released", verdict(share < 1), share, interval, ceiling=0.0, baseline=1.0, reason=reason)


def _global(q: Any, k: Any, frames: int, tokens: int, seed: int) -> Finding:
    import torch

    from regard.patterns import Radial

    pattern, n = Radial(frames, tokens, sink=False), frames * tokens
    density = pattern.density(n, n)
    generator = torch.Generator().manual_seed(seed)

    def random(i: int) -> Any:
        return (torch.rand(tokens, n, generator=generator) < density).to(q.device)

    kept = masses(q, k, frames, tokens, {"radial": pattern, "random": random})
    own, other = (float(2 * (1 - kept[name]).mean()) for name in ("radial", "random"))
    reason = f"error {own:.3f}, random keys {other:.3f}, at density {density:.3f}"
    return Finding("global", verdict(0.95 <= own / other <= 1.05), own / other, baseline=1.0, reason=reason)


def rivals_of(radial: Any, grid: tuple[int, int, int], seed: int) -> dict[str, tuple[tuple[Any, float], ...]]:
    """Patterns of Radial's density on the grid, each as parts with shares; a neighborhood has no fewer keys."""
    import torch

    from regard.patterns import Neighborhood, Routed

    n, tokens = prod(grid), grid[1] * grid[2]
    pairs = int(radial.row_counts(n, n).sum())
    keys = -(-pairs // n)
    sizes = [(t, w, w) for t in range(1, grid[0] + 1) for w in range(1, min(grid[1:]) + 1) if t * w * w >= keys]
    least = min(sizes, key=lambda size: (prod(size), abs(size[0] / grid[0] - size[1] / grid[1])))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1, 1, n, n, generator=generator).argsort(-1)[..., :keys].sort(-1).values
    return {
        **windows(grid[0], tokens, pairs),
        "neighborhood": ((Neighborhood(grid, least), 1.0),),
        "random": ((Routed.tokens(drawn.int(), q_len=n, kv_len=n), 1.0),),
    }


def _video(model: str, device: str, seed: int) -> Finding:
    import torch

    from regard.patterns import Radial
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load
    from regard.tasks.video import SHAPE as PIXELS
    from regard.tasks.video_inputs import held_out
    from regard.tasks.video_tried import tried

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return Finding("video", "not measured", reason=reason)
    grid = loaded.model.config.grid(PIXELS)
    radial = Radial(grid[0], grid[1] * grid[2], sink=False)
    families = rivals_of(radial, grid, seed)
    patterns = {"radial": radial} | {f"{f}/{n}": p for f, parts in families.items() for n, (p, _) in enumerate(parts)}
    found = tried(loaded.model, *held_out(VIDEOS, seed), patterns, seed=seed)
    own = found["radial"]
    ahead, means = torch.ones_like(own.mass, dtype=torch.bool), {"radial": _means(own.mass, own.error)}
    for family, parts in families.items():
        mass = sum(found[f"{family}/{n}"].mass * share for n, (_, share) in enumerate(parts))
        error = sum(found[f"{family}/{n}"].error * share for n, (_, share) in enumerate(parts))
        ahead &= (own.mass > mass) & (own.error < error)
        means[family] = _means(mass, error)
    share = ahead.double().flatten().numpy()
    told = ", ".join(f"{name} {mass:.3f} and {error:.3f}" for name, (mass, error) in means.items())
    return Finding(
        "video",
        verdict(share.mean() > 0.5),
        float(share.mean()),
        evidence.bootstrap(share),
        floor=0.0,
        ceiling=1.0,
        reason=f"{len(share)} heads, density {radial.density(prod(grid), prod(grid)):.3f}; mean mass and error: {told}",
        details={"ahead": ahead.tolist(), "means": means},
    )


def _means(mass: Any, error: Any) -> tuple[float, float]:
    return float(mass.mean()), float(error.mean())
