"""Shifted-window learning (DITO, arXiv 2310.00161): a windowed ViT run twice, the second time with its windows shifted.

`PhaseAverage` averages the two runs. The feature error is what a map's features have beside the part that does not know
the window grid: features less their average over all w^2 phases of the grid (our reading). Positions are learned and
added after the roll, so they move with the windows; the random models that are compared by rolls have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "shifted-window-ovd"
MODEL = None
CLAIMS = [
    Claim(
        "windows",
        "a windowed layer on the rolled map is attention in cyclic windows whose first and last halves are joined",
        kind="instrument",
        ours="largest difference from `Segments(wrap=True)` on both axes, float64, over three shifts",
        holds_if="at most 1e-10",
    ),
    Claim(
        "equivariance",
        "averaging two phases makes features less dependent on where the window grid lies",
        kind="mechanism",
        paper="features less biased by the window pattern (no figure)",
        ours="|f(roll x) - roll f(x)|^2 of two phases over that of the plain model, random weights, rolls of 1 and 3",
        holds_if="at most 0.6 in the mean over models, and exactly 1 for the control with phases 0 and w",
    ),
    Claim(
        "imprint",
        "trained with two phases, features carry less of the window grid, at no loss of accuracy",
        kind="mechanism",
        paper="features less biased by the window pattern (no figure)",
        ours="imprint of the grid on the feature error, two phases over plain",
        holds_if="at most 0.8, with accuracy within 0.3 points of the plain model's, both in the mean over seeds",
    ),
    Claim(
        "lvis",
        "shifted-window learning and detection-oriented pretraining reach 40.4 mask AP_r on LVIS",
        kind="replication",
        paper="40.4 mask AP_r, +6.5 over the best existing approach",
        ours="mask AP_r on LVIS",
        holds_if="within 1 point",
        waits="needs LVIS and the authors' image-text pretraining, which cannot be had here",
    ),
]
SIDE, WINDOW, LAYERS, DIM, HEADS = 16, 4, 4, 32, 4
ROLLS = (1, 3)  # at w / 2 the two phases swap and the error is 0 by construction
MODELS = {"smoke": 4, "full": 10}
IMAGE, PATCH, BATCH, LR, STEPS, SEEDS = 32, 2, 32, 3e-3, 500, 3
WIDE = 46  # a plain model of twice the operations


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the cyclic windows, compare random models, and in full train with and without the second phase."""
    findings = [_windows(), _equivariance(range(seed, seed + MODELS[size]), device)]
    if size == "smoke":
        return [*findings, Finding("imprint", "not measured", reason="only the full size trains it")]
    return [*findings, _imprint(list(range(seed, seed + SEEDS)), device)]


def _windows() -> Finding:
    """Roll, attend in plain windows, roll back, against one layer with joined segments."""
    import torch

    from regard.layers.ensemble import PhaseAverage
    from regard.layers.grid import GridAttention, windowed
    from regard.layers.maps import as_map
    from regard.patterns import Grid, Segments

    worst, n, w = 0.0, 8, 4
    for shift in (1, 2, 3):
        torch.manual_seed(0)
        plain = windowed(8, 2, (n, n), w).double()
        starts = (shift, w - shift)  # of the first whole window: height is rolled by -shift, width by +shift
        axes = tuple(Segments.from_bounds([0, *range(start, n, w), n], wrap=True) for start in starts)
        joined = GridAttention(8, 2, Grid(axes, (n, n))).double()
        joined.load_state_dict(plain.state_dict())
        x = torch.randn(2, 8, n, n, dtype=torch.float64)
        with torch.no_grad():
            worst = max(worst, float((PhaseAverage(as_map(plain), (shift,))(x) - as_map(joined)(x)).abs().max()))
    return Finding("windows", verdict(worst <= 1e-10), worst)


def _random(phases: Any, seed: int, device: str) -> Any:
    """A windowed ViT of random weights on 16 x 16 patches, the same weights whatever the phases.

    Without positions: those are not equivariant at any phase, and would hide what the windows do.
    """
    import torch

    from regard.models.vit import ViT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT((SIDE, SIDE), ["window"] * LAYERS, None, dim=DIM, heads=HEADS, channels=3, window=WINDOW,
                   position_std=0.0, read_out="features", phases=phases).to(device).eval()  # fmt: skip


def roll_error(net: Any, x: Any) -> float:
    """``sum |f(roll x) - roll f(x)|^2 / sum |f(x)|^2``, the mean over the rolls, both axes rolled alike."""
    import torch

    with torch.no_grad():
        f = net(x)
        errors = [(net(torch.roll(x, (r, r), (2, 3))) - torch.roll(f, (r, r), (2, 3))).pow(2).sum() for r in ROLLS]
        return float(sum(errors) / len(ROLLS) / f.pow(2).sum())


def _equivariance(seeds: range, device: str) -> Finding:
    import torch

    ratios, controls = [], []
    for s in seeds:
        x = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(s)).to(device)
        plain, both, control = (
            roll_error(_random(phases, s, device), x) for phases in ((0,), (0, WINDOW // 2), (0, WINDOW))
        )
        ratios.append(both / plain)
        controls.append(control / plain)
    off = max(abs(c - 1) for c in controls)
    figure = float(np.mean(ratios))
    return Finding(
        "equivariance",
        verdict(figure <= 0.6 and off < 1e-4),
        figure,
        evidence.bootstrap(ratios),
        ceiling=0.0,
        baseline=float(np.mean(controls)),
        reason=f"{len(ratios)} models; phases 0 and {WINDOW}: 1 to within {off:.1e}",
        details={"ratios": ratios, "controls": controls},
    )


def _train(phases: Any, dim: int, seed: int, device: str) -> tuple[float, float]:
    """(accuracy, imprint of the window grid on the feature error) after training on digits at random places."""
    import torch

    from regard.measures.imprint import grid_imprint
    from regard.models.vit import ViT
    from regard.tasks.vision import Digits, asked_accuracy, asked_loss
    from regard.train.simple import fit

    train, held = Digits("train", IMAGE), torch.Generator().manual_seed(10**6 + seed)
    test = Digits("test", IMAGE).all(held).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ViT((IMAGE, IMAGE), ["window"] * LAYERS, 10, dim=dim, heads=2, patch=PATCH, window=WINDOW, phases=phases)
        net = net.to(device)
    fit(net, asked_loss, lambda g: train.batch(BATCH, g).to(device), STEPS, LR, seed)
    with torch.no_grad():
        x = test.x[:64]
        mean = torch.zeros_like(net.features(x))
        for a in range(WINDOW):
            for b in range(WINDOW):
                rolled = torch.roll(x, (a * PATCH, b * PATCH), (2, 3))
                mean += torch.roll(net.features(rolled), (-a, -b), (2, 3)) / WINDOW**2
        return asked_accuracy(net, test), grid_imprint((net.features(x) - mean).cpu(), WINDOW)


def _imprint(seeds: list[int], device: str) -> Finding:
    arms: dict[str, tuple[Any, int]] = {
        "plain": ((0,), DIM),
        "two phases": ((0, WINDOW // 2), DIM),
        "wider plain": ((0,), WIDE),
    }
    found = {name: [_train(*arm, s, device) for s in seeds] for name, arm in arms.items()}
    imprint = {name: np.array([f[1] for f in runs]) for name, runs in found.items()}
    right = {name: [f[0] for f in runs] for name, runs in found.items()}
    ratios = imprint["two phases"] / imprint["plain"]
    lost, low, high = (100 * v for v in evidence.paired_difference(right["plain"], right["two phases"]))
    told = ", ".join(f"{n} {100 * np.mean(r):.1f} % right, imprint {imprint[n].mean():.4f}" for n, r in right.items())
    details = {"accuracy": right, "imprint": {n: v.tolist() for n, v in imprint.items()}}
    if np.mean(right["plain"]) < 0.2:
        return Finding("imprint", "not measured", reason=f"not learned: {told}", details=details)
    return Finding(
        "imprint",
        verdict(ratios.mean() <= 0.8 and lost <= 0.3),
        float(ratios.mean()),
        evidence.bootstrap(ratios),
        floor=1.0,
        ceiling=0.0,
        baseline=float((imprint["wider plain"] / imprint["plain"]).mean()),
        reason=f"{told}; lost {lost:.2f} points [{low:.2f}, {high:.2f}]; the baseline is a wider plain model of equal "
        f"operations; {STEPS} steps, {len(seeds)} seeds",
        details=details,
    )
