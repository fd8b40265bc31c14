"""Dual attention (DaViT, arXiv 2204.03645): windows over space, then groups of channels over everything.

Two marks in different windows: no depth of window layers can compare them, one channel layer can. The read-out is per
token and convolutions are off: pooling would compare for the model, and a 3x3 convolution reaches over the borders.
Marks enter the residual stream strong (embedding N(0, 9) without bias, positions N(0, 1)). From an embedding as
PyTorch starts it, 62 equal blank tokens fill the product over positions, the softmax over channels starts saturated,
and the channel arm is still at chance after 900 steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "davit"
MODEL = None
CLAIMS = [
    Claim(
        "channel",
        "the channel attention layer equals its formula, softmax(C_g^-1/2 k^T v) applied to q, one group at a time",
        kind="instrument",
        ours="largest difference, float64, over three shapes",
        holds_if="at most 1e-10",
    ),
    Claim(
        "blind",
        "window layers never leave the window at any depth; a channel layer reaches every token",
        kind="instrument",
        ours="share of token pairs whose derivative has the wrong one of zero and not zero, both arms",
        holds_if="0",
    ),
    Claim(
        "complement",
        "channel groups give windows the global view they lack",
        kind="mechanism",
        paper="the two attentions complement each other (no figure)",
        ours="accuracy of window + channel on two marks in different windows",
        holds_if="at least 0.9, with window + window at 0.5 +- 0.04 and able to compare marks of one window",
    ),
    Claim(
        "digits",
        "windows and channels together beat either alone at equal parameters",
        kind="mechanism",
        paper="ablation of the two attentions on ImageNet (no figure in the abstract)",
        ours="points of accuracy on scikit-learn's digits, dual less the better of windows and channels alone",
        holds_if="at least 0.3 points in the mean over seeds",
    ),
    Claim(
        "imagenet",
        "DaViT-Tiny, Small and Base reach 82.8, 84.2 and 84.6 % top-1 on ImageNet-1K",
        kind="replication",
        paper="82.8 / 84.2 / 84.6 %",
        ours="top-1 accuracy of timm's davit_tiny",
        holds_if="within 0.3 points",
        waits="needs ImageNet's validation images and timm's pretrained davit_tiny, which cannot be fetched here",
    ),
]
STEPS = {"smoke": 250, "full": 1000}
SEEDS = {"smoke": 1, "full": 5}
TEST = 2000
BATCH, LR, DIM, HEADS, WINDOW = 32, 3e-3, 32, 4, 4
ARMS = {"window": ("window", "window"), "dual": ("window", "channel"), "channel": ("channel", "channel")}


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the layer and its reach, train on marks apart and together, then on digits."""
    seeds = list(range(seed, seed + SEEDS[size]))
    findings = [_channel(), _blind(), _complement(STEPS[size], seeds, device)]
    if size == "smoke":
        return [*findings, Finding("digits", "not measured", reason="only the full size trains on digits")]
    return [*findings, _digits(STEPS[size], seeds, device)]


def _channel() -> Finding:
    """The layer against sums over positions, one entry of the channel matrix at a time."""
    import torch

    from regard.layers.channel import ChannelAttention

    worst = 0.0
    for dim, groups, length in ((8, 1, 5), (8, 2, 7), (12, 3, 1)):
        torch.manual_seed(0)
        layer = ChannelAttention(dim, groups).double()
        x = torch.randn(1, length, dim, dtype=torch.float64)
        with torch.no_grad():
            q, k, v = layer.qkv(x)[0].unflatten(-1, (3, groups, -1)).unbind(1)
            y = torch.zeros_like(q)
            for g in range(groups):
                scores = sum(torch.outer(k[n, g], v[n, g]) for n in range(length)) / (dim / groups) ** 0.5
                for n in range(length):
                    y[n, g] = scores.softmax(-1) @ q[n, g]
            worst = max(worst, float((layer.proj(y.flatten(1)) - layer(x)[0]).abs().max()))
    return Finding("channel", verdict(worst <= 1e-10), worst)


def _blind() -> Finding:
    """Whether every token's features depend on every other token's input, against what the patterns say."""
    import torch

    from regard.layers.grid import window_grid

    place = torch.arange(64)
    windows = window_grid((8, 8), WINDOW).allows(place[:, None], place[None])
    wrong = []
    for arm, expected in (("window", windows), ("dual", torch.ones_like(windows))):
        torch.manual_seed(0)
        net = _model(arm, 2, "token").double()
        x, probe = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(DIM, 1, 1, dtype=torch.float64)

        def seen(image: Any, net: Any = net, probe: Any = probe) -> Any:
            return (net.features(image) * probe).sum((0, 1)).flatten()

        found = torch.autograd.functional.jacobian(seen, x)
        wrong.append(float(((found.abs().sum((1, 2)).flatten(1) != 0) != expected).double().mean()))
    return Finding("blind", verdict(max(wrong) == 0), max(wrong), ceiling=0.0)


def _model(arm: str, classes: int, read_out: Any) -> Any:
    from regard.models.vit import ViT

    marks: dict[str, Any] = {"channels": 4, "embed_std": 3.0, "position_std": 1.0} if read_out == "token" else {}
    return ViT((8, 8), ARMS[arm], classes, dim=DIM, heads=HEADS, window=WINDOW, read_out=read_out, **marks)


def accuracy(arm: str, train: Any, test: Any, steps: int, seed: int, device: str, marks: bool) -> float:
    """Train one arm and score it: the same draws for every arm of a seed."""
    import torch

    from regard.tasks.vision import asked_accuracy, asked_loss
    from regard.train.simple import fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _model(arm, 2 if marks else 10, "token" if marks else "pooled").to(device)
    fit(net, asked_loss, lambda g: train.batch(BATCH, g).to(device), steps, LR, seed)
    return asked_accuracy(net, test.to(device))


def _complement(steps: int, seeds: list[int], device: str) -> Finding:
    import torch

    from regard.tasks.vision import SameMark

    apart, together = SameMark(window=WINDOW), SameMark(window=WINDOW, apart=False)
    scores: dict[str, list[float]] = {"dual": [], "window": [], "window, one window": []}
    for s in seeds:
        for name, task in (("dual", apart), ("window", apart), ("window, one window", together)):
            test = task.batch(TEST, torch.Generator().manual_seed(10**6 + s))
            scores[name].append(accuracy(name.split(",")[0], task, test, steps, s, device, marks=True))
    dual, window, able = (float(np.mean(scores[k])) for k in scores)
    told = f"window + window {window:.3f}, the same with both marks in one window {able:.3f}; {steps} steps"
    details = {"scores": scores, "parameters": {a: _parameters(a) for a in ("dual", "window")}}
    if able < 0.9:
        return Finding("complement", "not measured", reason=f"premise not met: {told}", details=details)
    return Finding(
        "complement",
        verdict(dual >= 0.9 and abs(window - 0.5) <= 0.04),
        dual,
        evidence.bootstrap(scores["dual"]) if len(seeds) > 1 else None,
        floor=0.5,
        ceiling=1.0,
        baseline=window,
        reason=told,
        details=details,
    )


def _digits(steps: int, seeds: list[int], device: str) -> Finding:
    from regard.tasks.vision import Digits, digits

    scores = {arm: [accuracy(arm, Digits(), digits("test"), steps, s, device, False) for s in seeds] for arm in ARMS}
    best = max(("window", "channel"), key=lambda arm: np.mean(scores[arm]))
    mean, low, high = (100 * x for x in evidence.paired_difference(scores["dual"], scores[best]))
    told = ", ".join(f"{arm} {100 * np.mean(s):.2f}" for arm, s in scores.items())
    details = {"scores": scores, "parameters": {arm: _parameters(arm, 10) for arm in ARMS}}
    if 100 * np.mean(scores[best]) > 98:
        reason = f"too easy: the baseline is within 2 points of all right ({told})"
        return Finding("digits", "not measured", reason=reason, details=details)
    return Finding(
        "digits",
        verdict(mean >= 0.3),
        mean,
        (low, high),
        floor=10.0 - 100 * float(np.mean(scores[best])),
        ceiling=100.0 - 100 * float(np.mean(scores[best])),
        baseline=0.0,
        reason=f"% of 360 test digits: {told}; {steps} steps, {len(seeds)} seeds",
        details=details,
    )


def _parameters(arm: str, classes: int = 2) -> int:
    return sum(p.numel() for p in _model(arm, classes, "token" if classes == 2 else "pooled").parameters())
