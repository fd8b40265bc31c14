"""Sparsifiner (arXiv 2303.13755): a learned low-rank guess of the weights picks the keys of each query.

The small size trains a ViT on digits, freezes it and distils predictors from its weights; the mass that the picked
quarter keeps stands beside that of random keys, of the nearest ones (in the image, and along the sequence) and of the
largest ones. The full size trains on sparse attention, from the shipped ViT as teacher, with each choice of keys.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "sparsifiner"
MODEL = "testbed:vit"
CLAIMS = [
    Claim(
        "guess",
        "the predictor is the formula, and its keys are the largest of the formula cut short",
        kind="instrument",
        ours="largest difference of the guessed weights, float64, class token and odd length",
        holds_if="at most 1e-10, with ceil(N / 4) keys a query, the same ones, and all for the class token",
    ),
    Claim(
        "mass",
        "the quarter of the keys that the predictor picks holds most of the attention",
        kind="mechanism",
        paper="predicted masks agree with dense attention (figures of maps)",
        ours="mass kept by 25 % of the keys, held-out digits, all layers and heads of a 2-layer ViT",
        holds_if="at least random keys + 0.25, and at least the better of two windows of as many keys + 0.05",
    ),
    Claim(
        "operations",
        "a quarter of the keys saves 48 % of the operations of attention, predictor counted",
        kind="mechanism",
        paper="-48 % to -69 % FLOPs of multi-head self-attention",
        ours="share saved of the products with keys and values, 197 tokens, head dimension 64, rank 32, width 32",
        holds_if="at least 0.48",
    ),
    Claim(
        "accuracy",
        "sparse attention at 25 % of the keys loses next to no accuracy",
        kind="mechanism",
        paper="at most 0.4 % less (DeiT-S on ImageNet)",
        ours="points of test accuracy on digits, trained sparse less dense teacher",
        holds_if="at least -1 in the mean over seeds",
    ),
    Claim(
        "chosen",
        "it is the choice of keys that keeps the accuracy",
        kind="mechanism",
        ours="points of test accuracy, picked keys less random keys, trained alike",
        holds_if="at least 3 in the mean over seeds",
    ),
    Claim(
        "imagenet",
        "DeiT-S on ImageNet loses at most 0.4 points at -48 % to -69 % operations of attention",
        kind="replication",
        paper="79.8 -> 79.7 and 79.4",
        ours="top-1 accuracy less that of DeiT-S",
        holds_if="at least -0.4",
        waits="needs ImageNet's images and 50 epochs of training, or the authors' weights, which cannot be had here",
    ),
    Claim(
        "pruning",
        "at equal operations, pruning connections is better than pruning tokens",
        kind="replication",
        paper="better than token pruning at equal FLOPs",
        ours="top-1 accuracy less that of token pruning at equal operations",
        holds_if="above 0",
        waits="token pruning is not built here yet, and its trained models for ImageNet cannot be fetched",
    ),
]
SHARE = 0.25
# of the small ViT: width, heads, layers, images a step, steps, rate; the predictor's steps and rate; test images; seeds
SMALL = {"dim": 32, "heads": 2, "layers": 2, "batch": 32, "steps": 150, "distil": 150, "tests": 96}
LR, PREDICTOR_LR, SEEDS = 1e-2, 1e-2, {"smoke": 2, "full": 3}
# of the full size: epochs of the predictors, epochs of sparse training, images a step
FULL = {"distil": 5, "sparse": 45, "batch": 32}
FINE_LR, KL, MSE = 3e-4, 0.5, 0.5
ARMS = ("picked", "random", "oracle")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Judge the predictor on a small ViT; in full, train the model under its choice and under the controls."""
    seeds = list(range(seed, seed + SEEDS[size]))
    found = [_guess(seed), _mass(seeds, device), _operations()]
    if size == "smoke":
        why = "only the full size trains sparse attention"
        return [*found, *(Finding(claim, "not measured", reason=why) for claim in ("accuracy", "chosen"))]
    return [*found, *_accuracy(model, seeds, device)]


# -- the predictor and its definition


def _guess(seed: int) -> Finding:
    import torch

    from regard.layers.lowrank_route import LowRankRoute

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        route = LowRankRoute(8, 21, rank=12, share=SHARE).double()
    with torch.no_grad():
        for weight in (route.mix, route.basis):
            weight.normal_(std=0.1, generator=generator)
    q, k = (torch.randn(2, 2, 21, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    low_q = torch.einsum("bhnd,cd->bhnc", q, route.q_proj.weight) + route.q_proj.bias
    low_k = torch.einsum("bhnd,cd->bhnc", k, route.k_proj.weight) + route.k_proj.bias
    scores = torch.einsum("bhic,bhjc,jr->bhir", low_q[:, :, 1:], low_k, route.mix) / 4**0.5
    weights = scores.softmax(-1)
    worst = float((route.predict(q, k) - weights @ route.basis.T).detach().abs().max())
    rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    basis = torch.where(route.basis.abs() > route.threshold, route.basis.abs(), 0.0)
    cut = torch.where(rank < 8, weights, 0.0) @ basis.T
    keys = cut.sort(dim=-1, descending=True, stable=True).indices[..., : -(-21 // 4)].sort(dim=-1).values
    found, place = route(q, k), torch.arange(21)
    at = (place[:, None], place[None], torch.arange(2)[:, None, None], torch.arange(2)[:, None, None, None])
    allowed = found.allows(*at)
    want = torch.zeros_like(allowed[:, :, 1:]).scatter_(-1, keys, True)
    same = torch.equal(allowed[:, :, 1:], want) and bool(allowed[:, :, 0].all())
    reason = f"{'the same' if same else 'other'} keys of {want[..., 0].numel()} queries, {keys.shape[-1]} of 21 each"
    return Finding("guess", verdict(worst <= 1e-10 and same), worst, floor=0.0, reason=reason)


def _operations() -> Finding:
    """At the shape of DeiT-S, a head; multiply-adds."""
    from regard.layers.lowrank_route import LowRankRoute

    n, d = 197, 64
    route = LowRankRoute(d, n, rank=32)
    dense, pairs = 2 * d * n * n, n + (n - 1) * route.keep  # the class token meets all
    guess, sparse = route.cost(n, n, d), 2 * d * pairs
    projections = 2 * n * d * route.q_proj.out_features
    saved = 1 - (sparse + guess) / dense
    without = 1 - (sparse + guess - projections) / dense
    return Finding(
        "operations",
        verdict(saved >= 0.48),
        saved,
        floor=0.0,
        ceiling=1 - sparse / dense,
        baseline=without,
        reason=(
            f"of {dense / 1e6:.2f} million multiply-adds a head {sparse / 1e6:.2f} attend and {guess / 1e6:.2f} guess, "
            f"{projections / 1e6:.2f} of these in the predictor's own projections (baseline: without them)"
        ),
    )


# -- what it learns


def caught(model: Any, images: Any) -> list[tuple[str, Any, Any]]:
    """Name, q and k of every attention call of a model, without gradient."""
    import torch

    from regard.watch.seam import Seam

    found: list[tuple[str, Any, Any]] = []
    with torch.no_grad(), Seam(model, lambda call: found.append((call.layer, call.q, call.k))):
        model(images)
    return found


def distilled(model: Any, batches: Any, steps: int, prefix: int, seed: int, device: str) -> dict[str, Any]:
    """A predictor for each layer of a frozen model, taught by its dense weights."""
    import torch
    from torch import nn

    from regard.layers.lowrank_route import LowRankRoute
    from regard.train.objectives import weights_mse
    from regard.train.simple import fit

    seen = caught(model, batches(torch.Generator().manual_seed(seed)).x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [LowRankRoute(q.shape[3], q.shape[2], prefix=prefix, share=SHARE) for _, q, _ in seen]
    routes = nn.ModuleList(made).to(device)

    def loss(routes: Any, images: Any) -> Any:
        errors = []
        for route, (_, q, k) in zip(routes, caught(model, images.x), strict=True):
            weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(-1)[:, :, prefix:]
            errors.append(weights_mse(route.predict(q, k), weights))
        return torch.stack(errors).mean()

    fit(routes, loss, batches, steps, PREDICTOR_LR, seed, decay=steps // 3)
    return {name: route for (name, _, _), route in zip(seen, made, strict=True)}


def small_vit(seed: int, device: str) -> Any:
    """The ViT of the small size, trained for a few seconds."""
    import torch

    from regard.layers.multihead import MultiHead
    from regard.models.vit import ViT
    from regard.tasks.vision import Digits, asked_loss
    from regard.train.simple import fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[Any] = [lambda dim, heads, shape: MultiHead(dim, heads, bias=True)] * SMALL["layers"]
        model = ViT((8, 8), layers, 10, dim=SMALL["dim"], heads=SMALL["heads"], position_std=0.5).to(device)
    steps, task = SMALL["steps"], Digits("train")
    fit(
        model, asked_loss, lambda g: task.batch(SMALL["batch"], g).to(device), steps, LR, seed,
        warmup=steps // 10, decay=steps // 3,
    )  # fmt: skip
    return model.requires_grad_(False)


def _mass(seeds: list[int], device: str) -> Finding:
    import torch

    from regard.kernels.recall import kept_mass, local_blocks, oracle_blocks, random_blocks
    from regard.patterns import Neighborhood
    from regard.tasks.vision import Digits, asked_accuracy, digits

    mass: dict[str, list[float]] = {}
    accuracy, task, tests = [], Digits("train"), digits("test").x[: SMALL["tests"]].to(device)
    for seed in seeds:
        model = small_vit(seed, device)
        accuracy.append(asked_accuracy(model, digits("test").to(device)))
        start = distilled(model, lambda g: task.batch(SMALL["batch"], g).to(device), 1, 0, seed, device)
        routes = distilled(model, lambda g: task.batch(SMALL["batch"], g).to(device), SMALL["distil"], 0, seed, device)
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, list[float]] = {}
        for name, q, k in caught(model, tests):
            picked = routes[name](q, k)
            arms = {
                "picked": picked,
                "untaught": start[name](q, k),
                "random": random_blocks(picked, generator),
                "nearest": local_blocks(picked),
                "window": Neighborhood((8, 8), 4),  # 16 keys, a quarter of them
                "oracle": oracle_blocks(q, k, picked),
            }
            for arm, pattern in arms.items():
                found.setdefault(arm, []).append(float(kept_mass(q, k, pattern).mean()))
        for arm, layers in found.items():
            mass.setdefault(arm, []).append(float(np.mean(layers)))
    mean = {arm: float(np.mean(values)) for arm, values in mass.items()}
    local = max(mean["nearest"], mean["window"])
    told = ", ".join(f"{arm} {value:.3f}" for arm, value in mean.items())
    return Finding(
        "mass",
        verdict(mean["picked"] >= mean["random"] + 0.25 and mean["picked"] >= local + 0.05),
        mean["picked"],
        evidence.bootstrap(mass["picked"], seed=seeds[0]) if len(seeds) > 1 else None,
        floor=mean["random"],
        ceiling=mean["oracle"],
        baseline=local,
        reason=f"{len(seeds)} models of {100 * np.mean(accuracy):.0f} % test accuracy; {told}",
        details={"mass": mass, "accuracy": accuracy},
    )


# -- sparse training


def control(route: Any, arm: str, generator: Any) -> Any:
    """A route that keeps as many keys as another: its own, random ones, or those of the largest weight."""
    from regard.kernels.recall import oracle_blocks, random_blocks
    from regard.patterns import Route, Summary

    class Control(Route):
        block, heads, within = (1, 1), "each", None

        def summarize(self, k: Any, *, past: Any = None) -> Any:
            return Summary(k.shape[2], {"k": k})

        def select(self, q: Any, summary: Any, *, within: Any = None, q_start: Any = None) -> Any:
            like = route(q, summary["k"], within=within, q_start=q_start)
            return random_blocks(like, generator) if arm == "random" else oracle_blocks(q, summary["k"], like)

        def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
            return 0

    return route if arm == "picked" else Control()


def _accuracy(name: str, seeds: list[int], device: str) -> list[Finding]:
    import copy

    import torch
    from torch import nn

    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load
    from regard.tasks.vision import Digits, Images, digits, normalised
    from regard.tasks.vit import right
    from regard.train.simple import fit
    from regard.watch.attend_with import attend_with

    loaded = load(name, device=device)
    missed = below_gate(loaded, "accuracy")
    if missed:
        return [Finding(claim, "not measured", reason=missed) for claim in ("accuracy", "chosen")]
    teacher = loaded.model.requires_grad_(False)
    task, epoch = Digits("train"), -(-len(digits("train").x) // FULL["batch"])

    def batches(generator: Any) -> Any:
        images = task.batch(FULL["batch"], generator)
        return Images(normalised(images.x), images.labels).to(device)

    def loss(student: Any, images: Any) -> Any:
        with torch.no_grad():
            told = teacher(images.x, output_hidden_states=True)
        with attend_with(student, routes):
            own = student(images.x, output_hidden_states=True)
        kl = nn.functional.kl_div(
            own.logits.log_softmax(-1), told.logits.log_softmax(-1), reduction="batchmean", log_target=True
        )
        mse = nn.functional.mse_loss(own.hidden_states[-1], told.hidden_states[-1])
        return nn.functional.cross_entropy(own.logits, images.labels) + KL * kl + MSE * mse

    tests = digits("test").to(device)
    dense = right(teacher, tests).double().cpu().numpy()
    accuracy: dict[str, list[Any]] = {}
    for seed in seeds:
        learned = distilled(teacher, batches, FULL["distil"] * epoch, 1, seed, device)
        for arm in ARMS:
            generator = torch.Generator().manual_seed(seed)
            routes: dict[int | str, Any] = {
                layer: control(route.eval(), arm, generator) for layer, route in learned.items()
            }
            student = copy.deepcopy(teacher).requires_grad_(True)
            steps = FULL["sparse"] * epoch
            fit(student, loss, batches, steps, FINE_LR, seed, warmup=steps // 20, decay=steps // 2)
            with attend_with(student, routes):
                accuracy.setdefault(arm, []).append(right(student, tests).double().cpu().numpy())
    points = {arm: 100 * np.stack(rows) for arm, rows in accuracy.items()}  # [seed, image]
    lost, gain = points["picked"] - 100 * dense, points["picked"] - points["random"]
    mean = {arm: float(x.mean()) for arm, x in points.items()} | {"dense": 100 * float(dense.mean())}
    told = f"{len(seeds)} seeds, {FULL['sparse']} epochs: " + ", ".join(f"{arm} {x:.1f}" for arm, x in mean.items())
    return [
        Finding(
            "accuracy",
            verdict(lost.mean() >= -1),
            float(lost.mean()),
            evidence.seeds_and_items(lost, seed=seeds[0]),
            floor=mean["random"] - mean["dense"],
            ceiling=mean["oracle"] - mean["dense"],
            reason=told,
            details={"by_seed": {arm: x.mean(1).tolist() for arm, x in points.items()}},
        ),
        Finding(
            "chosen",
            verdict(gain.mean() >= 3),
            float(gain.mean()),
            evidence.seeds_and_items(cast(Any, gain), seed=seeds[0]),
            floor=0.0,
            ceiling=mean["oracle"] - mean["random"],
            reason=told,
        ),
    ]
