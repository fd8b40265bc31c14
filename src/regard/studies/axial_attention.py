"""Axial attention (arXiv 1912.12180): an image model that keeps the whole raster order and runs most of it once a row.

Images are scikit-learn's digits at 8 levels. The rivals have as many blocks and parameters: `dense` is causal attention
over all pixels in raster order, `row only` an axial decoder without its upper stack.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "axial-attention"
MODEL = None
FULL_ONLY = "only the full size trains it"
CLAIMS = [
    Claim(
        "raster",
        "a pixel's logits depend on exactly the pixels before it in raster order",
        kind="instrument",
        ours="pairs of pixels of a 6 x 6 image whose derivative has the wrong one of zero and not zero",
        holds_if="0 of 1,296",
    ),
    Claim(
        "steps",
        "sampling pixel by pixel gives the numbers of the parallel form",
        kind="instrument",
        ours="largest difference of a logit, float64, 6 x 6",
        holds_if="at most 1e-6",
    ),
    Claim(
        "parallel",
        "most of the context is computed in parallel when decoding",
        kind="mechanism",
        paper="the vast majority of the context in parallel, once a row",
        ours="share of the operations of sampling a 32 x 32 image that run once a row (4 upper, 2 inner blocks)",
        holds_if="above 0.5, with one call of the upper stack a row and one of the inner a pixel",
    ),
    Claim(
        "bits",
        "axial attention models images as well as dense causal attention",
        kind="mechanism",
        paper="state of the art on ImageNet-32 and -64 and BAIR without independence assumptions",
        ours="bits a pixel on held-out digits, axial less dense",
        holds_if="at most 0.05 in the mean over seeds",
    ),
    Claim(
        "context",
        "the upper stack carries what the pixel's own row does not hold",
        kind="mechanism",
        paper="the whole image above is context",
        ours="bits a pixel on held-out digits, axial less row only",
        holds_if="at most -0.05 in the mean over seeds",
    ),
    Claim(
        "imagenet",
        "state of the art in bits a dimension on ImageNet-32 and -64 and on BAIR",
        kind="replication",
        paper="state of the art at the time (no figure in the abstract)",
        ours="bits a dimension",
        holds_if="within 0.02 of the paper's",
        waits="needs ImageNet-32/64 or BAIR and days of accelerators",
    ),
]
LEVELS, SIDE = 8, 8
DIM, HEADS, UPPER, INNER = 32, 2, 2, 2
BATCH, LR, STEPS, SEEDS = 32, 2e-3, 5000, 2


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check dependence and stepping, count operations, and in full train against dense and row-only models."""
    findings = [_raster(), _steps(), _parallel()]
    if size == "smoke":
        return findings + [Finding(c, "not measured", reason=FULL_ONLY) for c in ("bits", "context")]
    return findings + _bits(list(range(seed, seed + SEEDS)), device)


def _decoder(side: int, upper: int = UPPER, inner: int = INNER, seed: int = 0) -> Any:
    import torch

    from regard.models.axial import AxialDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AxialDecoder((side, side), LEVELS, DIM, HEADS, upper, inner)


def _raster() -> Finding:
    """The Jacobian of every pixel's logits in every pixel's embedding: both directions are tested."""
    import torch

    net, n = _decoder(6).double(), 36
    embedded: list[Any] = []

    def keep(_module: Any, _args: Any, out: Any) -> Any:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    hook = net.embed.register_forward_hook(keep)
    logits = net(torch.randint(LEVELS, (1, 1, 6, 6), generator=torch.Generator().manual_seed(0)))
    hook.remove()
    probe = torch.randn(LEVELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(n, n, dtype=torch.bool)
    for i, out in enumerate((logits @ probe).flatten()):
        (grad,) = torch.autograd.grad(out, embedded[0], retain_graph=True)
        found[i] = grad.abs().sum(-1).flatten() != 0
    wrong = int((found != torch.ones(n, n, dtype=torch.bool).tril(-1)).sum())
    return Finding("raster", verdict(wrong == 0), float(wrong), ceiling=0.0, reason=f"{n * n} pairs")


def _steps() -> Finding:
    """An image sampled step by step, and its logits in the parallel form."""
    import torch

    net = _decoder(6).double()
    x = net.sample(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, state, worst = net(x)[:, 0].flatten(1, 2), net.new_state(2), 0.0
        for i in range(36):
            logits = net.step(x.flatten(1)[:, i - 1] if i else None, state)
            worst = max(worst, float((logits - whole[:, i]).abs().max()))
    return Finding("steps", verdict(worst <= 1e-6), worst)


def _parallel() -> Finding:
    """Operations of a sampled 32 x 32 image by stack, beside a dense decoder with a cache and as many blocks."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    upper, inner, side = 4, 2, 32
    small, calls = _decoder(SIDE, upper, inner), {"upper": 0, "inner": 0}
    for name, block in (("upper", small.upper[0]), ("inner", small.inner[0])):
        block.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    small.sample(1, torch.Generator().manual_seed(0))
    net = _decoder(side, upper, inner)
    state, pixel = net.new_state(1), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        with FlopCounterMode(display=False) as stack:
            for i in range(side):
                net.start_row(state, i)
                state.row = [torch.zeros(1, DIM)] * side
        with FlopCounterMode(display=False) as one_row:  # of the inner stack: all rows cost the same
            state = net.new_state(1)
            for j in range(side):
                net.step(pixel if j else None, state)
    rows, pixels = stack.get_total_flops(), side * one_row.get_total_flops()
    share = rows / (rows + pixels)
    # Dense, with a cache: the same matrices for a pixel of every block, scores and mixing over all pixels before it.
    matrices = sum(p.numel() for b in (*net.upper, *net.inner) for p in b.parameters() if p.ndim == 2)
    n = side * side
    dense = n * 2 * (matrices + DIM * LEVELS) + (upper + inner) * 4 * DIM * n * (n + 1) // 2
    reason = (
        f"an {SIDE} x {SIDE} sample called the upper stack {calls['upper']} times (the first row needs none) and the "
        f"inner {calls['inner']}; at {side} x {side} {(rows + pixels) / 1e6:.0f} million operations, dense "
        f"{dense / 1e6:.0f}"
    )
    return Finding(
        "parallel",
        verdict(share > 0.5 and calls["upper"] <= SIDE and calls["inner"] == SIDE * SIDE),
        share,
        floor=0.0,
        ceiling=1.0,
        baseline=0.0,
        reason=reason,
        details={"calls": calls, "operations": {"once a row": rows, "once a pixel": pixels, "dense": dense}},
    )


def dense_decoder(side: int, blocks: int, seed: int) -> Any:
    """Causal attention over all pixels in raster order, shifted right, with the same positions, blocks and head."""
    import torch
    from torch import nn

    from regard.layers.block import Block
    from regard.layers.grid import GridAttention
    from regard.patterns import Causal, Grid

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.start = nn.Embedding(LEVELS, DIM), nn.Parameter(0.02 * torch.randn(DIM))
            self.rows = nn.Parameter(0.02 * torch.randn(side, 1, DIM))
            self.columns = nn.Parameter(0.02 * torch.randn(side, DIM))
            causal = Grid((Causal(),), (side * side,))
            self.blocks = nn.Sequential(*(Block(DIM, GridAttention(DIM, HEADS, causal)) for _ in range(blocks)))
            self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, LEVELS)

        def forward(self, x: Any) -> Any:
            h = self.embed(x.flatten(1))
            right = torch.cat([self.start.expand(len(h), 1, -1), h[:, :-1]], 1)
            y = self.blocks(right + (self.rows + self.columns).flatten(0, 1))
            return self.head(self.norm(y)).view(*x.shape, LEVELS)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Dense()


def nats(net: Any, x: Any) -> Any:
    """Mean negative log-likelihood a pixel."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(net(x).flatten(0, -2), x.flatten())


def _score(net: Any, seed: int, device: str) -> float:
    """Bits a pixel on the test digits after training."""
    import torch

    from regard.tasks.vision import quantised
    from regard.train.simple import fit

    train, test = quantised(LEVELS, "train").to(device), quantised(LEVELS, "test").to(device)
    net = net.to(device)
    decay = STEPS // 5
    fit(net, nats, lambda g: train[torch.randint(len(train), (BATCH,), generator=g)], STEPS, LR, seed, decay=decay)
    with torch.no_grad():
        return float(nats(net, test)) / log(2)


def _bits(seeds: list[int], device: str) -> list[Finding]:

    from regard.tasks.vision import quantised

    arms: dict[str, Any] = {
        "axial": lambda s: _decoder(SIDE, seed=s),
        "dense": lambda s: dense_decoder(SIDE, UPPER + INNER, s),
        "row only": lambda s: _decoder(SIDE, 0, UPPER + INNER, s),
    }
    bits = {name: [_score(make(s), s, device) for s in seeds] for name, make in arms.items()}
    counts = quantised(LEVELS, "train").unique(return_counts=True)[1].double()
    alone = float(-(counts / counts.sum() * (counts / counts.sum()).log2()).sum())
    told = ", ".join(f"{name} {np.mean(b):.4f}" for name, b in bits.items())
    details = {
        "bits": bits,
        "independent": alone,
        "parameters": {name: sum(p.numel() for p in make(0).parameters()) for name, make in arms.items()},
    }
    found = []
    for claim, rival, margin in (("bits", "dense", 0.05), ("context", "row only", -0.05)):
        mean, low, high = evidence.paired_difference(bits["axial"], bits[rival])
        reason = f"bits a pixel: {told}, levels alone {alone:.4f}; {STEPS} steps, {len(seeds)} seeds"
        found.append(
            Finding(
                claim,
                verdict(mean <= margin),
                mean,
                (low, high),
                floor=alone - float(np.mean(bits[rival])),
                baseline=0.0,
                reason=reason,
                details=details,
            )
        )
    return found
