"""Heads of a vision transformer (arXiv 2303.13731): how much each matters, how far it looks, what its map looks like.

Importance is what taking a head out (z = 0, the output projection's bias stays) does to the class distribution; heads
are ranked on some digits and judged on others. Maps are the patches' own weights, without the class token.
`regard.report.head_patterns` draws their kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "vit-visual-analytics"
MODEL = "testbed:vit"
CLAIMS = [
    Claim(
        "rings",
        "the streamed strength of every ring is that of the weights, and the rings leave out the class token alone",
        kind="instrument",
        ours="largest gap of a head: rings against the weights' own, their sum against 1 - class mass",
        holds_if="at most 1e-5",
    ),
    Claim(
        "top-heads",
        "the heads whose absence moves the class distribution most are those that accuracy needs",
        kind="mechanism",
        ours="points of accuracy lost with the top 3 by Jensen-Shannon divergence zeroed together; the baseline is "
        "as many of the other heads, mean of 5 draws",
        holds_if="better: the interval of the difference over images lies above 0",
    ),
    Claim(
        "depth",
        "the last layer's heads look farther than the first layer's",
        kind="mechanism",
        paper="early layers hold local and global heads, later ones global (in words)",
        ours="mean ring looked at, last layer less first, in patches; the baseline is the first layer's",
        holds_if="the interval over images lies above 0",
    ),
    Claim(
        "importance",
        "importance differs between heads, and other images order them alike",
        kind="mechanism",
        paper="differs strongly between heads",
        ours="Spearman correlation of the heads' divergences between two halves of the images, no digit in both",
        holds_if="above 0.8",
    ),
    Claim(
        "clusters",
        "maps fall into kinds that another training of the autoencoder finds again",
        kind="mechanism",
        ours="adjusted Rand index of the 8 clusters between 3 trainings; the baseline is k-means on the maps "
        "themselves, from 3 starts",
        holds_if="above 0.6",
    ),
]
IMAGES = {"smoke": 200, "full": 2000}
TOP, DRAWS, CHUNK = 3, 5, 20
MAPPED, KINDS, STEPS, SEEDS = 250, 8, 800, 3
FULL_ONLY = "needs the 2,000 images of the full size"
Heads = list[tuple[int, int]]


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Rank the heads on training digits, take them out on test digits, measure rings; at full size, the maps too."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    ranked, _ = drawn(IMAGES["smoke"], "train", seed, device)
    judged, groups = drawn(IMAGES[size], "test", seed, device)
    findings, rings = _rings(loaded.model, judged)
    if reason := below_gate(loaded):
        return [findings] + [Finding(c.id, "not measured", reason=reason) for c in CLAIMS[1:]]
    found = [findings, _top(loaded.model, ranked, judged, seed), _depth(rings, seed)]
    if size == "smoke":
        return found + [Finding(claim, "not measured", reason=FULL_ONLY) for claim in ("importance", "clusters")]
    return [*found, _halves(loaded.model, judged, groups, seed), _clusters(loaded.model, judged, seed)]


def drawn(n: int, split: Any, seed: int, device: str) -> tuple[Any, np.ndarray[Any, Any]]:
    """n digits of a split, and which digit each is: different ones while there are so many, else each moved a pixel."""
    import torch

    from regard.tasks.vision import Images, digits, jitter

    images, generator = digits(split), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.x), generator=generator)
    index = order.repeat(-(-n // len(order)))[:n]
    found = Images(images.x[index], images.labels[index])
    return (found if n <= len(order) else jitter(found, generator)).to(device), index.numpy()


def inputs(images: Any) -> dict[str, Any]:
    """What the model takes."""
    from regard.tasks.vision import normalised

    return {"pixel_values": normalised(images.x)}


def divergence(clean: Any) -> Callable[[Any], Any]:
    """Jensen-Shannon divergence to the class distribution of clean logits, in nats, at most log 2."""
    import torch

    p = clean.double().softmax(-1)

    def metric(logits: Any) -> Any:
        q = logits.double().softmax(-1)
        middle = torch.special.entr((p + q) / 2).sum(-1)
        return middle - (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2

    return metric


def importance(model: Any, images: Any, views: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """How much each head matters on each image, by view, [layer, head, image].

    "divergence" and "probability" (of the right class, lost) without the head; "alone": divergence with only this
    head of its layer; "class rows": divergence with its class row pruned; "patch pairs": with its weights between
    patches pruned, the other weights as they were.
    """
    import torch

    from regard.patterns import Columns, Queries
    from regard.steer.causal import head_ablation, heads_of
    from regard.watch.anatomy import anatomy
    from regard.watch.heads import mask_heads
    from regard.watch.intervene import Site, reweight
    from regard.watch.scan import scan

    given = inputs(images)
    parts = anatomy(model, given)
    heads = heads_of(parts)
    with torch.no_grad():
        moved = divergence(model(**given).logits)
    patches = (1, model.config.image_size**2 // model.config.patch_size**2 + 1)
    between = Queries((patches,)) & Columns((patches,))

    def right(logits: Any) -> Any:
        return logits.softmax(-1).gather(-1, images.labels[:, None])[:, 0]

    def each(edits: Callable[[int, int], Any]) -> Any:
        found = scan(model, given, None, [edits(*h) for h in heads], moved, anatomy=parts)
        return found.values.cpu().numpy().reshape(len(parts), -1, len(images.labels))

    def others(layer: int, head: int) -> Any:
        return mask_heads([(a, b) for a, b in heads if a == layer and b != head], "zero")

    def unpaired(layer: int, head: int) -> Any:
        groups = {between: 0.0, ~between: 1.0}
        return [reweight(Site(layer, "weights", head=head), groups, renormalize=False)]

    how: dict[str, Callable[[], Any]] = {
        "divergence": lambda: head_ablation(model, given, moved, anatomy=parts).values,
        "probability": lambda: -head_ablation(model, given, right, anatomy=parts).values,
        "alone": lambda: each(others),
        "class rows": lambda: head_ablation(model, given, moved, pos=0, anatomy=parts).values,
        "patch pairs": lambda: each(unpaired),
    }
    return {view: how[view]() for view in views}


VIEWS = ("divergence", "probability", "alone", "class rows", "patch pairs")


def correct(model: Any, images: Any, heads: Heads) -> np.ndarray[Any, Any]:
    """1 for each image named rightly without some heads."""
    from regard.tasks.vit import right
    from regard.watch.heads import mask_heads
    from regard.watch.intervene import intervene

    with intervene(model, mask_heads(heads, "zero")):
        return right(model, images).double().cpu().numpy()


def _top(model: Any, ranked: Any, judged: Any, seed: int) -> Finding:
    scores = {view: x.mean(-1) for view, x in importance(model, ranked, VIEWS).items()}
    by = scores["divergence"]
    order = [divmod(int(i), by.shape[1]) for i in np.argsort(-by, axis=None, kind="stable")]
    draws = evidence.random_equal(order[TOP:], TOP, seed=seed, draws=DRAWS)
    whole, without = correct(model, judged, []), correct(model, judged, order[:TOP])
    random = np.stack([correct(model, judged, heads) for heads in draws])
    gain, low, high = evidence.paired_difference(random.mean(0), without, seed=seed)
    lost, beside = 100 * (whole - without).mean(), 100 * (whole - random.mean(0)).mean()
    agree = {view: evidence.spearman(by.ravel(), x.ravel()) for view, x in scores.items() if view != "divergence"}
    shown = ", ".join(f"{100 * (whole - r).mean():.1f}" for r in random)
    most = "; ".join(f"{view} {rho:.2f}" for view, rho in agree.items())
    reason = (
        f"heads {', '.join(f'{a}.{b}' for a, b in order[:TOP])} (layer.head), ranked on {len(ranked.labels)} training "
        f"digits, judged on {len(judged.labels)} test digits; draws lose {shown} points; the difference is "
        f"{100 * gain:.1f} ({100 * low:.1f} to {100 * high:.1f}); other views order the heads like divergence: {most}"
    )
    interval = evidence.bootstrap(100 * (whole - without), seed=seed)
    details = {"scores": {view: x.round(5).tolist() for view, x in scores.items()}, "accuracy": float(whole.mean())}
    details["difference"] = [100 * gain, 100 * low, 100 * high]
    ceiling = 100 * float(whole.mean())
    return Finding("top-heads", verdict(low > 0), lost, interval, 0.0, ceiling, beside, reason, details)


def _rings(model: Any, images: Any) -> tuple[Finding, list[Any]]:
    """The instrument on the first images, and the strengths of every chunk of images, [layer, head, ring]."""
    import torch

    import regard
    from regard.measures.spatial import ring_strength
    from regard.tasks.vision import Images
    from regard.watch.anatomy import anatomy
    from regard.watch.intervene import Site, trace
    from regard.watch.settings import Watch

    side = model.config.image_size // model.config.patch_size
    how = Watch(("ring",), grid=(side, side), prefix=1, tokens=False)
    found, gap = [], 0.0
    for start in range(0, len(images.labels), CHUNK):
        some = Images(images.x[start : start + CHUNK], images.labels[start : start + CHUNK])
        given = inputs(some)
        with torch.no_grad(), regard.watch(model, statistics=how) as seen:
            model(**given)
        found.append(ring_strength(seen.atlas))
        if start == 0:
            parts = anatomy(model, given)
            sites = [Site(layer, "weights") for layer in range(len(parts))]
            weights = torch.stack(list(trace(model, given, sites, anatomy=parts).values())).double().mean(1)
            at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
            apart = (at[:, None] - at[None]).abs().amax(-1).to(weights.device)
            patches = weights[..., 1:, 1:]
            dense = torch.stack([(patches * (apart == r)).sum(-1).mean(-1) for r in range(side)], -1).cpu().numpy()
            ours = found[0].transpose("layer", "head", "ring").values
            outside = 1 - weights[..., 1:, 0].mean(-1).cpu().numpy()
            gap = max(float(np.abs(ours - dense).max()), float(np.abs(ours.sum(-1) - outside).max()))
            count = len(some.labels)
    reason = f"{ours.size} strengths of {count} images compared"
    return Finding("rings", verdict(gap <= 1e-5), gap, floor=0.0, reason=reason), found


def _depth(rings: list[Any], seed: int) -> Finding:
    """Mean ring of each head, from chunks of images, which are resampled."""
    far = np.stack([(r * r["ring"]).sum("ring").values / r.sum("ring").values for r in rings])  # [chunk, layer, head]
    layers = far.mean(2)
    figure, low, high = evidence.paired_difference(layers[:, -1], layers[:, 0], seed=seed)
    side = rings[0].sizes["ring"]
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    even = float(np.abs(place[:, None] - place[None]).max(-1).mean())
    heads = far.mean(0)
    shown = "; ".join(f"layer {i}: {h.min():.2f} to {h.max():.2f}, mean {h.mean():.2f}" for i, h in enumerate(heads))
    reason = f"mean ring of the heads, {even:.2f} with even weights: {shown}; intervals over chunks of {CHUNK} images"
    details = {"mean_ring": heads.round(4).tolist(), "even": even}
    base = float(layers[:, 0].mean())
    return Finding("depth", verdict(low > 0), figure, (low, high), 0.0, None, base, reason, details)


def _halves(model: Any, images: Any, groups: np.ndarray[Any, Any], seed: int) -> Finding:
    from regard.tasks.vision import Images

    chunks = [
        importance(model, Images(images.x[i : i + 200], images.labels[i : i + 200]), ("divergence",))["divergence"]
        for i in range(0, len(groups), 200)
    ]
    by = np.concatenate(chunks, -1).reshape(-1, len(groups)).T  # [image, heads]
    first = groups % 2 == 0
    figure = evidence.spearman(by[first].mean(0), by[~first].mean(0))
    generator = np.random.default_rng(seed)

    def again(half: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return half[generator.integers(len(half), size=len(half))].mean(0)

    resampled = [evidence.spearman(again(by[first]), again(by[~first])) for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = np.sort(by.mean(0))
    reason = (
        f"{first.sum()} and {(~first).sum()} images; divergence {mean[-1]:.4f} nat for the head that matters most, "
        f"{np.median(mean):.4f} for the median one, {mean[0]:.4f} for the least"
    )
    return Finding(
        "importance", verdict(figure > 0.8), figure, (float(low), float(high)), floor=0.0, ceiling=1.0, reason=reason
    )


def _clusters(model: Any, images: Any, seed: int) -> Finding:
    from itertools import combinations

    from sklearn.metrics import adjusted_rand_score

    from regard.tasks.map_kinds import clustered, codes, patch_maps
    from regard.tasks.vision import Images

    maps = patch_maps(model, inputs(Images(images.x[:MAPPED], images.labels[:MAPPED])))
    seeds = range(seed, seed + SEEDS)
    coded = [clustered(codes(maps, s, steps=STEPS), s, KINDS) for s in seeds]
    flat = maps.flatten(1)
    plain = [clustered(flat, s, KINDS) for s in seeds]
    each, beside = ([adjusted_rand_score(a, b) for a, b in combinations(x, 2)] for x in (coded, plain))
    figure = float(np.mean(each))
    reason = f"{len(maps)} maps, pairs of trainings: {', '.join(f'{x:.3f}' for x in each)}"
    interval = evidence.bootstrap(each, seed=seed)
    return Finding("clusters", verdict(figure > 0.6), figure, interval, 0.0, 1.0, float(np.mean(beside)), reason=reason)
