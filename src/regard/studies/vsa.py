"""Varied-size window attention (VSA, arXiv 2204.08446): each window and head predicts where its keys are read.

The layer starts as window attention and is a window attention moved aside when told to be; whether it learns to move is
asked of windows that point at each other: fixed windows can answer no more than their own class and chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "vsa"
MODEL = None
CLAIMS = [
    Claim(
        "start",
        "with scales and offsets of zero, as it starts, the layer is window attention",
        kind="instrument",
        ours="largest difference from windowed attention with the same weights and relative bias, float32",
        holds_if="at most 1e-5, and over 1e-2 once scales and offsets are drawn (the control)",
    ),
    Claim(
        "moved",
        "an offset of one window to the right reads the next window",
        kind="instrument",
        ours="largest difference from window i attending to window i + 1, interior windows, float32",
        holds_if="at most 1e-5, and over 1e-2 against window i itself (the control)",
    ),
    Claim(
        "learns",
        "scales and offsets learn from where they start",
        kind="instrument",
        ours="smallest norm of the gradients of the four tensors that predict them",
        holds_if="finite and above 0",
    ),
    Claim(
        "pointer",
        "windows learn to read where their tokens tell them to, which fixed windows cannot",
        kind="mechanism",
        paper="learned windows capture long-range dependencies (no figure)",
        ours="points of accuracy on windows that point at each other, over fixed windows (offsets and scales frozen)",
        holds_if="at least 20 points over fixed windows and at most 5 below dense attention, in the mean over seeds",
    ),
    Claim(
        "imagenet",
        "Swin-T with varied-size windows gains 1.1 points of ImageNet-1K accuracy",
        kind="replication",
        paper="+1.1 % top-1",
        ours="top-1 accuracy over Swin-T",
        holds_if="within 0.3 points of the gain",
        waits="needs ImageNet's images and days of training, or the authors' weights, which cannot be fetched here",
    ),
    Claim(
        "resolution",
        "the gain over fixed windows grows with the size of the images",
        kind="replication",
        paper="gains grow when trained and tested on larger images (no figure in the abstract)",
        ours="gain at 224, 384 and 480 pixels",
        holds_if="it grows from each to the next",
        waits="needs ImageNet's images and models trained at each size, which cannot be had here",
    ),
]
DIM, HEADS, WINDOW, SIDE = 32, 4, 4, 16
LAYERS, BATCH, LR, STEPS, SEEDS, TEST = 2, 32, 3e-3, 1500, 3, 200
ARMS = ("varied", "frozen", "dense")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the layer; in full, train it on windows that point at each other, beside fixed and dense ones."""
    findings = [_start(seed), _moved(seed), _learns(seed)]
    if size == "smoke":
        return [*findings, Finding("pointer", "not measured", reason="only the full size trains it")]
    return [*findings, _pointer(list(range(seed, seed + SEEDS)), device)]


def _layer(seed: int, drawn: bool = False) -> Any:
    """A layer with a relative bias that is not zero; scales and offsets zero, or drawn."""
    import torch

    from regard.layers.varied_window import VariedWindowAttention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = VariedWindowAttention(DIM, HEADS, (SIDE, SIDE), WINDOW, position_kernel=None)
        for name, p in layer.named_parameters():
            if name == "rel_bias" or (drawn and name.split(".")[0] in ("scale", "offset")):
                torch.nn.init.normal_(p)
    return layer


def _tokens(seed: int) -> Any:
    import torch

    return torch.randn(2, SIDE * SIDE, DIM, generator=torch.Generator().manual_seed(seed))


def _start(seed: int) -> Finding:
    import torch

    from regard.layers.grid import windowed

    x, off = _tokens(seed), []
    for drawn in (False, True):
        layer = _layer(seed, drawn)
        fixed = windowed(DIM, HEADS, (SIDE, SIDE), WINDOW, rel_bias=True)
        fixed.load_state_dict(layer.state_dict(), strict=False)
        with torch.no_grad():
            off.append(float((layer(x) - fixed(x)).abs().max()))
    reason = f"with scales and offsets drawn from N(0, 1) it is {off[1]:.2g} off"
    return Finding("start", verdict(off[0] <= 1e-5 and off[1] > 1e-2), off[0], ceiling=0.0, floor=off[1], reason=reason)


def _moved(seed: int) -> Finding:
    """The windows of a row attend to the next one; the last window of a row has none and is left out."""
    import torch

    layer, x = _layer(seed), _tokens(seed)
    n = SIDE // WINDOW

    def windows(t: Any) -> Any:  # [batch, heads, tokens, d] to [batch, rows, columns, heads, slots, d]
        cut = t.unflatten(2, (n, WINDOW, n, WINDOW)).permute(0, 2, 4, 1, 3, 5, 6)
        return cut.flatten(4, 5)

    with torch.no_grad():
        layer.offset.bias[0::2] = 2 * SIDE / (SIDE - 1)
        q, k, v = (windows(t) for t in layer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))
        at = torch.arange(WINDOW**2)
        row, column = (c[:, None] - c + WINDOW - 1 for c in (at // WINDOW, at % WINDOW))
        bias = layer.rel_bias[:, row, column]
        found = layer(x).unflatten(1, (n, WINDOW, n, WINDOW)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        off = []
        for keys in (slice(1, None), slice(None, -1)):
            z = torch.nn.functional.scaled_dot_product_attention(q[:, :, :-1], k[:, :, keys], v[:, :, keys], bias)
            expected = layer.proj(z.transpose(3, 4).flatten(4))
            off.append(float((found[:, :, :-1] - expected).abs().max()))
    reason = f"{off[1]:.2g} from attention of the windows to themselves"
    return Finding("moved", verdict(off[0] <= 1e-5 and off[1] > 1e-2), off[0], ceiling=0.0, floor=off[1], reason=reason)


def _learns(seed: int) -> Finding:
    layer = _layer(seed)
    layer(_tokens(seed)).square().sum().backward()
    named = {n: p for n, p in layer.named_parameters() if n.split(".")[0] in ("scale", "offset")}
    norms = {n: float(p.grad.norm()) for n, p in named.items()}
    figure = min(norms.values())
    return Finding("learns", verdict(np.isfinite(list(norms.values())).all() and figure > 0), figure, floor=0.0,
                   reason=", ".join(f"{n} {g:.3g}" for n, g in norms.items()))  # fmt: skip


def _model(arm: str, task: Any, seed: int) -> Any:
    import torch

    from regard.layers.varied_window import VariedWindowAttention
    from regard.models.vit import ViT

    def varied(dim: int, heads: int, shape: tuple[int, int]) -> Any:
        layer = VariedWindowAttention(dim, heads, shape, task.window, position_kernel=None)
        for p in (*layer.scale.parameters(), *layer.offset.parameters()):
            p.requires_grad_(arm == "varied")
        return layer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(
            task.shape, ["full" if arm == "dense" else varied] * LAYERS, task.classes, dim=DIM, heads=HEADS,
            channels=task.channels, read_out="token",
        )  # fmt: skip


def _pointer(seeds: list[int], device: str) -> Finding:
    import torch

    from regard.tasks.pointer import WindowPointer
    from regard.tasks.vision import asked_accuracy, asked_loss
    from regard.train.simple import fit

    task = WindowPointer((SIDE, SIDE), WINDOW)
    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for s in seeds:
        test = task.batch(TEST, torch.Generator().manual_seed(10**6 + s)).to(device)
        for arm in ARMS:
            net = _model(arm, task, s).to(device)
            fit(net, asked_loss, lambda g: task.batch(BATCH, g).to(device), STEPS, LR, s)
            scores[arm].append(100 * asked_accuracy(net, test))
    mean = {arm: float(np.mean(s)) for arm, s in scores.items()}
    gain, low, high = evidence.paired_difference(scores["varied"], scores["frozen"])
    told = ", ".join(f"{arm} {m:.1f} %" for arm, m in mean.items())
    details = {"scores": scores, "steps": STEPS, "blind": 100 * task.blind}
    told = f"{told}; {100 * task.blind:.1f} % is the most without leaving the window; {STEPS} steps, {len(seeds)} seeds"
    if mean["dense"] < 100 * task.blind + 20:
        return Finding("pointer", "not measured", reason=f"premise not met, dense attention: {told}", details=details)
    return Finding(
        "pointer",
        verdict(gain >= 20 and mean["varied"] >= mean["dense"] - 5),
        gain,
        (low, high),
        floor=0.0,
        ceiling=100 - mean["frozen"],
        baseline=mean["dense"] - mean["frozen"],
        reason=told,
        details=details,
    )
