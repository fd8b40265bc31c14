"""Low-rank channels between heads (arXiv 2406.09519): which component of a head a later one reads.

Scores are of parameters, norm gains folded in: the best component of the writer's W_OV against the reader's W_QK, and
the composition of the whole matrices. Positions are learned and added at the bottom, so W_QK holds at every offset. The
effect is the damage by the path from the writer, in the last token, to the reader's query there, without its sign.
Pairs of one writer are not independent, so intervals resample writers.

A component is scaled in what its head writes in the last token: z W_O = ... + c v becomes ... + alpha c v. The top
inhibition component is the one without which its reader weighs the giver's first mention most, against the receiver,
among the best-scoring pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.circuit_reuse import answered, gap, inputs_of, prompts
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "talking-heads"
MODEL = "testbed:lists"
CLAIMS = [
    Claim(
        "scores",
        "scores from thin factors are those of the whole matrices",
        kind="instrument",
        ours="largest gap over a sample of pairs, relative",
        holds_if="at most 1e-4",
    ),
    Claim(
        "components",
        "one component of the writer says which later heads it talks to, better than its whole matrix",
        kind="mechanism",
        paper="known interactions are predicted by one or two components",
        ours="Spearman correlation, over pairs, of the best component's score with the effect on indirect objects; the "
        "baseline is that of the composition of the whole matrices",
        holds_if="above 0.3, and better than the baseline",
    ),
    Claim(
        "lists",
        "scaling the top inhibition component makes longer lists come out right",
        kind="mechanism",
        paper="accuracy on Laundry List rises, often by over 20%",
        ours="points of accuracy gained on lists of 9 to 20, the factor chosen on other lists; the baseline is the "
        "mean of random components, each with its own factor chosen so",
        holds_if="better than plain and than random components",
    ),
    Claim(
        "replication",
        "GPT-2 medium's inhibition channels, and its Laundry List",
        kind="replication",
        paper="often by over 20%",
        ours="the figures above",
        holds_if="as above",
        waits="needs GPT-2 medium, which is not at hand without the hub",
    ),
]
PROMPTS = {"smoke": 16, "full": 64}
CHOSEN_ON = {"smoke": 60, "full": 200}
TESTED_ON = {"smoke": 120, "full": 500}
RANDOM = {"smoke": 2, "full": 5}
FACTORS = (-4.0, -2.0, -1.0, 0.0, 0.5, 1.5, 2.0, 4.0, 8.0)
LISTS = (9, 20)
CANDIDATES = 12
ROWS = 5


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Scores of every pair of heads, effects of every path, then longer lists under a scaled component."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.lists import IndirectObject
    from regard.tasks.testbeds import load
    from regard.watch.anatomy import anatomy

    loaded = load(model, device=device)
    parts = anatomy(loaded.model)
    heads = [(layer, head) for layer in range(len(parts)) for head in range(parts.heads[layer] or 0)]
    matrices = head_parts(loaded.model, parts, heads)
    best, whole, which = pair_scores(parts, heads, matrices)
    found = [_scores(matrices, heads, best, whole, which, seed)]
    if reason := below_gate(loaded, "indirect_object"):
        return found + unmeasured(CLAIMS[1:], reason)
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = prompts(loaded.model, IndirectObject(), PROMPTS[size], generator)
    if len(clean) < PROMPTS[size]:
        reason = f"too few prompts that the model answers rightly, clean and corrupted: {len(clean)} of {PROMPTS[size]}"
        return found + unmeasured(CLAIMS[1:], reason)
    effects = pair_effects(loaded.model, heads, clean, corrupt)
    found.append(_components(best, whole, effects, seed))
    if reason := below_gate(loaded):
        return [*found, Finding("lists", "not measured", reason=reason)]
    picked = inhibition(loaded.model, parts, heads, matrices, best, which, clean)
    return [*found, _lists(loaded.model, matrices, picked, size, seed, generator)]


def head_parts(model: Any, parts: Any, heads: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[Any, Any]]:
    """Both matrices of every head, and the components of its W_OV."""
    from regard.watch.parameters import components, head_matrices

    found = {head: head_matrices(model, *head, anatomy=parts) for head in heads}
    return {head: (m, components(m.ov)) for head, m in found.items()}


def pair_scores(parts: Any, heads: list[tuple[int, int]], matrices: dict[Any, Any]) -> tuple[Any, Any, Any]:
    """[writer, reader]: the best component's score, the composition of whole matrices, and which component it is.

    NaN where the reader does not come after the writer. Components below a hundredth of the writer's largest are left
    out: their directions mean nothing.
    """
    from regard.watch.parameters import component_scores, composition

    best, whole = np.full((len(heads), len(heads)), np.nan), np.full((len(heads), len(heads)), np.nan)
    which = np.zeros((len(heads), len(heads)), dtype=int)
    for i, writer in enumerate(heads):
        own = matrices[writer][1]
        some = own._replace(v=own.v[own.sigma >= 0.01 * own.sigma[0]])
        for j, reader in enumerate(heads):
            if reader[0] > writer[0]:
                scores = component_scores(some, matrices[reader][0].qk)
                which[i, j] = int(scores.argmax())
                best[i, j] = float(scores.max())
                whole[i, j] = composition(matrices[writer][0].ov, matrices[reader][0].qk)
    return best, whole, which


def pair_effects(model: Any, heads: list[tuple[int, int]], clean: Any, corrupt: Any) -> Any:
    """Mean damage by the path from each writer to each later reader's query, [writer, reader], NaN elsewhere."""
    from regard.steer.paths import head_paths
    from regard.watch.intervene import Site

    readers = [head for head in heads if head[0] > 0]
    sites = [Site(layer, "q", head=head, pos=-1) for layer, head in readers]
    both = inputs_of(model, clean), inputs_of(model, corrupt)
    effect = head_paths(model, *both, sites, gap(clean, corrupt)).mean("sample").values
    out = np.full((len(heads), len(heads)), np.nan)
    for j, reader in enumerate(readers):
        for i, writer in enumerate(heads):
            out[i, heads.index(reader)] = effect[j, writer[0], writer[1]]
    return out


def _scores(matrices: Any, heads: Any, best: Any, whole: Any, which: Any, seed: int) -> Finding:
    pairs = np.argwhere(~np.isnan(best))
    some = pairs[np.random.default_rng(seed).choice(len(pairs), size=min(20, len(pairs)), replace=False)]
    gaps = []
    for i, j in some.tolist():
        (first, own), (second, _) = matrices[heads[i]], matrices[heads[j]]
        ov, qk = ((m.left @ m.right).double() for m in (first.ov, second.qk))
        gaps.append(abs(float((ov @ qk).norm() / ov.norm() / qk.norm()) / whole[i, j] - 1))
        v = own.v[which[i, j]].double()
        gaps.append(abs(float((v @ qk).norm() / qk.norm()) / best[i, j] - 1))
    chance = float(next(iter(matrices.values()))[0].ov.right.shape[1]) ** -0.5
    means = [float(np.nanmean(x)) / chance for x in (best, whole)]
    reason = (
        f"over {chance:.3f}, which random matrices score, the best component has {means[0]:.2f} and the whole "
        f"matrix {means[1]:.2f} on average"
    )
    return Finding("scores", verdict(max(gaps) <= 1e-4), float(max(gaps)), floor=0.0, reason=reason)


def correlation(scores: Any, effects: Any) -> float:
    """Spearman over the pairs that have both."""
    kept = ~np.isnan(scores) & ~np.isnan(effects)
    return evidence.spearman(scores[kept], np.abs(effects[kept]))


def _components(best: Any, whole: Any, effects: Any, seed: int) -> Finding:
    items = np.stack([best, whole, effects], axis=-1)
    items = items[~np.isnan(best).all(1)]
    figure, beside = correlation(best, effects), correlation(whole, effects)
    interval = evidence.bootstrap(items, lambda x: correlation(x[..., 0], x[..., 2]), draws=500, seed=seed)
    low, high = evidence.bootstrap(
        items,
        lambda x: correlation(x[..., 0], x[..., 2]) - correlation(x[..., 1], x[..., 2]),
        draws=500,
        seed=seed,
    )
    details: dict[str, Any] = {"difference": [figure - beside, low, high], "pairs": int((~np.isnan(best)).sum())}
    details["largest effects"] = [
        [*map(int, np.unravel_index(i, effects.shape)), float(effects.flat[i])]
        for i in np.argsort(-np.nan_to_num(np.abs(effects)), axis=None)[:10]
    ]
    reason = f"best component less whole matrix: {figure - beside:.3f} ({low:.3f} to {high:.3f})"
    state = verdict(figure > 0.3 and low > 0)
    return Finding("components", state, figure, interval, 0.0, 1.0, beside, reason, details)


def scaled(model: Any, writer: tuple[int, int], out: Any, v: Any, alpha: float, inputs: Any) -> list[Any]:
    """The edit that scales what a head writes along v, in the last token of these inputs.

    z W_O = c v + rest, c = z W_O v^T; v lies in the rows of W_O, so `v W_O^+` is the z that writes it alone.
    """
    import torch

    from regard.watch.intervene import Edit, Site, trace

    site = Site(writer[0], "z", head=writer[1], pos=-1)
    z = trace(model, inputs, site)[site]
    along = (v @ torch.linalg.pinv(out)).to(z)
    return [Edit(site, "set", value=z + (alpha - 1) * (z @ (out @ v).to(z))[:, None] * along)]


def inhibition(
    model: Any, parts: Any, heads: list[Any], matrices: Any, best: Any, which: Any, clean: Any
) -> dict[str, Any]:
    """The component whose removal turns its reader most from receiver to giver, of the best-scoring pairs."""
    from regard.watch.intervene import Site, trace

    inputs = inputs_of(model, clean)
    order = np.argsort(-np.nan_to_num(best), axis=None)[:CANDIDATES]
    rows = np.arange(len(clean))
    place = {name: clean.spans[name][:, 0].numpy() for name in ("s1", "io")}
    found = []
    for pair in order.tolist():
        i, j = divmod(pair, len(heads))
        (writer, reader), own = (heads[i], heads[j]), matrices[heads[i]]
        site = Site(reader[0], "weights", head=reader[1], pos=-1)
        edits = scaled(model, writer, own[0].ov.right, own[1].v[which[i, j]], 0.0, inputs)
        change = (trace(model, inputs, site, edits=edits)[site] - trace(model, inputs, site)[site]).cpu().numpy()
        effect = float((change[rows, place["s1"]] - change[rows, place["io"]]).mean())
        found.append({"writer": writer, "reader": reader, "component": int(which[i, j]), "inhibition": effect})
    return max(found, key=lambda x: x["inhibition"])


def drawn_lists(n: int, generator: Any) -> list[Any]:
    """Lists of 9 to 20 items, batches of one length each."""
    from regard.tasks.lists import ColouredObjects

    return [ColouredObjects(LISTS).batch(min(ROWS, n - i), generator) for i in range(0, n, ROWS)]


def right(model: Any, batches: list[Any], writer: Any, out: Any, v: Any, alpha: float) -> Any:
    """1 for each list that comes out right with the component scaled."""
    return np.concatenate(
        [
            answered(model, b, scaled(model, writer, out, v, alpha, inputs_of(model, b))).double().numpy()
            for b in batches
        ]
    )


def _lists(model: Any, matrices: Any, picked: dict[str, Any], size: str, seed: int, generator: Any) -> Finding:
    choose, test = drawn_lists(CHOSEN_ON[size], generator), drawn_lists(TESTED_ON[size], generator)
    plain = np.concatenate([answered(model, b).double().numpy() for b in test])
    pool = [(head, c) for head, (_, own) in matrices.items() for c in range(len(own.sigma))]
    pool = [x for x in pool if x != (tuple(picked["writer"]), picked["component"])]
    index = np.random.default_rng(seed).choice(len(pool), size=RANDOM[size], replace=False)
    results = []
    for head, c in [(tuple(picked["writer"]), picked["component"]), *(pool[i] for i in index)]:
        own = matrices[head]
        out, v = own[0].ov.right, own[1].v[c]
        curve = [float(right(model, choose, head, out, v, alpha).mean()) for alpha in FACTORS]
        _, _, alpha = max((gained, -abs(a - 1), a) for gained, a in zip(curve, FACTORS, strict=True))
        results.append((alpha, curve, right(model, test, head, out, v, alpha)))
    top = results[0][2]
    others = np.mean([r[2] for r in results[1:]], axis=0)
    gained, low, high = evidence.paired_difference(top, plain, seed=seed)
    above, above_low, above_high = evidence.paired_difference(top, others, seed=seed)
    details = {
        **picked,
        "plain": float(plain.mean()),
        "factors": [r[0] for r in results],
        "curves": [r[1] for r in results],
        "over_random": [above, above_low, above_high],
    }
    reason = (
        f"{100 * plain.mean():.1f}% right as they are; component {picked['component']} of head {picked['writer']} "
        f"times {results[0][0]:g}; {100 * above:.1f} points over random ones "
        f"({100 * above_low:.1f} to {100 * above_high:.1f})"
    )
    return Finding(
        "lists",
        verdict(low > 0 and above_low > 0),
        100 * gained,
        (100 * low, 100 * high),
        floor=0.0,
        ceiling=100 * (1 - float(plain.mean())),
        baseline=100 * float(others.mean() - plain.mean()),
        reason=reason,
        details=details,
    )
