"""Retrieval heads (arXiv 2404.15574): heads whose top key is the needle token being copied.

Needles are teacher-forced: the row before each answer token is judged, so that one forward pass gives all steps of a
test. The needle is the code that the answer repeats, so a head that copies all of it scores 1. The floor is the score
where the code in the text is another one than the one asked for. Masking puts 1/n_i on the n_i keys a query may see
(`uniform`), at every row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "retrieval-heads"
CLAIMS = [
    Claim(
        "score",
        "the streamed copy-paste score of every head equals the one from the attention matrices",
        kind="instrument",
        ours="share of (head, test) scores that agree",
        holds_if="all agree",
    ),
    Claim(
        "few",
        "a small share of heads copies in at least half of its steps",
        kind="mechanism",
        paper="fewer than 5% of heads score >= 0.5",
        ours="share of heads that score >= 0.5",
        holds_if="below 0.05, with some head at 0.1 or more",
    ),
    Claim(
        "same-heads",
        "the same heads copy at short and at long context",
        kind="mechanism",
        paper="the same set of heads from 1K to 50K tokens",
        ours="Spearman correlation of the heads' scores at the shortest and the longest length",
        holds_if="above 0.7",
    ),
    Claim(
        "masking",
        "masking the heads that copy most breaks retrieval, masking as many others does not",
        kind="mechanism",
        paper="masking the top 30 heads breaks retrieval, 30 random ones do not",
        ours="points of exact match lost when the top 10% of heads are masked",
        holds_if="at least 50, and at most 10 for as many random heads that do not copy",
    ),
]
LENGTHS = {"smoke": (256, 512), "full": (256, 512, 1024)}
TESTS = {"smoke": 24, "full": 120}
DEPTHS = 10
GATE = 0.9
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Score every head at each length, then mask the best ones and as many others."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.needle import Needle
    from regard.tasks.retoken import batches
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    generator = torch.Generator().manual_seed(seed)
    tests, other = {}, {}
    for length in LENGTHS[size]:
        each = TESTS[size] // (DEPTHS if size == "full" else 1)
        depths = [d / (DEPTHS - 1) for d in range(DEPTHS)] if size == "full" else [None]
        tasks = [Needle(length, split="test", depth=d) for d in depths]
        tests[length] = [b for t in tasks for b in batches(loaded, t, each, generator)]
        other[length] = batches(loaded, OtherCode(tasks[0]), min(each, 8), generator)
    scores = {length: copy_scores(loaded.model, drawn) for length, drawn in tests.items()}
    floors = {n: float(copy_scores(loaded.model, drawn).mean(-1).max()) for n, drawn in other.items()}
    short, far = LENGTHS[size][0], LENGTHS[size][-1]
    findings = [_score(loaded.model, tests[short], scores[short])]
    if reason := below_gate(loaded, "needle_256", "needle_512", "copy_paste"):
        return findings + [Finding(c.id, "not measured", reason=reason) for c in CLAIMS[1:]]
    right = {length: exact(loaded.model, drawn) for length, drawn in tests.items()}
    findings += [_few(scores, floors), _same(scores[short], scores[far], floors, seed)]
    if right[far].mean() < GATE or right[short].mean() < GATE:
        shown = ", ".join(f"{100 * r.mean():.0f}% at {length}" for length, r in right.items())
        reason = f"testbed below its gate: exact match {shown}, {100 * GATE:.0f}% needed"
        return [*findings, Finding("masking", "not measured", reason=reason)]
    everything = np.concatenate(list(scores.values()), axis=-1).mean(-1)
    both = [b for length in (short, far) for b in tests[length]]
    before = np.concatenate([right[short], right[far]])
    return [*findings, _masking(loaded.model, both, everything, before, seed, curve=size == "full")]


class OtherCode:
    """The task with another code in the text than the one asked for: the rate that digits reach by chance."""

    def __init__(self, task: Any):
        self.task = task

    def batch(self, n: int, generator: Any) -> Any:
        """n sequences whose needle has random digits; the answer stays."""
        import torch

        batch = self.task.batch(n, generator)
        ids = batch.input_ids.clone()
        for row, (start, end) in enumerate(batch.spans["value"].tolist()):
            ids[row, start:end] = torch.randint(ord("0"), ord("9") + 1, (end - start,), generator=generator)
        return type(batch)(ids, batch.labels, batch.spans, batch.groups, batch.valid)


def copy_scores(model: Any, needles: list[Any]) -> np.ndarray[Any, Any]:
    """Copy-paste score of every head in every test, [layer, head, test]."""
    from regard.measures.registry import ratio
    from regard.tasks.probes import watch_needles

    atlas = watch_needles(model, needles)
    return ratio(atlas.need("copy_distinct"), atlas.need("needle_tokens")).values


def exact(model: Any, needles: list[Any], masked: list[tuple[int, int]] | None = None) -> np.ndarray[Any, Any]:
    """1 for each test whose answer tokens are all the model's first choice, with some heads masked."""
    import torch

    from regard.watch.heads import mask_heads
    from regard.watch.intervene import intervene

    device = next(model.parameters()).device
    right = []
    with torch.no_grad(), intervene(model, mask_heads(masked or [], "uniform")):
        for batch in needles:
            top = model(input_ids=batch.input_ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
            asked = batch.labels[:, 1:]
            right += ((top == asked) | (asked < 0)).all(-1).tolist()
    return np.array(right, dtype=np.float64)


def dense_scores(model: Any, batch: Any) -> np.ndarray[Any, Any]:
    """The same scores from the attention matrices, written from the definition."""
    from regard.studies.testbed import dense_weights

    scores = []
    for sample in batch:
        ids, (start, end) = sample.input_ids[0], sample.spans["value"][0].tolist()
        weights = dense_weights(model, sample.input_ids.to(next(model.parameters()).device))
        copied = np.zeros((*weights.shape[:2], len(ids)), dtype=bool)
        for place in (sample.labels[0] >= 0).nonzero().flatten().tolist():
            top = weights[:, :, place - 1].argmax(-1)
            hit = (top >= start) & (top < end) & (ids[top] == ids[place])
            for layer, head in hit.nonzero().tolist():
                copied[layer, head, top[layer, head]] = True
        scores.append(copied.sum(-1) / (end - start))
    return np.stack(scores, axis=-1)


def _score(model: Any, batches: list[Any], streamed: np.ndarray[Any, Any]) -> Finding:
    dense = dense_scores(model, batches[0])
    share = float(np.isclose(streamed[..., : dense.shape[-1]], dense, atol=1e-6).mean())
    reason = f"{dense.size} scores of {dense.shape[-1]} tests compared"
    return Finding("score", verdict(share == 1), share, ceiling=1.0, reason=reason)


def _few(scores: dict[int, np.ndarray[Any, Any]], floors: dict[int, float]) -> Finding:
    tests = np.concatenate([s.reshape(-1, s.shape[-1]) for s in scores.values()], axis=1)
    means = tests.mean(1)
    bands = {"0": means == 0, "0-0.1": (means > 0) & (means < 0.1), "0.1-0.5": (means >= 0.1) & (means < 0.5)}
    bands["0.5-1"] = means >= 0.5
    details: dict[str, Any] = {"shares": {k: float(v.mean()) for k, v in bands.items()}, "largest": float(means.max())}
    details["floors"] = floors
    if means.max() < 0.1:
        reason = f"no head copies: the largest score is {means.max():.3f}"
        return Finding("few", "not measured", reason=reason, details=details)
    share = float((means >= 0.5).mean())
    interval = evidence.bootstrap(tests.T, lambda t: float((t.mean(0) >= 0.5).mean()))
    reason = ", ".join(f"{v:.0%} of heads in {k}" for k, v in details["shares"].items())
    state = verdict(share < 0.05)
    return Finding("few", state, share, interval, reason=reason, details=details)


def _same(short: np.ndarray[Any, Any], far: np.ndarray[Any, Any], floors: dict[int, float], seed: int) -> Finding:
    def correlation(tests: np.ndarray[Any, Any]) -> float:
        half = tests.shape[1] // 2
        return evidence.spearman(tests[:, :half].mean(0), tests[:, half:].mean(0))

    # One row a test: the scores of all heads at the short length, then those at the long one.
    tests = np.concatenate([s.reshape(-1, s.shape[-1]).T for s in (short, far)], axis=1)
    if tests.mean(0).max() < 0.1:
        return Finding("same-heads", "not measured", reason="no head copies, so there is no order to keep")
    figure = correlation(tests)
    interval = evidence.bootstrap(tests, correlation, seed=seed)
    shown = ", ".join(f"{rate:.3f} at {length}" for length, rate in floors.items())
    state = verdict(figure > 0.7)
    reason = f"with another code in the text than the one asked for, the best head scores {shown}"
    return Finding("same-heads", state, figure, interval, floor=0.0, ceiling=1.0, reason=reason)


def _masking(
    model: Any,
    batches: list[Any],
    scores: np.ndarray[Any, Any],
    before: np.ndarray[Any, Any],
    seed: int,
    curve: bool,
) -> Finding:
    ranked = [divmod(int(i), scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]
    ranked = [lh for lh in ranked if not np.isnan(scores[lh])]
    n = max(1, round(0.1 * len(ranked)))
    others = [lh for lh in ranked[n:] if scores[lh] < 0.1]
    if len(others) < n:
        reason = f"copying is spread: only {len(others)} heads score below 0.1, {n} are needed to compare with"
        return Finding("masking", "not measured", reason=reason)
    lost, low, high = evidence.paired_difference(before, exact(model, batches, ranked[:n]), seed=seed)
    draws = evidence.random_equal(others, n, seed=seed)
    random_lost = [float((before - exact(model, batches, heads)).mean()) for heads in draws]
    details: dict[str, Any] = {"masked": ranked[:n], "random": random_lost, "exact_match": float(before.mean())}
    if curve:
        counts = sorted({max(1, round(share * len(ranked))) for share in SHARES})
        details["curve"] = {k: float((before - exact(model, batches, ranked[:k])).mean()) for k in counts}
    beside = 100 * float(np.mean(random_lost))
    each = ", ".join(f"{100 * x:.1f}" for x in random_lost)
    holds = 100 * lost >= 50 and beside <= 10
    return Finding(
        "masking",
        verdict(holds),
        100 * lost,
        (100 * low, 100 * high),
        floor=0.0,
        ceiling=100 * float(before.mean()),
        baseline=beside,
        reason=f"{n} of {len(ranked)} heads; as many random ones lose {beside:.1f} points, mean of draws: {each}",
        details=details,
    )
