"""Bi-level routing attention (BiFormer, arXiv 2303.08810): regions pick regions by the means of their queries and keys.

Patches of one identity lie far apart on a map of noise. The route has to find the regions of the other patch, which no
window holds; it is set beside as many random regions, the nearest regions and the best there are. The nearest are the
better of two kinds: by distance on the map, and by distance in the order of the regions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "biformer"
MODEL = None
CLAIMS = [
    Claim(
        "layer",
        "the layer equals attention under a mask made from the region means, with the depthwise convolution of v added",
        kind="instrument",
        ours="largest difference, float64, over three shapes of which two need padding",
        holds_if="at most 1e-10",
    ),
    Claim(
        "routing",
        "region-to-region routing finds the regions that matter, which the nearest ones are not",
        kind="mechanism",
        paper="top-k routed regions (no figure of mass)",
        ours="mass that patch queries keep with 8 of 64 regions, 4 identities in 2 patches each",
        holds_if="at least 0.15 over the nearest regions and at least 0.9 of the best regions",
    ),
    Claim(
        "marks",
        "routing connects what windows of the same number of keys cannot, and loses little to dense attention",
        kind="mechanism",
        ours="points of accuracy over window attention on two marks in different windows of a 32 x 32 map",
        holds_if="at least 20 points over windows and at most 3 below dense attention, in the mean over seeds",
    ),
    Claim(
        "imagenet",
        "BiFormer-T, S and B reach 81.4, 83.8 and 84.3 % top-1 on ImageNet-1K",
        kind="replication",
        paper="81.4 / 83.8 / 84.3 %",
        ours="top-1 accuracy",
        holds_if="within 0.3 points",
        waits="needs ImageNet's images and the authors' weights, which cannot be fetched here",
    ),
    Claim(
        "swin",
        "the layout of Swin-T with this attention in place of its own reaches 82.7 % top-1",
        kind="replication",
        paper="82.7 %",
        ours="top-1 accuracy",
        holds_if="within 0.3 points",
        waits="needs ImageNet's images and days of training, which cannot be had here",
    ),
]
# The map: its side, the side of a region; channels, identities, side of a patch, how far the two of one are apart.
SIDE, TILE, CHANNELS, IDENTITIES, PATCH, APART = 32, 4, 32, 4, 6, 16
BACKGROUND, NOISE, AMP = 0.2, 0.5, 3.0
DRAWS = {"smoke": 6, "full": 40}
PICKED = (8, 1)
ARMS = ("route", "random", "nearest in order", "nearest on the map", "best")
MARKS, WINDOW, TOPK = 32, 8, 4  # 4 regions of 4 x 4 tokens: as many keys as a window has
DIM, HEADS, BATCH, LR, STEPS, SEEDS, TEST = 32, 4, 32, 3e-3, 1000, 3, 1000


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Check the layer, judge the route; in full, train on marks that are apart."""
    findings = [_layer(), _routing(DRAWS[size], seed)]
    if size == "smoke":
        return [*findings, Finding("marks", "not measured", reason="only the full size trains it")]
    return [*findings, _marks(list(range(seed, seed + SEEDS)), device)]


def _layer() -> Finding:
    worst = max(explicit(*case) for case in (((8, 8), 4, 3), ((7, 9), 3, 2), ((5, 6), 4, 4)))
    return Finding("layer", verdict(worst <= 1e-10), worst, ceiling=0.0)


def explicit(shape: tuple[int, int], regions: int, topk: int) -> float:
    """Largest difference of the layer from masked attention, the mask made of region means by hand."""
    import torch
    from torch.nn import functional as F

    from regard.layers.biformer import BiLevelAttention

    dim, heads, length = 8, 2, shape[0] * shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(length)
        layer = BiLevelAttention(dim, heads, shape, regions, topk).double()
        x = torch.randn(2, length, dim, dtype=torch.float64)
    height, width = (-(-n // regions) for n in shape)
    row, column = torch.arange(length) // shape[1], torch.arange(length) % shape[1]
    region = row // height * 100 + column // width
    names = region.unique()
    member = (region == names[:, None]).double()
    with torch.no_grad():
        q, k, v = layer.qkv(x).chunk(3, -1)
        means = [member @ t / member.sum(1, keepdim=True) for t in (q, k)]
        picked = (means[0] @ means[1].mT).topk(min(topk, len(names)), -1).indices
        meets = torch.zeros(2, len(names), len(names), dtype=torch.float64).scatter_(2, picked, 1.0)
        mask = (member.T @ meets @ member)[:, None] > 0
        qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask).transpose(1, 2).flatten(2)
        assert layer.lce is not None
        as_map = v.mT.unflatten(2, shape)
        y = y + F.conv2d(as_map, layer.lce.weight, layer.lce.bias, padding=2, groups=dim).flatten(2).mT
        return float((layer(x) - layer.proj(y)).abs().max())


def scene(generator: Any) -> tuple[Any, Any]:
    """``(q = k [1, 1, tokens, channels], which tokens are of a patch)``, float64.

    Identities ~ N(0, 1) in 2 patches each, at least `APART` from each other along an axis, no two patches overlapping;
    elsewhere `BACKGROUND` N(0, 1); noise N(0, `NOISE`^2) on all; times the root of `AMP`.
    """
    import torch

    places: list[list[int]] = []
    tries = 0
    while len(places) < 2 * IDENTITIES:
        tries += 1
        if tries % 1000 == 0:  # begun in a way that may leave no room
            places = []
        pair = torch.randint(SIDE - PATCH + 1, (2, 2), generator=generator)
        apart = int((pair[0] - pair[1]).abs().max()) >= APART
        others = torch.tensor(places).view(-1, 1, 2)
        if apart and bool(((others - pair).abs().amax(-1) >= PATCH).all()):
            places += pair.tolist()
    x = BACKGROUND * torch.randn(SIDE, SIDE, CHANNELS, generator=generator, dtype=torch.float64)
    identity = torch.randn(IDENTITIES, CHANNELS, generator=generator, dtype=torch.float64)
    marked = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for n, (row, column) in enumerate(places):
        x[row : row + PATCH, column : column + PATCH] = identity[n // 2]
        marked[row : row + PATCH, column : column + PATCH] = True
    x = (x + NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64)) * AMP**0.5
    return x.flatten(0, 1)[None, None], marked.flatten()


def kept(picked: int, draws: int, seed: int) -> dict[str, list[float]]:
    """Mean mass that patch queries keep, for each arm and scene."""
    import torch

    from regard.kernels.recall import kept_mass, local_blocks, oracle_blocks, random_blocks
    from regard.patterns import TileOrder
    from regard.patterns.block_topk import BlockTopK
    from regard.patterns.select import topk

    order = TileOrder((SIDE, SIDE), TILE)
    route = BlockTopK(TILE**2, order=order, select=topk(picked), heads="all")
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for s in range(seed, seed + draws):
        generator = torch.Generator().manual_seed(s)
        x, marked = scene(generator)
        routed = route(x, x, q_start=0)
        local = (local_blocks(routed), _nearest(routed))
        arms = (routed, random_blocks(routed, generator), *local, oracle_blocks(x, x, routed))
        for name, arm in zip(ARMS, arms, strict=True):
            found[name].append(float(kept_mass(x, x, arm, q_start=0)[0, 0, marked].mean()))
    return found


def _nearest(like: Any) -> Any:
    """As many regions, those whose centres are nearest on the map."""
    from dataclasses import replace

    import torch

    from regard.patterns.select import topk

    side = torch.arange(SIDE // TILE)
    at = torch.cartesian_prod(side, side).double()
    index, count = topk(like.index.shape[-1])(-torch.cdist(at, at))
    return replace(like, index=index[None, None], count=count[None, None], score=None, cost=0)


def _routing(draws: int, seed: int) -> Finding:
    found = {picked: kept(picked, draws, seed) for picked in PICKED}
    mean = {picked: {arm: float(np.mean(v)) for arm, v in arms.items()} for picked, arms in found.items()}
    told = "; ".join(
        f"{picked} of {(SIDE // TILE) ** 2} regions: " + ", ".join(f"{arm} {m:.3f}" for arm, m in arms.items())
        for picked, arms in mean.items()
    )
    first = mean[PICKED[0]]
    local = max(first["nearest in order"], first["nearest on the map"])
    return Finding(
        "routing",
        verdict(first["route"] >= local + 0.15 and first["route"] >= 0.9 * first["best"]),
        first["route"],
        evidence.bootstrap(found[PICKED[0]]["route"]),
        floor=first["random"],
        ceiling=first["best"],
        baseline=local,
        reason=told,
        details={"kept": {str(picked): arms for picked, arms in found.items()}},
    )


def _marks(seeds: list[int], device: str) -> Finding:
    import torch

    from regard.layers.biformer import BiLevelAttention
    from regard.models.vit import ViT
    from regard.tasks.vision import SameMark, asked_accuracy, asked_loss
    from regard.train.simple import fit

    task = SameMark((MARKS, MARKS), window=WINDOW)
    mixers: dict[str, Any] = {
        "routed": lambda dim, heads, shape: BiLevelAttention(dim, heads, shape, MARKS // TILE, TOPK, lce=None),
        "window": "window",
        "dense": "full",
    }
    scores: dict[str, list[float]] = {arm: [] for arm in mixers}
    parameters = {}
    for s in seeds:
        test = task.batch(TEST, torch.Generator().manual_seed(10**6 + s)).to(device)
        for arm, mixer in mixers.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(s)
                net = ViT(
                    (MARKS, MARKS), [mixer] * 2, 2, dim=DIM, heads=HEADS, channels=4, window=WINDOW, read_out="token",
                    embed_std=3.0, position_std=1.0,
                ).to(device)  # fmt: skip
            parameters[arm] = sum(p.numel() for p in net.parameters())
            fit(net, asked_loss, lambda g: task.batch(BATCH, g).to(device), STEPS, LR, s)
            scores[arm].append(100 * asked_accuracy(net, test))
    mean = {arm: float(np.mean(v)) for arm, v in scores.items()}
    gain, low, high = evidence.paired_difference(scores["routed"], scores["window"])
    told = ", ".join(f"{arm} {m:.1f} %" for arm, m in mean.items())
    told = f"{told}; {STEPS} steps, {len(seeds)} seeds, {next(iter(parameters.values()))} parameters each"
    details = {"scores": scores, "parameters": parameters}
    if mean["dense"] < 70:
        return Finding("marks", "not measured", reason=f"premise not met, dense attention: {told}", details=details)
    return Finding(
        "marks",
        verdict(gain >= 20 and mean["routed"] >= mean["dense"] - 3 and len(set(parameters.values())) == 1),
        gain,
        (low, high),
        floor=0.0,
        ceiling=100 - mean["window"],
        baseline=mean["dense"] - mean["window"],
        reason=told,
        details=details,
    )
