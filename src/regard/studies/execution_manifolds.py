"""Few dimensions of learning (arXiv 2602.10496): the parameters' path, and where the noise of SGD's order lies.

An attention-only decoder learns the sum of marked values modulo C. The path is that of a layer's four projections at
evenly spaced steps; its dimension is the number of principal components that hold 95% of the variance. Any smooth path
and any random walk is low-dimensional too, so the dimension counts only below both of these nulls. Commutators are
differences of two plain SGD steps in both orders, in float64, from the weights the path passes through.

At the smoke size nothing is learned: one layer without an MLP reads a sum of what each value gives, and no such sum has
its largest entry at a + b modulo C for all a and b. Its findings are of the path of training alone, and say so; what
features of an autoencoder hold is judged at full size. Its constants are those of `attention_saes`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "execution-manifolds"
MODEL = None
CLAIMS = [
    Claim(
        "commutator",
        "the difference of two orders is lr^2 (H_b g_a - H_a g_b)",
        kind="instrument",
        ours="relative difference at lr 1e-5, products with the Hessian by double backward",
        holds_if="at most 1e-3",
    ),
    Claim(
        "dimension",
        "training moves a layer in few directions",
        kind="mechanism",
        paper="3 to 4",
        ours="components that hold 95% of the variance of the path; the baseline is the smaller one of the two nulls",
        holds_if="at most 4, and fewer than a random walk and a smooth curve of the same length have",
    ),
    Claim(
        "inside",
        "early in training the order of two batches matters more along the path than elsewhere",
        kind="mechanism",
        paper="up to 10 times the random baseline early",
        ours="share of a commutator's energy in the path's subspace, over that in random ones of equal dimension, in "
        "the first fifth of training",
        holds_if="at least 5",
    ),
    Claim(
        "outside",
        "most of what does not commute lies outside of the path's directions",
        kind="mechanism",
        paper="over 92%",
        ours="share of the energy outside, all of training",
        holds_if="above 0.92",
    ),
    Claim(
        "routing",
        "sparse features tell which tokens are marked",
        kind="mechanism",
        paper="autoencoders capture auxiliary routing structure",
        ours="AUC of the strongest of ten features for the rows of marked values, in the layer whose heads the sum "
        "needs most; features are chosen on other sequences, as is the baseline, the best of as many random directions",
        holds_if="at least 0.95",
    ),
    Claim(
        "execution",
        "no few sparse features hold the sum",
        kind="mechanism",
        paper="autoencoders fail to isolate execution",
        ours="accuracy lost without the ten features that tell marked rows best, over what is lost with the layer's "
        "heads at their mean; the baseline is the same of ten random active features",
        holds_if="at most 0.5",
    ),
]
# (layers, dim, heads, steps), marked values, seeds.
SHAPE = {"smoke": (1, 32, 4, 300), "full": (2, 128, 4, 3000)}
MARKERS = {"smoke": (2,), "full": (2, 4)}
SEEDS = 3
MODULUS, BATCH, LR, POINTS = 5, 64, 3e-3, 60
ORDER_LR, PAIRS, RANDOM, EARLY = 1e-3, 2, 5, 0.2
SHARE = 0.95
LEARNED = 0.9  # accuracy below which the findings say that they are of a model which has not learned the sum
PART = "blocks.{}.attention.*_proj.weight"
FEATURES, LAMBDA, SAE_STEPS, TAKEN, SEQUENCES = 512, 3.0, 4000, 10, (320, 500)


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Train every seed, then judge path and commutators of every layer."""
    layers, dim, heads, steps = SHAPE[size]
    runs = [
        trained(markers, layers, dim, heads, steps, s, device)
        for markers in MARKERS[size]
        for s in range(seed, seed + SEEDS)
    ]
    judged = [judge(r, layer, seed) for r in runs for layer in range(layers)]
    reached = ", ".join(f"{r['accuracy']:.2f}" for r in runs)
    learned = np.mean([r["accuracy"] for r in runs]) >= LEARNED
    what = ", ".join(f"m = {m}" for m in MARKERS[size])
    told = (
        f"{what}, {layers} layer{'s' * (layers > 1)}, dim {dim}, {steps} steps, {SEEDS} seeds; accuracy on new "
        f"sequences {reached}, chance {1 / MODULUS:.2f}{'' if learned else ': THE SUM IS NOT LEARNED'}"
    )
    found = [_commutator(runs[0]), _dimension(judged, told), _inside(judged, told), _outside(judged, told)]
    able = [r for r in runs if r["accuracy"] >= LEARNED]
    if size == "smoke" or not able:
        reason = "needs a model that has learned the sum, of size full" if size == "smoke" else told
        return found + unmeasured(CLAIMS[-2:], reason)
    coded = [features(r, device) for r in able]
    told = f"the {len(able)} of {len(runs)} runs that learned the sum; {told}"
    return [*found, _routing(coded, told), _execution(coded, told)]


def trained(markers: int, layers: int, dim: int, heads: int, steps: int, seed: int, device: str) -> dict[str, Any]:
    """One training: weights at `POINTS` evenly spaced steps, the network, its loss, batches and final accuracy.

    `noted`: at some of the points, the entropy of marker rows and the question's mass on marked values, in layer 0.
    """
    import torch
    from torch import nn

    from regard.models.attention_only import AttentionOnly
    from regard.tasks.modular import ModMarker
    from regard.train.diagnostics import weights
    from regard.train.simple import fit

    task = ModMarker(MODULUS, markers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AttentionOnly(task.vocab, dim, layers, heads).to(device)

    def loss(module: Any, batch: Any) -> Any:
        ids = batch.input_ids.to(device)
        return nn.functional.cross_entropy(module(ids[:, :-1])[:, -1], ids[:, -1])

    test = task.batch(1000, torch.Generator().manual_seed(7919 * (seed + 1)))
    points: list[Any] = []
    noted: dict[int, tuple[float, float]] = {}
    every = steps // POINTS

    def note(step: int, _: Any) -> None:
        if step % every == 0:
            points.append(weights(network))
            if len(points) % 5 == 1:
                noted[len(points) - 1] = looks(network, test[:64], device)

    fit(network, loss, lambda g: task.batch(BATCH, g), steps, LR, seed, on_step=note)
    with torch.no_grad():
        right = network(test.input_ids[:, :-1].to(device))[:, -1].argmax(-1).cpu() == test.input_ids[:, -1]
    return {"network": network, "loss": loss, "task": task, "points": points, "noted": noted, "seed": seed,
            "accuracy": float(right.double().mean())}  # fmt: skip


def looks(network: Any, batch: Any, device: str) -> tuple[float, float]:
    """Entropy of marker rows in nats and the question's mass on marked values, means over the heads of layer 0."""
    import torch

    from regard.watch.recorder import watch
    from regard.watch.settings import Watch

    ids, marked = batch.input_ids[:, :-1].to(device), {k: v[:, :-1].to(device) for k, v in batch.groups.items()}
    asked = torch.zeros_like(marked["values"])
    asked[:, -1] = True
    training = network.training
    network.eval()
    with torch.no_grad(), watch(network, statistics=Watch(("entropy",), rows=marked["markers"], tokens=False)) as near:
        network(ids)
    how = Watch(("group",), rows=asked, groups={"values": marked["values"]}, tokens=False)
    with torch.no_grad(), watch(network, statistics=how) as far:
        network(ids)
    network.train(training)
    entropy = (near.atlas.need("entropy") / near.atlas.need("rows")).isel(layer=0).mean()
    mass = far.atlas.need("group").sel(q_group="all", k_group="values") / far.atlas.need("rows")
    return float(entropy), float(mass.isel(layer=0).mean())


def judge(made: dict[str, Any], layer: int, seed: int) -> dict[str, Any]:
    """One layer of one training: dimensions of the path and its nulls, shares of the commutators."""
    import torch

    from regard.train.diagnostics import commutator, curve_like, flat, trajectory_pca, walk_like

    part = PART.format(layer)
    points = torch.stack([flat(p, part) for p in made["points"]])
    path = trajectory_pca(points)
    generator = torch.Generator().manual_seed(seed * 1009 + made["seed"])
    nulls = {"walk": walk_like(points.cpu(), generator), "curve": curve_like(points.cpu(), generator)}
    basis = path.basis(SHARE).cpu()
    shape = (basis.shape[1], len(basis))
    random = [torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q.T for _ in range(RANDOM)]
    double = copy.deepcopy(made["network"]).double()
    early = round(EARLY * len(points))
    chosen = [*range(early), *range(early, len(points), 10)]
    inside, chance = [], []
    for at in chosen:
        double.load_state_dict({k: v.double() for k, v in made["points"][at].items()})
        deltas = []
        for _ in range(PAIRS):
            a, b = (made["task"].batch(BATCH, generator) for _ in range(2))
            found = commutator(double, made["loss"], a, b, ORDER_LR, part)
            deltas.append(found.delta.cpu())
            inside_one = float((basis @ deltas[-1]).square().sum() / deltas[-1].square().sum())
            inside.append(inside_one)
        chance += [np.mean([float((r @ d).square().sum() / d.square().sum()) for r in random]) for d in deltas]
    begin = PAIRS * early
    leading = path.coordinates[list(made["noted"]), 0].cpu().numpy()
    entropy = np.array([x for x, _ in made["noted"].values()])
    return {
        "dimension": path.dimension(SHARE),
        "nulls": {name: trajectory_pca(x).dimension(SHARE) for name, x in nulls.items()},
        "first": float(path.shares[0]),
        "inside": inside,
        "early": float(np.mean(inside[:begin]) / np.mean(chance[:begin])),
        "whole": float(np.mean(inside) / np.mean(chance)),
        "chance": len(basis) / basis.shape[1],
        "noted": [made["noted"][k] for k in made["noted"]],
        "bubble": abs(evidence.spearman(leading, entropy)),
        "seed": made["seed"],
    }


def _commutator(made: dict[str, Any]) -> Finding:
    import torch

    from regard.train.diagnostics import commutator

    double, lr = copy.deepcopy(made["network"]).double(), 1e-5
    double.load_state_dict({k: v.double() for k, v in made["points"][0].items()})
    for block in double.blocks:
        block.attention.backend = "reference"  # the fused kernel has no second derivative
    generator = torch.Generator().manual_seed(3)
    a, b = (made["task"].batch(BATCH, generator) for _ in range(2))
    found = commutator(double, made["loss"], a, b, lr).delta
    parameters = list(double.parameters())

    def gradient(batch: Any) -> list[Any]:
        return list(torch.autograd.grad(made["loss"](double, batch), parameters, create_graph=True))

    g_a, g_b = gradient(a), gradient(b)

    def hessian(of: list[Any], vector: list[Any]) -> Any:
        total = sum((g * v.detach()).sum() for g, v in zip(of, vector, strict=True))
        return torch.cat([x.flatten() for x in torch.autograd.grad(total, parameters, retain_graph=True)])

    exact = lr**2 * (hessian(g_b, g_a) - hessian(g_a, g_b))
    gap = float((found - exact).norm() / exact.norm())
    reason = f"{len(exact)} parameters, at the path's first point"
    return Finding("commutator", verdict(gap <= 1e-3), gap, floor=0.0, reason=reason)


def over_seeds(judged: list[dict[str, Any]], value: Any) -> tuple[float, tuple[float, float]]:
    """Mean over runs and layers, and its interval over seeds."""
    by_seed = [np.mean([value(j) for j in judged if j["seed"] == s]) for s in sorted({j["seed"] for j in judged})]
    return float(np.mean(by_seed)), evidence.bootstrap(by_seed)


def _dimension(judged: list[dict[str, Any]], told: str) -> Finding:
    figure, interval = over_seeds(judged, lambda j: j["dimension"])
    nulls = {name: float(np.mean([j["nulls"][name] for j in judged])) for name in judged[0]["nulls"]}
    each = "/".join(str(j["dimension"]) for j in judged)
    first = float(np.mean([j["first"] for j in judged]))
    bubble = float(np.mean([j["bubble"] for j in judged]))
    reason = (
        f"{told}; {each}, of at most {POINTS - 1}; a random walk has {nulls['walk']:.1f}, a smooth curve of three "
        f"waves {nulls['curve']:.1f}; the first component holds {first:.0%} (of a walk 61%); marker rows' entropy goes "
        f"with the leading coordinate, rank correlation {bubble:.2f} in size"
    )
    holds = figure <= 4 and all(j["dimension"] < min(j["nulls"].values()) for j in judged)
    details = {
        "by_run": [{k: j[k] for k in ("seed", "dimension", "nulls", "first", "bubble", "noted")} for j in judged]
    }
    return Finding(
        "dimension", verdict(holds), figure, interval, baseline=min(nulls.values()), reason=reason, details=details
    )


def _inside(judged: list[dict[str, Any]], told: str) -> Finding:
    figure, interval = over_seeds(judged, lambda j: j["early"])
    whole, _ = over_seeds(judged, lambda j: j["whole"])
    share = float(np.mean([np.mean(j["inside"]) for j in judged]))
    chance = float(np.mean([j["chance"] for j in judged]))
    reason = f"{told}; all of training {whole:.1f} times: {share:.4f} of the energy, expected at random {chance:.4f}"
    return Finding("inside", verdict(figure >= 5), figure, interval, floor=1.0, ceiling=1 / chance, reason=reason)


def _outside(judged: list[dict[str, Any]], told: str) -> Finding:
    figure, interval = over_seeds(judged, lambda j: 1 - np.mean(j["inside"]))
    chance = float(np.mean([1 - j["chance"] for j in judged]))
    least = min(1 - max(j["inside"]) for j in judged)
    reason = f"{told}; least of any commutator {least:.3f}; of a random direction it is {chance:.4f}"
    return Finding("outside", verdict(figure > 0.92), figure, interval, 0.0, 1.0, chance, reason)


def features(made: dict[str, Any], device: str) -> dict[str, Any]:
    """An autoencoder of the layer that the sum needs most: what its features tell, and what is lost without some."""
    import torch

    from regard.train.sae import SAE, train_sae
    from regard.watch.anatomy import anatomy
    from regard.watch.intervene import Edit, Site, intervene, trace

    network, seed = made["network"].eval(), made["seed"]
    generator = torch.Generator().manual_seed(104729 * (seed + 1))
    training, test = (made["task"].batch(n, generator) for n in SEQUENCES)
    shown = [{"ids": b.input_ids[:, :-1].to(device)} for b in (training, test)]
    parts = anatomy(network, {"ids": shown[0]["ids"][:2]})
    sites = [Site(layer, "z") for layer in range(len(parts))]
    before, now = (trace(network, x, sites, anatomy=parts) for x in shown)

    def accuracy(site: Any, z: Any) -> float:
        with torch.no_grad(), intervene(network, Edit(site, "set", value=z), anatomy=parts):
            right = network(**shown[1])[:, -1].argmax(-1).cpu() == test.input_ids[:, -1]
        return float(right.double().mean())

    means = {s: accuracy(s, before[s].mean((0, 2), keepdim=True).expand_as(now[s])) for s in sites}
    site = min(sites, key=lambda s: means[s])
    whole = accuracy(site, now[site])
    heads = now[site].shape[1]
    known, z = rows = [x[site].transpose(1, 2).flatten(2) for x in (before, now)]
    sae = train_sae(known.flatten(0, 1), FEATURES, LAMBDA, steps=SAE_STEPS, seed=seed)
    marked = [b.groups["values"][:, :-1].flatten().numpy() for b in (training, test)]
    random = SAE(z.shape[-1], FEATURES, generator).to(device)
    with torch.no_grad():
        coded, drawn = ([f(x).flatten(0, 1).double().cpu().numpy() for x in rows] for f in (sae.encode, random.before))
    best = np.argsort(-_aucs(coded[0], marked[0]))[:TAKEN]
    direction = int(np.argmax(_aucs(drawn[0], marked[0])))

    def without(chosen: Any) -> float:
        left = sae.without(z, torch.tensor([int(n) for n in chosen], device=device))
        return accuracy(site, left.unflatten(-1, (heads, -1)).transpose(1, 2))

    others = [n for n in np.flatnonzero((coded[1] > 0).any(0)).tolist() if n not in best]
    sets = evidence.random_equal(others, TAKEN, seed=seed)
    lost = whole - means[site]
    return {
        "seed": seed, "layer": site.layer, "l0": sae.l0(z), "accuracy": whole, "mean": means[site],
        "auc": evidence.auc(coded[1][:, best].max(1), marked[1]),
        "random_auc": evidence.auc(drawn[1][:, direction], marked[1]),
        "lost": (whole - without(best)) / lost,
        "random_lost": float(np.mean([(whole - without(d)) / lost for d in sets])),
    }  # fmt: skip


def _aucs(columns: Any, positive: Any) -> Any:
    return np.array([evidence.auc(x, positive) for x in columns.T])


def _routing(coded: list[dict[str, Any]], told: str) -> Finding:
    figure, interval = over_seeds(coded, lambda c: c["auc"])
    random, _ = over_seeds(coded, lambda c: c["random_auc"])
    layers, active = "/".join(str(c["layer"]) for c in coded), np.mean([c["l0"] for c in coded])
    reason = f"{told}; layers {layers}, {active:.1f} active features a row"
    return Finding("routing", verdict(figure >= 0.95), figure, interval, 0.5, 1.0, random, reason, {"by_run": coded})


def _execution(coded: list[dict[str, Any]], told: str) -> Finding:
    figure, interval = over_seeds(coded, lambda c: c["lost"])
    random, _ = over_seeds(coded, lambda c: c["random_lost"])
    whole, mean = (np.mean([c[name] for c in coded]) for name in ("accuracy", "mean"))
    each = ", ".join(f"{c['lost']:.2f}" for c in coded)
    reason = f"{told}; heads at their mean take accuracy from {whole:.2f} to {mean:.2f}; single runs {each}"
    return Finding("execution", verdict(figure <= 0.5), figure, interval, 0.0, 1.0, random, reason)
