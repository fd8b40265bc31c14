"""Flux Attention (arXiv 2604.07394): a router in each layer decides, per input, between full and sparse attention.

The small size trains routers against a loss that is written down: retrieval inputs lose 1 if the third of four layers
is sparse, local inputs lose nothing. What is learned is then known: three sparse layers of four on the former, and
which; four on the latter. The full size freezes a decoder that finds keyed values and copies from nearby.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "flux-attention"
MODEL = None
CLAIMS = [
    Claim(
        "feature",
        "the router sees the mean of both ends of the prompt before rotation, and nothing of the answer",
        kind="instrument",
        ours="largest difference from the explicit mean of unrotated queries, after other answers were put in",
        holds_if="at most 1e-5, and over 1e-2 without undoing the rotation (the control)",
    ),
    Claim(
        "gate",
        "a hard gate is attention under the chosen pattern, sample by sample, and routers start at full attention",
        kind="instrument",
        ours="largest difference from attention under each sample's own pattern, float64",
        holds_if="at most 1e-10, and all layers full before training",
    ),
    Claim(
        "targets",
        "multipliers that climb bring each task to its own share of sparse layers",
        kind="mechanism",
        ours="largest distance of a task's share from its target (0.75 retrieval, 1 local), no noise, new inputs",
        holds_if="at most 0.05 in the mean over seeds",
    ),
    Claim(
        "layer",
        "the layer that stays full on retrieval inputs is the one that they need",
        kind="mechanism",
        ours="share of retrieval inputs on which the third layer is full and the other three are sparse",
        holds_if="at least 0.95 in the mean over seeds",
    ),
    Claim(
        "routed",
        "deciding per input is better than the best static choice of as many sparse layers",
        kind="mechanism",
        paper="better quality than static ratios",
        ours="points of accuracy of the routed decoder over the best static plans of its mean sparsity",
        holds_if="at least 5, and at most 2 below dense attention, in the mean over seeds",
    ),
    Claim(
        "speed",
        "up to 2.8 times faster prefill and 2.0 times faster decoding on long contexts",
        kind="replication",
        paper="2.8x prefill, 2.0x decode (Llama-3.1-8B-Instruct and Qwen3)",
        ours="time of dense over routed attention",
        holds_if="at least 2 at prefill",
        waits="needs a GPU, the weights of Llama-3.1-8B-Instruct and its trained routers, which are not here",
    ),
]
LAYERS, NEEDED, RETRIEVAL, LOCAL = 4, 2, 0, 1
TARGETS = (0.75, 1.0)
HEAD_DIM, BATCH, STEPS, SEEDS = 16, 32, 400, {"smoke": 3, "full": 3}
ROUTER_LR, BUDGET_LR = 5e-4, 1e-3
# of the full size: steps of the decoder, steps of the routers, sequences of a test
FULL = {"decoder": 1500, "routers": 1000, "tests": 500, "dim": 64, "heads": 4, "length": 64}
DECODER_LR, WINDOW, LAG = 3e-3, 8, 4


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the router, train it on the written loss; in full, route a frozen decoder."""
    seeds = list(range(seed, seed + SEEDS[size]))
    found = [_feature(seed), _gate(seed), *_written(seeds, device)]
    if size == "smoke":
        return [*found, Finding("routed", "not measured", reason="only the full size trains a decoder")]
    return [*found, _routed(seeds, device)]


# -- the router and its definition


def _feature(seed: int) -> Finding:
    import torch

    from regard.kernels.rotary import inverse_frequencies, rotate
    from regard.layers.layer_router import LayerRouter

    generator, length = torch.Generator().manual_seed(seed), 250
    plain = torch.randn(3, 4, length, HEAD_DIM, generator=generator)
    asked, at = torch.tensor([230, 150, 60]), torch.arange(length)  # ends apart, overlapping, shorter than one end
    frequencies = inverse_frequencies(HEAD_DIM, 10_000.0)
    router = LayerRouter(HEAD_DIM, inv_freq=frequencies)
    turned = rotate(plain, at, frequencies)
    other = torch.where((at < asked[:, None])[:, None, :, None], turned, torch.randn(turned.shape, generator=generator))
    means = []
    for x, n in zip(plain, asked.tolist(), strict=True):
        ends = torch.cat([x[:, : min(100, n)], x[:, max(n - 100, 0) : n]], 1)
        means.append(ends.double().mean((0, 1)))
    want = torch.stack(means)
    worst = float((router.features(other, asked) - want).abs().max())
    router.inv_freq = None
    control = float((router.features(other, asked) - want).abs().max())
    return Finding(
        "feature",
        verdict(worst <= 1e-5 and control > 1e-2),
        worst,
        floor=0.0,
        reason=f"prompts of {asked.tolist()} tokens; {control:.2g} without undoing the rotation",
    )


def _gate(seed: int) -> Finding:
    import torch

    from regard.kernels.attend import attend
    from regard.layers.layer_router import LayerRouter
    from regard.patterns import Causal, Routed, Sinks, Window

    generator = torch.Generator().manual_seed(seed)
    sparse = Sinks(2) | Window(5, 0)
    q, k, v = (torch.randn(6, h, 40, HEAD_DIM, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = LayerRouter(HEAD_DIM, sparse).double()
    full = bool((router(q, k).which == 0).all())
    z = torch.tensor([1.0, 0, 1, 1, 0, 0]).double()
    out = router.mixed(z, q, k, v, within=Causal(), q_start=0)
    chosen = Routed.choose(router.patterns, (1 - z).long()[:, None], q_len=40, kv_len=40, within=Causal(), heads=4)
    pairs: list[tuple[Any, Any]] = [(out, attend(q, k, v, chosen))]
    for b, full_one in enumerate(z.tolist()):
        pattern = Causal() if full_one else Causal() & sparse
        pairs.append((out[b : b + 1], attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern)))
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    reason = "every layer is full before training" if full else "a layer was sparse before training"
    return Finding("gate", verdict(worst <= 1e-10 and full), worst, floor=0.0, reason=reason)


# -- a loss that is written down


def inputs(n: int, kinds: Any, generator: Any, noise: float = 1.0) -> tuple[Any, Any]:
    """Task of each sample and its queries in every layer, ``[n, layers, heads=1, tokens=8, head_dim]``."""
    import torch

    task = torch.randint(len(TARGETS), (n,), generator=generator)
    drawn = torch.randn(n, LAYERS, 1, 8, HEAD_DIM, generator=generator)
    return task, kinds[task][:, :, None, None] + noise * drawn


def train_routers(seed: int, device: str = "cpu") -> tuple[Any, Any, Any]:
    """Routers after training on the written loss, the kinds of queries they saw, and the multipliers."""
    import torch
    from torch import nn

    from regard.layers.layer_router import LayerRouter, temperature
    from regard.train.objectives import BudgetMultiplier

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [LayerRouter(HEAD_DIM) for _ in range(LAYERS)]
    routers = nn.ModuleList(made).to(device)
    kinds = torch.randn(len(TARGETS), LAYERS, HEAD_DIM, generator=generator)
    budget = BudgetMultiplier(TARGETS, generator).to(device)
    optimizer = torch.optim.Adam(
        [{"params": routers.parameters(), "lr": ROUTER_LR}, {"params": budget.parameters(), "lr": BUDGET_LR}]
    )
    for step in range(STEPS):
        task, q = (x.to(device) for x in inputs(BATCH, kinds, generator))
        tau = temperature(step, STEPS)
        gates = [r.sample(r.logits(q[:, i]), tau, generator) for i, r in enumerate(made)]
        sparse = 1 - torch.stack(gates, 1)
        loss = (sparse[:, NEEDED] * (task == RETRIEVAL)).mean() + budget(sparse.mean(1), task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return routers, kinds, budget


def _written(seeds: list[int], device: str) -> list[Finding]:
    import torch

    off, right, shares, grown = [], [], [], []
    for seed in seeds:
        routers, kinds, budget = train_routers(seed, device)
        with torch.no_grad():
            task, q = (x.to(device) for x in inputs(1000, kinds, torch.Generator().manual_seed(10_007 + seed)))
            sparse = torch.stack([r.logits(q[:, i]).argmax(-1) for i, r in enumerate(routers)], 1).double()
        share = [float(sparse[task == t].mean()) for t in range(len(TARGETS))]
        shares.append(share)
        off.append(max(abs(s - t) for s, t in zip(share, TARGETS, strict=True)))
        wanted = torch.ones(LAYERS).double().to(device)
        wanted[NEEDED] = 0
        right.append(float((sparse[task == RETRIEVAL] == wanted).all(1).double().mean()))
        grown.append([round(float(x), 3) for x in (*budget.linear.detach(), *budget.square.detach())])
    means = np.mean(shares, 0)
    several = len(seeds) > 1
    told = f"{len(seeds)} seeds of {STEPS} steps: share of sparse layers {means[0]:.3f} retrieval, {means[1]:.3f} local"
    return [
        Finding(
            "targets",
            verdict(np.mean(off) <= 0.05),
            float(np.mean(off)),
            evidence.bootstrap(off, seed=seeds[0]) if several else None,
            floor=0.0,
            ceiling=0.0,
            baseline=max(TARGETS),  # all layers full, as they start
            reason=told,
            details={"shares": shares, "multipliers": grown},
        ),
        Finding(
            "layer",
            verdict(np.mean(right) >= 0.95),
            float(np.mean(right)),
            evidence.bootstrap(right, seed=seeds[0]) if several else None,
            floor=0.0,
            ceiling=1.0,
            baseline=1 / LAYERS,  # one full layer at random
            reason=f"{len(seeds)} seeds, 1,000 inputs each",
        ),
    ]


# -- a frozen decoder


def mixture(n: int, generator: Any) -> dict[str, Any]:
    """Sequences of both tasks: tokens, which are asked for, task, and how many come before the answer.

    Retrieval: a keyed passkey, of which the last token is asked for. Local: noise that repeats every few tokens, the
    second half of which is asked for.
    """
    import torch

    from regard.tasks.recall import KeyedPasskey

    task = KeyedPasskey(FULL["length"])
    batch = task.batch(n, generator)
    ids, local = batch.input_ids, torch.arange(n) % 2 == 1
    period = torch.randint(task.vocab - task.noise, task.vocab, (n, LAG), generator=generator)
    copied = period.repeat(1, -(-ids.shape[1] // LAG))[:, : ids.shape[1]]
    ids = torch.where(local[:, None], copied, ids)
    half = torch.where(local, ids.shape[1] // 2, ids.shape[1] - 1)
    return {"ids": ids, "asked": torch.arange(ids.shape[1]) >= half[:, None], "task": local.long(), "prompt": half}


def _loss(model: Any, batch: dict[str, Any]) -> Any:
    import torch

    logits, asked = model(batch["ids"][:, :-1]), batch["asked"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:], reduction="none")
    return ((each * asked).sum(1) / asked.sum(1)).mean()


def _right(model: Any, batch: dict[str, Any]) -> Any:
    """Share of the asked tokens of each sequence that are the first choice, [n]."""
    import torch

    with torch.no_grad():
        top = model(batch["ids"][:, :-1]).argmax(-1)
    asked = batch["asked"][:, 1:]
    return (((top == batch["ids"][:, 1:]) & asked).sum(1) / asked.sum(1)).double().cpu().numpy()


def _to(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) for name, x in batch.items()}


def _routed(seeds: list[int], device: str) -> Finding:
    import torch
    from torch import nn

    from regard.layers.layer_router import LayerRouter, temperature
    from regard.models.decoder import Decoder
    from regard.patterns import Sinks, Window
    from regard.steer.layer_gates import LayerGates
    from regard.tasks.recall import KeyedPasskey
    from regard.train.objectives import BudgetMultiplier
    from regard.train.simple import fit
    from regard.watch.attend_with import attend_with

    sparse = Sinks(1) | Window(WINDOW, 0)
    gain, below, told = [], [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Decoder(KeyedPasskey(FULL["length"]).vocab, FULL["dim"], LAYERS, FULL["heads"]).to(device)
            width = FULL["dim"] // FULL["heads"]
            blocks: Any = model.blocks
            made = [LayerRouter(width, sparse, inv_freq=block.attention.position.inv_freq) for block in blocks]
            routers = nn.ModuleList(made).to(device)
        steps = FULL["decoder"]
        fit(
            model, _loss, lambda g: _to(mixture(64, g), device), steps, DECODER_LR, seed,
            warmup=steps // 20, decay=steps // 3,
        )  # fmt: skip
        model.requires_grad_(False)
        names = [f"blocks.{i}.attention" for i in range(LAYERS)]
        table: dict[str, Any] = dict(zip(names, made, strict=True))
        generator = torch.Generator().manual_seed(seed)
        budget = BudgetMultiplier(TARGETS, generator).to(device)
        optimizer = torch.optim.Adam(
            [{"params": routers.parameters(), "lr": ROUTER_LR}, {"params": budget.parameters(), "lr": BUDGET_LR}]
        )
        for step in range(FULL["routers"]):
            batch = _to(mixture(BATCH, generator), device)
            tau = temperature(step, FULL["routers"])
            with LayerGates(model, table, tau=tau, asked=batch["prompt"], generator=generator) as gates:
                loss = _loss(model, batch) + budget(gates.sparse, batch["task"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        test = _to(mixture(FULL["tests"], torch.Generator().manual_seed(10_007 + seed)), device)
        dense = _right(model, test)
        with LayerGates(model, table, tau=None, asked=test["prompt"]) as gates:
            routed = _right(model, test)
        spent = float(gates.sparse.mean()) * LAYERS
        best = {}  # of each number of sparse layers, the best static choice of them: an advantage for the baseline
        for count in {int(np.floor(spent)), int(np.ceil(spent))}:
            scores = []
            for chosen in combinations(names, count):
                with attend_with(model, dict.fromkeys(chosen, sparse)) if chosen else _unchanged():
                    scores.append(_right(model, test).mean())
            best[count] = max(scores)
        low, high = min(best), max(best)
        static = best[low] + (best[high] - best[low]) * (spent - low)
        gain.append(100 * (routed.mean() - static))
        below.append(100 * (dense.mean() - routed.mean()))
        told.append((100 * dense.mean(), 100 * routed.mean(), 100 * static, spent / LAYERS))
    means = np.mean(told, 0)
    if means[0] < 90:
        return Finding(
            "routed", "not measured", reason=f"premise not met: the dense decoder answers {means[0]:.1f} of 100"
        )
    return Finding(
        "routed",
        verdict(np.mean(gain) >= 5 and np.mean(below) <= 2),
        float(np.mean(gain)),
        evidence.bootstrap(gain, seed=seeds[0]) if len(seeds) > 1 else None,
        floor=0.0,
        ceiling=float(means[0] - means[2]),
        baseline=0.0,
        reason=(
            f"{len(seeds)} seeds: dense {means[0]:.1f}, routed {means[1]:.1f}, static {means[2]:.1f} of 100 at a "
            f"share of {means[3]:.2f} sparse layers"
        ),
        details={"by_seed": [[float(x) for x in row] for row in told]},
    )


def _unchanged() -> Any:
    from contextlib import nullcontext

    return nullcontext()
