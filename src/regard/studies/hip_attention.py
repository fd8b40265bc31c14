"""HiP attention (arXiv 2406.09827): key blocks found by halving ranges of keys, by the key in the middle of each.

On queries and keys that are alike in neighbours (a first-order autoregression) the tree finds most of what there is to
be found; on noise it has nothing to go by, and must gain little. Kept mass is judged in the second half of the rows,
beside random and nearest blocks of equal width, the best ones, and sinks with a window of as many keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "hip-attention"
FULL_ONLY = "only the full size runs the decoder on long texts"
CLAIMS = [
    Claim(
        "all",
        "a budget for every block keeps everything",
        kind="instrument",
        ours="largest difference from 1 of the mass kept of any query, with k = T",
        holds_if="at most 1e-5, and some query keeps less than half with k = 64",
    ),
    Claim(
        "kept",
        "the tree keeps most of the attention where neighbours score alike",
        kind="mechanism",
        ours="mass kept within causal attention, rho = 0.97, k = 64 of 1,024 keys beside 4 sinks and a window of 32",
        holds_if="at least 0.3 more than random blocks, and than sinks and a window of as many keys",
    ),
    Claim(
        "locality",
        "it is locality that it lives on",
        kind="mechanism",
        paper="the centre of a range stands for it because neighbours are alike",
        ours="mass kept beyond that of random blocks on queries and keys without any (rho = 0)",
        holds_if="at most 0.12",
    ),
    Claim(
        "dots",
        "deciding takes O(T log T) dot products",
        kind="replication",
        paper="O(T log T); all pairs are O(T^2)",
        ours="slope of log(dot products) over log(T), T = 1,024 to 16,384, counted in the search",
        holds_if="at most 1.35",
    ),
    Claim(
        "loss",
        "k = 512 costs a language model little, and less than sinks and a window of as many keys",
        kind="replication",
        paper="little degradation at k = 512",
        ours="rise of the decoder's loss on held-out text of 4,096 bytes, nats a byte, every layer routed",
        holds_if="at most 0.02, and less than with sinks and window (95% interval of the paired difference above 0)",
    ),
    Claim(
        "recall",
        "the tree finds what a real model looks at",
        kind="mechanism",
        ours="mass kept in the decoder's own layers and heads at k = 512 of 4,096 keys, rows of the second half",
        holds_if="more than random blocks of equal width, and than sinks and a window of as many keys",
    ),
]
LENGTH, DIM, AMP = 1024, 32, 2
SMALL: dict[str, Any] = {"k": 64, "block": (16, 2), "window": 32, "sink": 4}
SEEDS, HEADS = {"smoke": 2, "full": 5}, 8
LENGTHS = {"smoke": (1024, 2048, 4096, 8192, 16384), "full": (1024, 2048, 4096, 8192, 16384)}
TEXTS, TEXT_LENGTH = 4, 4096
LARGE: dict[str, Any] = {"k": 512}


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str | None = None) -> list[Finding]:
    """Kept mass with and without locality, dot products counted, and the decoder's loss."""
    findings = [_all(device, seed), _kept(size, device, seed), _locality(size, device, seed)]
    findings.append(_dots(LENGTHS[size], device, seed))
    if size == "full":
        return findings + _decoder(model or "testbed:decoder", device, seed)
    return [*findings, *(Finding(c, "not measured", reason=FULL_ONLY) for c in ("loss", "recall"))]


def masses(q: Any, k: Any, route: Any, generator: Any) -> dict[str, Any]:
    """Mass kept by the route and by what it is compared with, `[batch * heads, rows of the second half]`."""
    from regard.kernels.recall import kept_mass, local_blocks, oracle_blocks, random_blocks
    from regard.patterns import Causal, Sinks, Window

    routed = route(q, k, within=Causal())
    arms = {
        "route": routed,
        "random": random_blocks(routed, generator),
        "local": local_blocks(routed),
        "sinks and window": Sinks(route.sink) | Window(route.window + route.k - 1),
        "oracle": oracle_blocks(q, k, routed),
    }
    rows = slice(q.shape[2] // 2, None)
    found = {name: kept_mass(q, k, arm, within=Causal())[:, :, rows].flatten(0, 1).cpu() for name, arm in arms.items()}
    same = routed.index[:, :, -1, :, None] == arms["oracle"].index[:, :, -1, None, :]
    found["found"] = (same & (routed.index[:, :, -1, :, None] >= 0)).any(-1).double().mean(-1).flatten()[:, None].cpu()
    return found


def _synthetic(rho: float, size: str, device: str, seed: int) -> dict[str, Any]:
    """``[seeds, heads]`` of each arm."""
    import torch

    from regard.patterns import HiP
    from regard.tasks.qk import ar_qk

    found: dict[str, list[Any]] = {}
    for n in range(SEEDS[size]):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        q, k = (x.to(device) for x in ar_qk(LENGTH, DIM, rho, AMP, generator, heads=HEADS))
        for name, mass in masses(q, k, HiP(**SMALL), generator).items():
            found.setdefault(name, []).append(mass.double().mean(1).numpy())
    return {name: np.stack(each) for name, each in found.items()}


def _shown(found: dict[str, Any]) -> str:
    named = [n for n in found if n != "found"]
    return ", ".join(f"{name} {float(found[name].mean()):.3f}" for name in named)


def _all(device: str, seed: int) -> Finding:
    import torch

    from regard.kernels.recall import kept_mass
    from regard.patterns import Causal, HiP
    from regard.tasks.qk import ar_qk

    generator = torch.Generator().manual_seed(seed)
    q, k = (x.to(device) for x in ar_qk(LENGTH, DIM, 0.0, AMP, generator, heads=1))
    whole, few = (
        kept_mass(q, k, HiP(**{**SMALL, "k": budget})(q, k, within=Causal()), within=Causal())
        for budget in (LENGTH, SMALL["k"])
    )
    off, least = float((whole - 1).abs().max()), float(few.min())
    return Finding(
        "all",
        verdict(off <= 1e-5 and least < 0.5),
        off,
        ceiling=0.0,
        reason=f"{LENGTH} queries; with k = {SMALL['k']} some keep {least:.3f}",
    )


def _kept(size: str, device: str, seed: int) -> Finding:
    found = _synthetic(0.97, size, device, seed)
    gains = [found["route"] - found[other] for other in ("random", "sinks and window")]
    return Finding(
        "kept",
        verdict(all(gain.mean() >= 0.3 for gain in gains)),
        float(found["route"].mean()),
        evidence.seeds_and_items(found["route"]),
        floor=float(found["random"].mean()),
        ceiling=float(found["oracle"].mean()),
        baseline=float(found["sinks and window"].mean()),
        reason=f"{_shown(found)}; gains {gains[0].mean():.3f} and {gains[1].mean():.3f}",
        details={name: x.mean(1).tolist() for name, x in found.items()},
    )


def _locality(size: str, device: str, seed: int) -> Finding:
    found = _synthetic(0.0, size, device, seed)
    gain = found["route"] - found["random"]
    return Finding(
        "locality",
        verdict(gain.mean() <= 0.12),
        float(gain.mean()),
        evidence.seeds_and_items(gain),
        floor=0.0,
        ceiling=float((found["oracle"] - found["random"]).mean()),
        reason=_shown(found),
        details={name: x.mean(1).tolist() for name, x in found.items()},
    )


def _dots(lengths: tuple[int, ...], device: str, seed: int) -> Finding:
    import torch

    from regard.patterns import HiP
    from regard.tasks.qk import ar_qk

    class Counted(HiP):
        """Counts the dot products that it makes."""

        def _scores(self, queries: Any, k: Any, centre: Any) -> Any:
            made.append(centre.numel() * self.block[1] * queries.shape[3])
            return super()._scores(queries, k, centre)

    counts, formula = [], []
    for length in lengths:
        made: list[int] = []
        q, k = ar_qk(length, DIM, 0.97, AMP, torch.Generator().manual_seed(seed))
        route = Counted(**SMALL)
        route(q.to(device), k.to(device))
        counts.append(sum(made))
        formula.append(route.dots(length, length))
    slope = float(np.polyfit(np.log(lengths), np.log(counts), 1)[0])
    told = ", ".join(f"{n:,} at {t:,}" for n, t in zip(counts, lengths, strict=True))
    return Finding(
        "dots",
        verdict(slope <= 1.35),
        slope,
        floor=1.0,
        baseline=2.0,
        reason=f"{told}; all pairs have slope 2",
        details={"lengths": list(lengths), "dots": counts, "by formula": formula},
    )


def _decoder(name: str, device: str, seed: int) -> list[Finding]:
    import torch
    from torch.nn.functional import cross_entropy

    import regard
    from regard.patterns import HiP, Sinks, Window
    from regard.studies.testbed import below_gate
    from regard.tasks.bytetext import StandardLibrary
    from regard.tasks.testbeds import load

    loaded = load(name, device=device)
    below = below_gate(loaded, "needle_2048", "needle_4096")
    if below:
        return [Finding(claim, "not measured", reason=below) for claim in ("loss", "recall")]
    model, route = loaded.model, HiP(**LARGE)
    ids = StandardLibrary("test").cut(TEXTS, TEXT_LENGTH, torch.Generator().manual_seed(seed)).to(device)
    seen: list[dict[str, Any]] = []

    class Judged(HiP):
        """Judges its decisions on the queries and keys it is given."""

        def select(self, q: Any, summary: Any, **how: Any) -> Any:
            seen.append(masses(q, summary["keys"], route, torch.Generator().manual_seed(len(seen))))
            return super().select(q, summary, **how)

    def losses(pattern: Any) -> Any:
        rows = []
        for text in ids:
            if pattern is None:
                logits = model(input_ids=text[None], use_cache=False).logits
            else:
                with regard.attend_with(model, pattern):
                    logits = model(input_ids=text[None], use_cache=False).logits
            rows.append(float(cross_entropy(logits[0, :-1].float(), text[1:])))
        return np.array(rows)

    with torch.no_grad():
        dense, routed = losses(None), losses(route)
        plain = losses(Sinks(route.sink) | Window(route.window + route.k - 1))
        with regard.attend_with(model, Judged(**LARGE)):
            model(input_ids=ids[:1], use_cache=False)
    rise, other = routed - dense, plain - dense
    more = evidence.paired_difference(other, rise, seed=seed)
    loss = Finding(
        "loss",
        verdict(rise.mean() <= 0.02 and more[1] > 0),
        float(rise.mean()),
        evidence.bootstrap(rise, seed=seed),
        floor=0.0,
        baseline=float(other.mean()),
        reason=(
            f"{len(ids)} texts, dense {dense.mean():.4f} nats a byte; sinks and window rise by {other.mean():.4f}, "
            f"{more[0]:.4f} more ({more[1]:.4f} to {more[2]:.4f})"
        ),
    )
    kept = {arm: np.stack([layer[arm].double().mean(1).numpy() for layer in seen]) for arm in seen[0]}
    others = max(float(kept[arm].mean()) for arm in ("random", "sinks and window"))
    recall = Finding(
        "recall",
        verdict(kept["route"].mean() > others),
        float(kept["route"].mean()),
        evidence.bootstrap(kept["route"].mean(1), seed=seed),
        floor=float(kept["random"].mean()),
        ceiling=float(kept["oracle"].mean()),
        baseline=float(kept["sinks and window"].mean()),
        reason=(
            f"{_shown(kept)}; of the last row's blocks {kept['found'].mean():.2f} are among the best ones; by layer "
            + ", ".join(f"{x:.3f}" for x in kept["route"].mean(1))
        ),
        details={arm: x.mean(1).tolist() for arm, x in kept.items()},
    )
    return [loss, recall]
