"""On the emergence of position bias (arXiv 2502.01951): what a mask does to positions, layer after layer.

A mask is read as a graph and its rollout `P_t = A_t .. A_0` followed in closed form; the trained half measures, on
pairs in context whose places are exchanged (`regard.tasks.in_context`), how the gap between first and middle grows with
depth. Residual connections break the monotone drift, so the networks have none; `sink` tells what one does to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "position-bias"
MODEL = None
FULL_ONLY = "only the full size trains the networks (20,000 steps each, hours on a CPU core)"
CLAIMS = [
    Claim(
        "influence",
        "the rollout of a mask in closed form equals the product of its row-stochastic matrices",
        kind="instrument",
        ours="largest difference over five masks, with and without residual, 12 layers",
        holds_if="at most 1e-12, and token 0's share under 1, 2, 4, 8, 16 causal layers as derived by hand, to 5e-5",
    ),
    Claim(
        "binomial",
        "without normalising rows, a decay mask's products are binomial: (D^(t+1))_ij = binom(t+x, x) e^(-mx)",
        kind="instrument",
        paper="binom(t+x, x) e^(-mx), x = i - j",
        ours="largest relative difference, 48 tokens, t up to 11",
        holds_if="at most 1e-12",
    ),
    Claim(
        "peak",
        "with rows normalised, the most influential token lies t / (e^m - 1) tokens back",
        kind="mechanism",
        paper="x* = t / (e^m - 1)",
        ours="largest distance between the peak and x*, t = 1..39, 512 tokens, m = 0.223 (tokens)",
        holds_if="at most 1",
    ),
    Claim(
        "centers",
        "all influence moves to the tokens that reach everyone: token 0, under windows too, or the prefix",
        kind="mechanism",
        paper="the same limit under windows, at a rate set by ceil((N-1)/(w-1)) hops; shared by the prefix tokens",
        ours="least share of the centres in the last of 64 tokens after 500 layers, over four masks",
        holds_if="at least 0.99, with the hops of every window exactly ceil((N-1)/(w-1))",
    ),
    Claim(
        "sink",
        "in a causal network with random weights, depth moves mass to token 0",
        kind="mechanism",
        paper="the causal mask concentrates on token 0",
        ours="token 0's share in the last of 64 tokens after 16 layers, less after 2",
        holds_if="above 0",
    ),
    Claim(
        "depth",
        "with depth the first place gains on the middle, without positions, with a decay mask and with RoPE",
        kind="mechanism",
        paper="depth 2 -> 6: +0.059 -> +0.091 without positions, -0.055 -> +0.020 decay, +0.002 -> +0.026 RoPE",
        ours="least gain of the three in accuracy gap first - middle, depth 6 less depth 2",
        holds_if="above 0",
    ),
    Claim(
        "dense",
        "without a mask there is no gap",
        kind="mechanism",
        ours="largest gap first - middle of dense networks without positions, depths 2 and 6",
        holds_if="below 0.01",
    ),
]
GOLDEN = {1: 0.0039, 2: 0.0239, 4: 0.1707, 8: 0.7181, 16: 0.9966}
DECAY = 0.223
SAMPLES = 64  # inputs of the random network
DEPTHS = (2, 6)
STEPS, SEEDS, BATCH, LR, WEIGHT_DECAY, TESTS = 20_000, 3, 128, 1e-3, 1e-6, 10_000
ENCODINGS = ("none", "decay", "rope")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """The closed forms and the random network; the full size trains the networks too."""
    findings = [_influence(), _binomial(), _peak(), _centers(), _sink(seed)]
    if size == "full":
        return findings + _trained(device, seed)
    return findings + [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("depth", "dense")]


def _influence() -> Finding:
    import torch

    from regard.patterns import Causal, Full, Prefix, Sinks, Window
    from regard.patterns.coverage import influence

    length, layers, worst = 48, 12, 0.0
    at = torch.arange(length)
    for pattern in (Causal(), Window(5), Prefix(7), (Window(3) | Sinks(2)) & Causal(), Full()):
        allowed = pattern.allows(at[:, None], at[None]).double()
        step = allowed / allowed.sum(1, keepdim=True)
        for residual in (0.0, 0.5):
            mixed = residual * torch.eye(length, dtype=torch.float64) + (1 - residual) * step
            product = torch.stack([torch.linalg.matrix_power(mixed, t + 1)[-1] for t in range(layers)])
            found = influence(pattern, layers, length - 1, length, residual=residual)
            worst = max(worst, float((found - product).abs().max()))
    shares = {n: float(influence(Causal(), n, 255, 256)[-1, 0]) for n in GOLDEN}
    golden = all(abs(shares[n] - value) <= 5e-5 for n, value in GOLDEN.items())
    reason = "token 0 of 256 after n causal layers: " + ", ".join(f"{n} {x:.4f}" for n, x in shares.items())
    return Finding("influence", verdict(worst <= 1e-12 and golden), worst, floor=0.0, reason=reason)


def _binomial() -> Finding:
    length, worst = 48, 0.0
    x = np.arange(length)[:, None] - np.arange(length)
    decay = np.where(x >= 0, np.exp(-DECAY * np.maximum(x, 0)), 0.0)
    product = np.eye(length)
    for t in range(12):
        product = product @ decay
        for i in range(length):
            for j in range(i + 1):
                want = math.comb(t + i - j, i - j) * math.exp(-DECAY * (i - j))
                worst = max(worst, abs(product[i, j] - want) / want)
    return Finding("binomial", verdict(worst <= 1e-12), worst, floor=0.0)


def _peak() -> Finding:
    from regard.patterns import Causal
    from regard.patterns.coverage import influence

    length, layers = 512, 40
    share = influence(Causal(), layers, length - 1, length, decay=DECAY)
    back = length - 1 - share.argmax(1).numpy()  # of t + 1 layers in row t
    away = [abs(float(back[t]) - t / (math.exp(DECAY) - 1)) for t in range(1, layers)]
    reason = f"after 2, 11 and 40 layers the peak is {back[1]}, {back[10]} and {back[39]} tokens back"
    return Finding("peak", verdict(max(away) <= 1), max(away), floor=0.0, reason=reason)


def _centers() -> Finding:
    from regard.patterns import Causal, Prefix, Window
    from regard.patterns.coverage import centers, depth, influence

    length, layers = 64, 500
    masks = {
        "causal": (Causal(), 1),
        "window 8": (Window(7), 1),
        "window 4": (Window(3), 1),
        "prefix 5": (Prefix(5), 5),
    }
    shares, right = {}, True
    for name, (pattern, count) in masks.items():
        right &= centers(pattern, length).tolist() == [[0, count]]
        shares[name] = float(influence(pattern, layers, length - 1, length)[-1, :count].sum())
    hops = {w: depth(Window(w - 1), length - 1, length) for w in (2, 4, 8, 20)}
    right &= all(n == math.ceil((length - 1) / (w - 1)) for w, n in hops.items())
    prefix = influence(Prefix(5), layers, length - 1, length)[-1, :5]
    reason = (
        ", ".join(f"{name} {x:.4f}" for name, x in shares.items())
        + f"; each of 5 prefix tokens {float(prefix.min()):.4f} to {float(prefix.max()):.4f}"
        + "; hops "
        + ", ".join(f"{n} at w = {w}" for w, n in hops.items())
    )
    least = min(shares.values())
    return Finding("centers", verdict(least >= 0.99 and right), least, floor=1 / length, ceiling=1.0, reason=reason)


def _sink(seed: int) -> Finding:
    import torch

    from regard.models.san import SAN
    from regard.patterns import Causal, Full, Window

    length, dim, samples = 64, 64, SAMPLES
    x = torch.randn(samples, length, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = {}
    for name, pattern in (("causal", Causal()), ("window 16", Window(15)), ("no mask", Full())):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = SAN(dim, 2, 16, pattern=pattern).double()
        for residual in (0.0, 0.5):
            found = network.rollout(x, residual)[[1, 15], :, -1, 0].numpy()  # after 2 and 16 layers
            shares[name if not residual else f"{name}, residual 0.5"] = found
    gain = shares["causal"][1] - shares["causal"][0]
    shown = ", ".join(f"{name} {a.mean():.3f} -> {b.mean():.3f}" for name, (a, b) in shares.items())
    return Finding(
        "sink",
        verdict(gain.mean() > 0),
        float(gain.mean()),
        evidence.bootstrap(gain, seed=seed),
        floor=0.0,
        ceiling=1 - float(shares["causal"][0].mean()),
        baseline=float((shares["no mask"][1] - shares["no mask"][0]).mean()),
        reason=f"{samples} random inputs, after 2 -> 16 layers: {shown}",
    )


def network(task: Any, encoding: str, depth: int, seed: int) -> Any:
    """A self-attention network for the task under the causal mask; "dense": no mask, no positions."""
    import torch

    from regard.layers.alibi import Alibi
    from regard.layers.position import Rope
    from regard.models.san import SAN
    from regard.patterns import Causal

    positions: dict[str, Any] = {"decay": lambda: Alibi(DECAY), "rope": lambda: Rope(task.dim)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pattern = None if encoding == "dense" else Causal()
        return SAN(task.dim, task.labels, depth, pattern=pattern, position=positions.get(encoding))


def gaps(encoding: str, depth: int, seed: int, device: str) -> tuple[np.ndarray[Any, Any], float]:
    """Train one network: its gap first - middle on every test sequence, and its accuracy on the classes it knows."""
    import torch
    from torch.nn.functional import cross_entropy

    from regard.tasks.in_context import InContext, in_context_gap
    from regard.train.simple import fit

    task = InContext(seed=seed)
    made = network(task, encoding, depth, seed).to(device)

    def loss(model: Any, batch: Any) -> Any:
        return cross_entropy(model(batch.x.to(device)), batch.label.to(device))

    def predict(x: Any) -> Any:
        return torch.cat([made(part.to(device)).argmax(-1) for part in x.split(1000)])

    fit(made, loss, lambda g: task.batch(BATCH, g), STEPS, LR, seed, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(1_000_000_007 + seed)
    gap = in_context_gap(predict, task, "first", "middle", TESTS, generator).numpy()
    seen = task.batch(TESTS, generator)
    with torch.no_grad():
        return gap, float((predict(seen.x).cpu() == seen.label).double().mean())


def _trained(device: str, seed: int) -> list[Finding]:
    gap: dict[str, dict[int, Any]] = {}
    accuracy: dict[str, Any] = {}
    for encoding in (*ENCODINGS, "dense"):
        gap[encoding] = {}
        for depth in DEPTHS:
            found = [gaps(encoding, depth, s, device) for s in range(seed, seed + SEEDS)]
            gap[encoding][depth] = np.stack([g for g, _ in found])
            accuracy[f"{encoding} {depth}"] = [a for _, a in found]
    low, high = DEPTHS
    gain = {e: gap[e][high] - gap[e][low] for e in ENCODINGS}
    worst = min(ENCODINGS, key=lambda e: float(gain[e].mean()))
    means = {e: {d: float(g.mean()) for d, g in by.items()} for e, by in gap.items()}
    shown = ", ".join(f"{e} {m[low]:+.3f} -> {m[high]:+.3f}" for e, m in means.items())
    details = {
        "gap_by_seed": {f"{e} {d}": g.mean(1).tolist() for e, by in gap.items() for d, g in by.items()},
        "accuracy_on_trained_classes": accuracy,
    }
    reason = f"depth {low} -> {high}, {STEPS} steps, {SEEDS} seeds: {shown}"
    dense = max((abs(m), d) for d, m in means["dense"].items())[1]
    return [
        Finding(
            "depth",
            verdict(gain[worst].mean() > 0),
            float(gain[worst].mean()),
            evidence.seeds_and_items(gain[worst]),
            floor=0.0,
            baseline=means["dense"][high] - means["dense"][low],
            reason=reason,
            details=details,
        ),
        Finding(
            "dense",
            verdict(abs(means["dense"][dense]) < 0.01),
            abs(means["dense"][dense]),
            evidence.seeds_and_items(gap["dense"][dense]),
            floor=0.0,
            reason=reason,
        ),
    ]
