"""Block and grid attention (MaxViT, arXiv 2204.01697): windows of P x P tokens, then a strided grid of G x G.

How far one attention pair and the blocks of a stage reach is exact: the patterns say it. What is trained has one block
(a window and a grid layer) with relative biases, no convolutions, marks with a strong embedding as in the study davit.
At 16 x 16 with P = G = 4, a query of a window, of a grid and of a row or column meets 16 keys: equal operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "maxvit"
MODEL = None
FULL_ONLY = "only the full size trains it"
CLAIMS = [
    Claim(
        "layer",
        "window and grid layers, run as dense batches, equal softmax over the pairs that the formulas allow",
        kind="instrument",
        ours="largest difference, float64, q // P == k // P and q = k mod n / G on both axes, relative biases included",
        holds_if="at most 1e-10",
    ),
    Claim(
        "pair",
        "one window layer and one grid layer see the whole map, in early high-resolution stages too",
        kind="mechanism",
        paper="global receptive field even in earlier, high-resolution stages",
        ours="least mean coverage of one window-grid pair over the stages of a 224 x 224 image (56 to 7 tokens a side)",
        holds_if="1",
    ),
    Claim(
        "stage",
        "the blocks of every stage (2, 2, 5, 2 in MaxViT-T) see the whole map",
        kind="mechanism",
        paper="global receptive field even in earlier, high-resolution stages",
        ours="least mean coverage after all attention of a stage, over the stages of a 224 x 224 image",
        holds_if="1",
    ),
    Claim(
        "same-mark",
        "a grid layer after windows compares what lies in different windows",
        kind="mechanism",
        paper="block attention alone is local (no figure)",
        ours="accuracy of window + grid on two marks in different windows of an 8 x 8 map",
        holds_if="at least 0.95, with window + window at 0.5 +- 0.04",
    ),
    Claim(
        "rivals",
        "window + grid is as good as row + column and as window + shifted window at equal operations",
        kind="mechanism",
        paper="86.5 % ImageNet-1K top-1, ahead of axial and shifted windows of its time",
        ours="points of accuracy, window + grid less the best rival, the worse of two tasks on 16 x 16 maps",
        holds_if="at least -0.5 points in the mean over seeds, on digits and on two marks",
    ),
    Claim(
        "imagenet",
        "MaxViT reaches 86.5 % top-1 on ImageNet-1K",
        kind="replication",
        paper="86.5 %",
        ours="top-1 accuracy of timm's maxvit",
        holds_if="within 0.3 points",
        waits="needs ImageNet's validation images and timm's pretrained weights, which cannot be fetched here",
    ),
]
STAGES = {56: 2, 28: 2, 14: 5, 7: 2}  # tokens a side: blocks, MaxViT-T at 224
SIDE = 7
SEEDS, BATCH, LR, DIM, HEADS, WINDOW = 3, 32, 3e-3, 32, 4, 4
STEPS = {"small": 800, "large": 500}
TEST = 2000
ARMS = {
    "window + window": ("plain", "plain"),
    "window + grid": ("plain", "grid"),
    "row + column": ("row", "column"),
    "window + shifted": ("plain", "shifted"),
}


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the layers, read the reach off the patterns, and in full train the arms."""
    findings = [_layer(), _pair(), _stage()]
    if size == "smoke":
        return findings + [Finding(c, "not measured", reason=FULL_ONLY) for c in ("same-mark", "rivals")]
    seeds = list(range(seed, seed + SEEDS))
    return [*findings, _same_mark(seeds, device), _rivals(seeds, device)]


def _layer() -> Finding:
    """The layers against a dense softmax with the predicates and the bias index written out."""
    import torch

    from regard.layers.grid import Mode, windowed

    worst = 0.0
    modes: tuple[Mode, ...] = ("plain", "grid")
    for mode in modes:
        torch.manual_seed(0)
        layer = windowed(8, 2, (6, 8), 2, mode, rel_bias=True).double()
        assert layer.rel_bias is not None
        torch.nn.init.normal_(layer.rel_bias)
        x = torch.randn(2, 48, 8, dtype=torch.float64)
        place = torch.cartesian_prod(torch.arange(6), torch.arange(8))
        stride = torch.tensor([3, 4])  # n / G
        group, within = (place // 2, place % 2) if mode == "plain" else (place % stride, place // stride)
        allowed = (group[:, None] == group[None]).all(-1)
        offset = (within[:, None] - within[None] + 1).clamp(0, 2)
        with torch.no_grad():
            q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / 2 + layer.rel_bias[:, offset[..., 0], offset[..., 1]]
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            y = layer.proj((weights @ v).transpose(1, 2).flatten(2))
            worst = max(worst, float((y - layer(x)).abs().max()))
    return Finding("layer", verdict(worst <= 1e-10), worst)


def coverage(n: int, side: int, blocks: int, order: tuple[str, str] = ("plain", "grid")) -> float:
    """Mean share of an n x n map that a token sees after so many window-then-grid blocks, from the patterns' reach."""
    from regard.layers.grid import window_grid
    from regard.patterns import Grid
    from regard.patterns.coverage import reach

    # Both axes are alike and a grid allows what both axes allow, so the share of the map is the product of shares.
    layers = [Grid(window_grid((n, n), side, mode).axes[:1], (n,)) for mode in order * blocks]  # type: ignore[arg-type]
    seen = [
        int((lengths[:, 1] - lengths[:, 0]).sum()) for lengths in (reach(layers, len(layers), q, n) for q in range(n))
    ]
    return float(np.mean(seen) / n) ** 2


def _pair() -> Finding:
    shares = {n: coverage(n, SIDE, 1) for n in STAGES}
    told = ", ".join(f"{share:.4f} at {n} x {n}" for n, share in shares.items())
    reason = f"one pair: {told}. Full on an axis of n iff P >= n / G, here n <= {SIDE * SIDE}"
    return Finding(
        "pair",
        verdict(min(shares.values()) == 1),
        min(shares.values()),
        ceiling=1.0,
        reason=reason,
        details={"coverage": {str(n): s for n, s in shares.items()}},
    )


def _stage() -> Finding:
    shares = {n: coverage(n, SIDE, blocks) for n, blocks in STAGES.items()}
    once, twice = (coverage(98, SIDE, blocks) for blocks in (1, 2))
    reason = (
        f"after {', '.join(f'{b} blocks at {n}' for n, b in STAGES.items())}: all full. Depth is not always enough: "
        f"where P divides n / G (a side of 98 tokens) one block sees {once:.4f} and a second adds {twice - once:.4f}"
    )
    windows = {n: coverage(n, SIDE, b, ("plain", "plain")) for n, b in STAGES.items()}
    return Finding(
        "stage",
        verdict(min(shares.values()) == 1),
        min(shares.values()),
        ceiling=1.0,
        baseline=min(windows.values()),
        reason=reason,
        details={"coverage": {str(n): s for n, s in shares.items()}, "side_98": [once, twice]},
    )


def _model(arm: str, side: int, marks: bool) -> Any:
    from regard.layers.axial import AxialAttention
    from regard.layers.grid import windowed
    from regard.models.vit import ViT

    def mixer(kind: Any) -> Any:
        if kind in ("row", "column"):
            return lambda d, h, shape: AxialAttention(d, h, shape, int(kind == "row"), rel_bias=True)
        return lambda d, h, shape: windowed(d, h, shape, WINDOW, kind, rel_bias=True)

    more: dict[str, Any] = {"channels": 4, "embed_std": 3.0, "position_std": 1.0} if marks else {}
    shape, classes = (side, side), 2 if marks else 10
    read_out: Any = "token" if marks else "pooled"
    return ViT(shape, [mixer(k) for k in ARMS[arm]], classes, dim=DIM, heads=HEADS, read_out=read_out, **more)


def accuracy(arm: str, side: int, marks: bool, steps: int, seed: int, device: str) -> float:
    """Train one arm on one task and score it: the same draws for every arm of a seed."""
    import torch

    from regard.tasks.vision import Digits, SameMark, asked_accuracy, asked_loss
    from regard.train.simple import fit

    train: Any = SameMark((side, side), window=WINDOW) if marks else Digits("train", side)
    held = torch.Generator().manual_seed(10**6 + seed)
    test = train.batch(TEST, held) if marks else Digits("test", side).all(held)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _model(arm, side, marks).to(device)
    fit(net, asked_loss, lambda g: train.batch(BATCH, g).to(device), steps, LR, seed)
    return asked_accuracy(net, test.to(device))


def _same_mark(seeds: list[int], device: str) -> Finding:
    steps = STEPS["small"]
    arms = ("window + grid", "window + window")
    scores = {arm: [accuracy(arm, 8, True, steps, s, device) for s in seeds] for arm in arms}
    grid, window = (float(np.mean(scores[arm])) for arm in arms)
    return Finding(
        "same-mark",
        verdict(grid >= 0.95 and abs(window - 0.5) <= 0.04),
        grid,
        evidence.bootstrap(scores["window + grid"]),
        floor=0.5,
        ceiling=1.0,
        baseline=window,
        reason=f"window + window {window:.3f}; one block, {steps} steps, {len(seeds)} seeds",
        details={"scores": scores},
    )


def _rivals(seeds: list[int], device: str) -> Finding:
    steps, rivals = STEPS["large"], ("row + column", "window + shifted")
    arms = ("window + grid", *rivals)
    details: dict[str, Any] = {
        "parameters": {arm: sum(p.numel() for p in _model(arm, 16, False).parameters()) for arm in arms}
    }
    told, ahead = [], {}
    for task, marks in (("digits", False), ("two marks", True)):
        scores = {arm: [accuracy(arm, 16, marks, steps, s, device) for s in seeds] for arm in arms}
        best = max(rivals, key=lambda arm: np.mean(scores[arm]))
        ahead[task] = [100 * x for x in evidence.paired_difference(scores["window + grid"], scores[best])]
        details[task] = scores
        told.append(f"{task}: " + ", ".join(f"{arm} {100 * np.mean(s):.1f}" for arm, s in scores.items()))
    worse = min(ahead, key=lambda task: ahead[task][0])
    mean, low, high = ahead[worse]
    return Finding(
        "rivals",
        verdict(mean >= -0.5),
        mean,
        (low, high),
        baseline=0.0,
        reason=f"% right, {'; '.join(told)}; {steps} steps, {len(seeds)} seeds",
        details=details,
    )
