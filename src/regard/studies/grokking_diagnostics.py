"""Grokking and two numbers of the heads (arXiv 2605.20441): does weight decay decide, and do the numbers foretell it?

A small decoder learns a + b mod p from a share of the pairs, full batch. Ordered pairs split at random leak: b + a in
training answers a + b, so test accuracy without generalising is near the training share. The same runs are therefore
made on unordered pairs, where it is near 0. Runs that share a split train together (`regard.train.stacked`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "grokking-diagnostics"
MODEL = None
CLAIMS = [
    Claim(
        "numbers",
        "head similarity and entropy spread from the streamed statistics equal those from the weights",
        kind="instrument",
        ours="largest relative difference, the trained runs",
        holds_if="at most 1e-4",
    ),
    Claim(
        "regimes",
        "with weight decay the sums are learned, without it only the pairs",
        kind="mechanism",
        paper="decay separates memorising from generalising",
        ours="test accuracy with decay 1, pairs split as ordered; the baseline is decay 0",
        holds_if="above 0.95, and below 0.7 without decay",
    ),
    Claim(
        "unseen",
        "the same where no test pair has its mirror image in training",
        kind="mechanism",
        ours="test accuracy with decay 1, pairs split as unordered; the baseline is decay 0",
        holds_if="above 0.95, and below 0.7 without decay",
    ),
    Claim(
        "threshold",
        "there is a decay above which runs generalise",
        kind="mechanism",
        paper="0.0158 [0.0109, 0.0200], 4 layers, 8 heads, dim 128",
        ours="decay at which a logistic fit on log decay gives one half; interval over seeds",
        holds_if="inside the decays tried, with an interval less than a factor of 10 wide",
    ),
    Claim(
        "foretell",
        "the two numbers foretell generalisation better than loss and norm alone",
        kind="mechanism",
        paper="no predictive gain over clock, loss and norm",
        ours="AUC of predicting a seed's runs from the others', first 30% of training, numbers added less not added",
        holds_if="better: the interval over seeds lies above 0",
    ),
    Claim(
        "reinitialise",
        "re-initialising heads at decay 0.05 lowers the second phase's amplitude, clipping norms does not",
        kind="replication",
        paper="d = -1.19",
        ours="Cohen's d over paired seeds",
        holds_if="below 0, with an interval that leaves out 0",
        waits="needs the paper's runs of 4 layers and 8 heads on a GPU, and how it defines the amplitude",
    ),
]
P, SHARE, DIM, HEADS, LR = 23, 0.6, 64, 4, 3e-3
STEPS = 800
DECAYS = (1.0, 0.0)
SEEDS = {"smoke": 1, "full": 5}
LOGS = 4  # times a run that the numbers are logged
GRID: dict[str, Any] = {
    "p": 59,
    "layers": 2,
    "steps": 5000,
    "seeds": 8,
    "decays": tuple(np.geomspace(0.003, 3, 8).tolist()),
}
EARLY, RIGHT = 0.3, 0.95  # the share of training to foretell from, and when a run has generalised
SPLIT_ONLY = "only the full size trains on unordered pairs too"
FULL_ONLY = "only the full size trains 64 runs at p = 59"
GRID_ON = ("cuda",)  # devices the grid is trained on: hours of a CPU


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """The runs with and without decay; the full size has several seeds, both splits and, on a GPU, the grid."""
    seeds = list(range(seed, seed + SEEDS[size]))
    ordered = train(P, 1, STEPS, DECAYS, seeds, "ordered", device)
    if size == "smoke":
        findings = [_numbers(ordered["models"], P), _regimes("regimes", ordered)]
        findings.append(Finding("unseen", "not measured", reason=SPLIT_ONLY))
        return findings + [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("threshold", "foretell")]
    unordered = train(P, 1, STEPS, DECAYS, seeds, "unordered", device)
    findings = [
        _numbers([*ordered["models"], *unordered["models"]], P),
        _regimes("regimes", ordered),
        _regimes("unseen", unordered),
    ]
    if device not in GRID_ON:
        reason = f"64 runs of {GRID['steps']} steps at p = {GRID['p']} are hours of a CPU: run it with --device cuda"
        return findings + [Finding(claim, "not measured", reason=reason) for claim in ("threshold", "foretell")]
    decays, layers, steps = GRID["decays"], GRID["layers"], GRID["steps"]
    grid = train(GRID["p"], layers, steps, decays, list(range(GRID["seeds"])), "unordered", device)
    return [*findings, _threshold(grid, seed), _foretell(grid, seed)]


def build(p: int, layers: int, seed: int) -> Any:
    """A decoder with rotary positions whose attention `vmap` passes through."""
    import torch

    from regard.layers.multihead import MultiHead
    from regard.layers.position import Rope
    from regard.models.decoder import Decoder

    def attention(_: int) -> Any:
        return MultiHead(DIM, HEADS, position=Rope(DIM // HEADS), backend="reference")

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(p + 1, DIM, layers, HEADS, outputs=p, attention=attention)


def answers(model: Any, ids: Any) -> Any:
    """The model's logits of the last token, the last block's MLP run on that token alone: nothing reads the others."""
    x, pattern, last = model.embed(ids), model.patterns[-1], model.blocks[-1]
    for block in model.blocks[:-1]:
        x = block(x, pattern=pattern)
    x = (x + last.attention(last.norm1(x), pattern=pattern))[:, -1:]
    return model.head(model.norm(x + last.mlp(last.norm2(x))))[:, 0]


def train(
    p: int,
    layers: int,
    steps: int,
    decays: tuple[float, ...],
    seeds: list[int],
    by: Literal["ordered", "unordered"],
    device: str,
) -> dict[str, Any]:
    """Every decay with every seed, decay-major; seeds draw the weights, the split is one for all.

    Returns:
        models; decay and seed of each; train [run, pair] and test [run, pair], 1 where right; log [time, run, name] of
        "loss", "norm", "similarity", "spread" at `times` steps.
    """
    import torch
    from torch import nn

    from regard.tasks.modular import ModAdd
    from regard.train.diagnostics import flat, head_numbers
    from regard.train.stacked import fit_stacked

    task = ModAdd(p, SHARE, by=by)
    learnt, unseen = task.whole("train").input_ids.to(device), task.whole("test").input_ids.to(device)
    arms = [(decay, s) for decay in decays for s in seeds]
    models = [build(p, layers, s).to(device) for _, s in arms]
    log: list[list[list[float]]] = []
    times: list[int] = []

    def loss(model: Any, ids: Any) -> Any:
        return nn.functional.cross_entropy(answers(model, ids[:, :-1]), ids[:, -1])

    def note(step: int, losses: Any) -> None:
        if step % max(1, steps // LOGS) and step != 1:
            return
        times.append(step)
        shown = learnt[:32, :-1]
        numbers = [head_numbers(model, shown) for model in models]
        log.append(
            [
                [float(value), float(flat(model).norm()), n["head_similarity"], n["entropy_spread"]]
                for value, model, n in zip(losses, models, numbers, strict=True)
            ]
        )

    fit_stacked(models, loss, learnt, steps, LR, [decay for decay, _ in arms], on_step=note)
    with torch.no_grad():
        right = [
            np.stack([(answers(m, ids[:, :-1]).argmax(-1) == ids[:, -1]).double().cpu().numpy() for m in models])
            for ids in (learnt, unseen)
        ]
    return {
        "models": models,
        "decay": np.array([decay for decay, _ in arms]),
        "seed": np.array([s for _, s in arms]),
        "train": right[0],
        "test": right[1],
        "log": np.array(log),
        "times": times,
        "steps": steps,
    }


def _numbers(models: list[Any], p: int) -> Finding:
    import torch
    from torch import nn

    from regard.train.diagnostics import head_numbers
    from regard.watch.intervene import Site, trace

    ids = torch.cartesian_prod(torch.arange(p), torch.arange(p))[::3]
    ids = torch.cat([ids, torch.full((len(ids), 1), p)], 1).to(next(models[0].parameters()).device)
    worst, site = 0.0, Site(0, "weights")
    for model in models:
        weights = trace(model, {"ids": ids}, site)[site].double()
        maps = nn.functional.normalize(weights.transpose(0, 1).flatten(1), dim=1)
        similar = float(((maps @ maps.T).sum() - HEADS) / (HEADS * (HEADS - 1)))
        spread = float(torch.special.entr(weights).sum(-1).mean((0, 2)).std(correction=0))
        found = head_numbers(model, ids)
        worst = max(worst, abs(found["head_similarity"] / similar - 1), abs(found["entropy_spread"] / spread - 1))
    return Finding("numbers", verdict(worst <= 1e-4), worst, floor=0.0, reason=f"{len(models)} runs, {len(ids)} sums")


def _regimes(claim: str, runs: dict[str, Any]) -> Finding:
    on, off = (runs["decay"] == decay for decay in DECAYS)
    with_decay, without = runs["test"][on], runs["test"][off]
    first, last = runs["log"][0], runs["log"][-1]

    def numbers(at: Any) -> str:
        return f"similarity {at[:, 2].mean():.2f}, spread {at[:, 3].mean():.2f} nat"

    reason = (
        f"{runs['steps']} full-batch steps, {with_decay.shape[0]} seed{'s' * (len(with_decay) > 1)}, "
        f"{runs['train'].shape[1]} pairs trained on, {with_decay.shape[1]} tested; training accuracy "
        f"{runs['train'][on].mean():.3f} and {runs['train'][off].mean():.3f}; heads after one step: {numbers(first)} "
        f"(uniform weights: 1 and 0), at the end with decay: {numbers(last[on])}, without: {numbers(last[off])}"
    )
    names = ("loss", "norm", "similarity", "spread")
    details = {
        "times": runs["times"],
        "test_accuracy": {f"decay {d:g}": runs["test"][runs["decay"] == d].mean(1).tolist() for d in DECAYS},
        "log": {
            f"decay {d:g}": {n: runs["log"][:, runs["decay"] == d, i].mean(1).tolist() for i, n in enumerate(names)}
            for d in DECAYS
        },
    }
    return Finding(
        claim,
        verdict(with_decay.mean() > 0.95 and without.mean() < 0.7),
        float(with_decay.mean()),
        evidence.seeds_and_items(with_decay),
        floor=1 / P,
        ceiling=1.0,
        baseline=float(without.mean()),
        reason=reason,
        details=details,
    )


def logistic(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], penalty: float = 1e-2) -> np.ndarray[Any, Any]:
    """Weights [features + 1] (the constant last) of a logistic regression, by Newton's method.

    The penalty on the squared weights, not on the constant, keeps them finite where classes separate.
    """
    features = np.column_stack([x, np.ones(len(x))])
    ridge = np.diag([penalty] * x.shape[1] + [1e-6])
    found = np.zeros(features.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(features @ found, -30, 30)))
        slope = features.T @ (chance - y) + ridge @ found
        curve = (features * (chance * (1 - chance))[:, None]).T @ features + ridge
        move = np.linalg.solve(curve, slope)
        found -= move * min(1.0, 5 / max(np.abs(move).max(), 1e-12))
    return found


def _threshold(runs: dict[str, Any], seed: int) -> Finding:
    x, done = np.log(runs["decay"]), runs["test"].mean(1) > RIGHT
    shares = {f"{d:.3g}": float(done[runs["decay"] == d].mean()) for d in sorted(set(runs["decay"]))}
    reason = "share of runs that generalise by decay: " + ", ".join(f"{d} {s:.2f}" for d, s in shares.items())
    if done.all() or not done.any():
        return Finding("threshold", "not measured", reason="all runs end alike; " + reason, details=shares)

    def half(seeds: Any) -> float:
        rows = np.concatenate([np.flatnonzero(runs["seed"] == s) for s in seeds])
        if done[rows].all() or not done[rows].any():
            return float("nan")
        slope, constant = logistic(x[rows, None], done[rows].astype(float))
        return float(-constant / slope)

    every = np.unique(runs["seed"])
    at = half(every)
    low, high = evidence.bootstrap(every, half, seed=seed)
    inside = x.min() < at < x.max() and high - low < np.log(10)
    interval = (float(np.exp(low)), float(np.exp(high)))
    return Finding("threshold", verdict(inside), float(np.exp(at)), interval, reason=reason, details=shares)


def _foretell(runs: dict[str, Any], seed: int) -> Finding:
    done = runs["test"].mean(1) > RIGHT
    if done.all() or not done.any():
        reason = "all runs end alike, so there is nothing to foretell"
        return Finding("foretell", "not measured", reason=reason)
    early = [i for i, t in enumerate(runs["times"]) if t <= EARLY * runs["steps"]]
    seen = runs["log"][early].copy()
    seen[..., :2] = np.log(np.maximum(seen[..., :2], 1e-12))
    # Of each number its last value and its change.
    features = np.concatenate([seen[-1], seen[-1] - seen[0]], 1)
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-9)
    plain, added = [0, 1, 4, 5], list(range(8))

    def held_out(columns: list[int]) -> np.ndarray[Any, Any]:
        score = np.zeros(len(done))
        for s in np.unique(runs["seed"]):
            test = runs["seed"] == s
            found = logistic(features[~test][:, columns], done[~test].astype(float), 1.0)
            score[test] = features[test][:, columns] @ found[:-1] + found[-1]
        return score

    before, after = held_out(plain), held_out(added)

    def gain(seeds: Any) -> float:
        rows = np.concatenate([np.flatnonzero(runs["seed"] == s) for s in seeds])
        return evidence.auc(after[rows], done[rows]) - evidence.auc(before[rows], done[rows])

    every = np.unique(runs["seed"])
    low, high = evidence.bootstrap(every, gain, seed=seed)
    figures = evidence.auc(before, done), evidence.auc(after, done)
    reason = f"AUC {figures[0]:.3f} by loss and norm, {figures[1]:.3f} with the two numbers"
    return Finding(
        "foretell",
        verdict(low > 0),
        figures[1] - figures[0],
        (low, high),
        floor=0.0,
        ceiling=1 - figures[0],
        reason=f"{reason}; {done.sum()} of {len(done)} runs generalise",
    )
