"""Secondary attention sinks (arXiv 2512.22213): tokens that turn into sinks mid-network, and what makes them.

A token is a sink at a block of the first token's window (from the largest rise of its norm to the largest fall) if the
cosine of its stream to the first token's exceeds 0.9 in size; its lifetime is the number of such blocks, its level
(first block, lifetime). The cause is tested by adding `c ||h_0|| u_0`, the first token's own direction, to what a
middle MLP writes at a few tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "secondary-sinks"
CLAIMS = [
    Claim(
        "cosine",
        "the streamed cosine to the first token equals the one from the stream itself",
        kind="instrument",
        ours="largest difference over layers, samples and positions",
        holds_if="at most 1e-4",
    ),
    Claim(
        "levels",
        "some tokens become sinks in the middle of the network, at a few levels",
        kind="mechanism",
        paper="three levels in QwQ-32B, six in Qwen3-14B",
        ours="levels (first block, lifetime) of secondary sinks",
        holds_if="at least one",
    ),
    Claim(
        "norm-sets-score",
        "the norm of a vector along the first token's direction sets how strong a sink a token becomes",
        kind="mechanism",
        paper="sink score grows with the norm of the MLP's output",
        ours="Spearman correlation of c with the later sink score",
        holds_if="above 0.8, and a random direction of the same norm gives less than a third of the rise",
    ),
    Claim(
        "norm-sets-lifetime",
        "the same norm sets for how many blocks it stays one",
        kind="mechanism",
        paper="lifetime grows with the norm of the MLP's output",
        ours="Spearman correlation of c with the lifetime",
        holds_if="above 0.8",
    ),
]
SAMPLES = {"smoke": 16, "full": 200}
LENGTH = 256
TOKENS = 8
FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0)
CHUNK = 16


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Look for levels, then make sinks at chosen tokens."""
    import regard
    from regard.measures.sinks import sink_lifetime
    from regard.studies.testbed import below_gate
    from regard.tasks.retoken import texts
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    ids = texts(loaded, SAMPLES[size], LENGTH, seed).to(device)
    parts = regard.anatomy(loaded.model, {"input_ids": ids[:2]})
    plain = _watched(loaded.model, ids, parts)
    findings = [_cosine(loaded.model, ids[:4], plain, parts)]
    if reason := below_gate(loaded, "sink"):
        return findings + [Finding(c.id, "not measured", reason=reason) for c in CLAIMS[1:]]
    findings.append(_levels(sink_lifetime(plain), len(parts)))

    generator = np.random.default_rng(seed)
    # In the first half, so that many later rows can look at them; never the first tokens, which may be sinks already.
    at = tuple(tuple(sorted(generator.choice(np.arange(8, LENGTH // 2), TOKENS, replace=False).tolist())) for _ in ids)
    last = len(parts) - 1
    middle = [last // 2] if size == "smoke" else list(range(last // 3, last - last // 3))
    runs = {block: _inject(loaded.model, ids, at, block, parts, seed) for block in middle}
    return [*findings, *_judge(runs, seed)]


def _watched(model: Any, ids: Any, parts: Any, edits: Any = lambda rows: ()) -> Any:
    """The atlas of all samples under the edits that `edits` gives for some of them."""
    import torch

    import regard
    from regard.watch.intervene import intervene
    from regard.watch.settings import Watch

    settings = Watch((), per_sample=("received_raw",), stream=True, tokens=False)
    atlases = []
    for start in range(0, len(ids), CHUNK):
        rows = slice(start, min(start + CHUNK, len(ids)))
        with (
            torch.no_grad(),
            intervene(model, edits(rows), anatomy=parts),
            regard.watch(model, statistics=settings) as watched,
        ):
            model(input_ids=ids[rows], use_cache=False)
        atlases.append(watched.atlas)
    return sum(atlases)


def _cosine(model: Any, ids: Any, atlas: Any, parts: Any) -> Finding:
    import torch

    from regard.watch.intervene import Site, trace

    sites = [Site(block, "resid_post") for block in range(len(parts))]
    with torch.no_grad():
        stream = torch.stack(list(trace(model, {"input_ids": ids}, sites, anatomy=parts).values())).double()
    dense = torch.nn.functional.cosine_similarity(stream, stream[:, :, :1], dim=-1).cpu().numpy()
    ours = atlas.need("bos_cos").values[:, : len(ids)]
    worst = float(np.abs(ours - dense).max())
    reason = f"{dense.size} cosines compared"
    return Finding("cosine", verdict(worst <= 1e-4), worst, floor=0.0, reason=reason)


def _levels(life: Any, blocks: int) -> Finding:
    secondary = life["kind"].values == "secondary"
    levels = np.stack([life["first"].values, np.nan_to_num(life.values)], -1).astype(int)  # [sample, position, 2]
    names, which = np.unique(levels[secondary], axis=0, return_inverse=True)
    sample = np.nonzero(secondary)[0]
    seen = np.zeros((len(levels), len(names)))  # tokens of each level in each text
    np.add.at(seen, (sample, which.reshape(-1)), 1)
    counts = {(int(f), int(n)): int(c) for (f, n), c in zip(names, seen.sum(0), strict=True)}
    kinds = {kind: int((life["kind"].values == kind).sum()) for kind in ("secondary", "bos-like", "noise")}
    details = {"levels": [{"first": f, "lifetime": n, "tokens": c} for (f, n), c in counts.items()], "tokens": kinds}
    shown = ", ".join(f"block {f} for {n}: {c} tokens" for (f, n), c in counts.items()) or "none"
    return Finding(
        "levels",
        verdict(counts),
        float(len(counts)),
        evidence.bootstrap(seen, lambda some: float((some.sum(0) > 0).sum())) if counts else None,
        floor=0.0,
        reason=f"levels of {int(life.notnull().sum())} tokens in {blocks} blocks: {shown}; interval over texts, which "
        "can only find fewer",
        details=details,
    )


def _inject(model: Any, ids: Any, at: Any, block: int, parts: Any, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Later sink score and lifetime of the chosen tokens, [factor, sample], along u_0 and (c = 1) along random ones."""
    import torch

    from regard.measures.sinks import sink_lifetime
    from regard.watch.intervene import Edit, Site, trace

    site = Site(block, "resid_post", pos=0)
    with torch.no_grad():
        first = torch.cat([trace(model, {"input_ids": part}, site, anatomy=parts)[site] for part in ids.split(CHUNK)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(first.shape, generator=generator).to(first)
    random = noise / noise.norm(dim=-1, keepdim=True) * first.norm(dim=-1, keepdim=True)
    out: dict[str, list[Any]] = {"score": [], "lifetime": [], "random": []}
    arms = [(c, first, ("score", "lifetime")) for c in FACTORS] + [(1.0, random, ("random",))]
    for c, direction, kept in arms:

        def edits(rows: slice, c: float = c, direction: Any = direction) -> list[Edit]:
            site = Site(block, "mlp_out", pos=at[rows])
            return [Edit(site, "add", value=direction[rows, None], alpha=c)]

        atlas = _watched(model, ids, parts, edits)
        columns = np.array(at)
        received = atlas.need("received_raw").isel(layer=slice(block + 1, None)).mean(("layer", "head")).values
        score = np.take_along_axis(received, columns, axis=1).mean(1)
        life = np.take_along_axis(sink_lifetime(atlas).values, columns, axis=1).mean(1)
        for name, value in (("score", score), ("lifetime", life), ("random", score)):
            if name in kept:
                out[name].append(value)
    return {name: np.array(values) for name, values in out.items()}


def _judge(runs: dict[int, dict[str, np.ndarray[Any, Any]]], seed: int) -> list[Finding]:
    """Both causal claims from the injections at every block tried; samples are resampled for the intervals."""
    blocks = ", ".join(map(str, runs))

    def correlation(values: np.ndarray[Any, Any]) -> float:
        return evidence.spearman(np.broadcast_to(FACTORS, values.shape), values)

    def over_blocks(name: str) -> np.ndarray[Any, Any]:
        return np.concatenate([run[name] for run in runs.values()], axis=1).T  # [sample, factor]

    score, life = over_blocks("score"), over_blocks("lifetime")
    one = FACTORS.index(1.0)
    rise, random_rise = (score[:, one] - score[:, 0]).mean(), (over_blocks("random")[:, 0] - score[:, 0]).mean()
    figure = correlation(score)
    holds = figure > 0.8 and rise > 0 and random_rise < rise / 3
    curve = {str(c): float(v) for c, v in zip(FACTORS, score.mean(0), strict=True)}
    told = ", ".join(f"{v:.4f} at c = {c}" for c, v in curve.items())
    by_score = Finding(
        "norm-sets-score",
        verdict(holds),
        figure,
        evidence.bootstrap(score, correlation, seed=seed),
        floor=0.0,
        ceiling=1.0,
        baseline=float(random_rise / rise) if rise > 0 else None,
        reason=f"added at block {blocks}: sink score {told}; a random direction at c = 1 rises by {random_rise:.4f}",
        details={"score": curve, "rise": float(rise), "random_rise": float(random_rise)},
    )
    curve = {str(c): float(v) for c, v in zip(FACTORS, life.mean(0), strict=True)}
    figure = correlation(life)
    if np.isnan(figure):
        reason = "no token that was added to became a sink at any c, so lifetimes do not differ"
        return [
            by_score,
            Finding("norm-sets-lifetime", "does not hold", 0.0, reason=reason, details={"lifetime": curve}),
        ]
    told = ", ".join(f"{v:.2f} at c = {c}" for c, v in curve.items())
    by_life = Finding(
        "norm-sets-lifetime",
        verdict(figure > 0.8),
        figure,
        evidence.bootstrap(life, correlation, seed=seed),
        floor=0.0,
        ceiling=1.0,
        reason=f"added at block {blocks}: mean lifetime {told}",
        details={"lifetime": curve},
    )
    return [by_score, by_life]
