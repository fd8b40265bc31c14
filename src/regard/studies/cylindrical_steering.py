"""The cylindrical representation hypothesis (arXiv 2605.01844): why a steering vector serves some samples only.

On the testbed of roles the concept is level 5. A sample is a prompt of four words that sound like the low levels, said
by `nobody`; with the concept, the same words said by a role of level 5. Their difference at the last token, after half
of the blocks, is the sample's own axis. The steering vector comes from other samples. It is added at every token, whole
or with a share rho of its part beside the sample's axis taken away. The words that follow show the concept where the
generator's posterior mean of the level is 4 or more; they are corrupted where they are no words of a document, or less
likely than 99 % of nobody's own.

Strengths are multiples of the vector, and a sample's words are drawn with the same random numbers at every strength and
rho. A sample that never shows an outcome counts as showing it one step after the last strength.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "cylindrical-steering"
MODEL = "testbed:roles"
CLAIMS = [
    Claim(
        "split",
        "the two parts add up to the vector: all of it without a penalty, along the axis with the full one",
        kind="instrument",
        ours="largest gap over the vector's length",
        holds_if="at most 1e-5",
    ),
    Claim(
        "concept-later",
        "without the part beside a sample's axis the concept shows later",
        kind="mechanism",
        ours="first strength with the concept at rho = 1 less that at rho = 0, in steps of the grid",
        holds_if="better than 0, for every way to build the vector",
    ),
    Claim(
        "corruption-later",
        "and so does corruption",
        kind="mechanism",
        ours="first strength with corrupted words at rho = 1 less that at rho = 0, in steps of the grid",
        holds_if="better than 0",
    ),
    Claim(
        "exponents",
        "how steerable a sample is goes with sin^m cos^(k - m) of its angle, over ||v_d||^k, with one peak over k",
        kind="mechanism",
        ours="correlation on one half of the samples at the exponents fitted on the other; the baseline is the 95th "
        "percentile over permuted angles",
        holds_if="above the baseline, with one peak over k",
    ),
    Claim(
        "unlike",
        "samples with like axes are not alike in how steerable they are",
        kind="mechanism",
        paper="r = -0.034 (second-hand)",
        ours="correlation over pairs of the cosine of two axes with the likeness of their steerability",
        holds_if="within 0.1 of 0",
    ),
]
WORDS = 4
FIT = 128
SAMPLES = {"smoke": 32, "full": 500}
SEEDS = {"smoke": 3, "full": 3}
STRENGTHS = {"smoke": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), "full": tuple(np.geomspace(0.125, 16, 25).tolist())}
PENALTIES = {"smoke": (0.0, 0.5, 1.0), "full": tuple(np.linspace(0, 1, 20).tolist())}
WAYS = ("mean", "principal", "probe")
# Of the slopes: documents a sample and strength, and strengths; those count where the concept is on the rise.
REPEATS, RISE = 8, (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
SLOPES = {"smoke": 120, "full": 500}
POWERS = np.arange(0, 4.25, 0.5)
LEAST = 0.1
CHUNK = 4096


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Vectors from some samples, steering of others with and without the part beside their axes, once a seed."""
    from regard.studies.granularity_axis import Roles
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    bed = Roles(loaded.model, device)
    bed.layer = len(bed.parts) // 2 - 1
    found = [judge(bed, size, s) for s in range(seed, seed + SEEDS[size])]
    findings = [_split(found), _concept(found), _corruption(found)]
    slopes = steerability(bed, SLOPES[size], seed)
    if slopes["slope"].std() == 0:
        reason = "all samples are equally steerable"
        return findings + [Finding(c, "not measured", reason=reason) for c in ("exponents", "unlike")]
    return [*findings, exponents(slopes, seed), unlike(slopes, seed)]


def prompts(bed: Any, n: int, generator: Any) -> tuple[Any, Any]:
    """n prompts without the concept and the same with it, [n, 2 + WORDS]."""
    import torch

    task, words = bed.task, bed.task.vocabulary
    drawn = task.batch(8 * n, generator, torch.full((8 * n,), task.n_roles)).input_ids[:, : 2 + WORDS]
    low = (task.judge(drawn[:, 2:]) < 2.5).nonzero()[:n, 0]
    if len(low) < n:
        raise RuntimeError(f"only {len(low)} of {8 * n} prompts sound like the low levels, {n} are needed")
    without = drawn[low]
    told = without.clone()
    first = words["role0"] + (task.registers - 1) * task.roles
    told[:, 1] = first + torch.randint(task.roles, (n,), generator=generator)
    return without.to(bed.device), told.to(bed.device)


def at_last(bed: Any, ids: Any) -> Any:
    """The states of prompts that an axis is the difference of, [n, dim]."""
    from regard.watch.intervene import Site, trace

    site = Site(bed.layer, "resid_post", pos=-1)
    return trace(bed.model, {"input_ids": ids}, site, anatomy=bed.parts)[site]


def vector(bed: Any, way: str, generator: Any) -> Any:
    """A steering vector from samples of its own, all ways at the length of the mean difference, [dim]."""
    import torch

    from regard.steer.directions import principal, ridge

    without, told = (at_last(bed, ids) for ids in prompts(bed, FIT, generator))
    mean = (told - without).mean(0)
    if way == "mean":
        return mean
    if way == "principal":
        found = principal(torch.cat([told - without, without - told]), 1).directions[0]
    else:
        labels = torch.cat([torch.ones(len(told), 1), -torch.ones(len(told), 1)]).to(told)
        found = ridge(torch.cat([told, without]), labels, float(without.var() * FIT / 10)).weight[:, 0]
    return found * mean.norm() / found.norm() * (found @ mean).sign()


def judge(bed: Any, size: str, seed: int) -> dict[str, Any]:
    """One seed: outcomes of every sample by way, penalty and strength, and the gap of the split."""
    import torch

    from regard.steer.directions import axis_split

    generator = torch.Generator().manual_seed(1_000_003 * seed + 41)
    without, told = prompts(bed, SAMPLES[size], generator)
    axis = at_last(bed, told) - at_last(bed, without)
    floor, steps = likely(bed, generator), bed.task.words - WORDS
    numbers = torch.rand(len(without), steps, generator=generator)
    outcomes, gaps = {}, []
    for way in WAYS:
        v = vector(bed, way, generator)
        along, beside = axis_split(v.expand_as(axis), axis)
        cosine = (along * axis).sum(-1, keepdim=True) / axis.norm(dim=-1, keepdim=True) / v.norm()
        formula = v.norm() * cosine * axis / axis.norm(dim=-1, keepdim=True)
        sine = beside.norm(dim=-1, keepdim=True) / v.norm()
        pieces = [along + beside - v, along - formula, cosine**2 + sine**2 - 1]
        gaps.append(float(max(p.abs().max() for p in pieces) / v.norm()))
        whole = torch.stack([along + (1 - rho) * beside for rho in PENALTIES[size]])
        step = whole[:, None] * torch.tensor(STRENGTHS[size]).to(whole)[:, None, None]  # [penalty, strength, n, dim]
        times = step.shape[0] * step.shape[1]
        rows = steered(bed, without.repeat(times, 1), step.flatten(0, 2), numbers.repeat(times, 1), floor)
        outcomes[way] = {k: x.reshape(step.shape[:3]) for k, x in rows.items()}
    plain = steered(bed, without, torch.zeros_like(axis), numbers, floor)
    return {"outcomes": outcomes, "gap": max(gaps), "plain": {k: float(v.mean()) for k, v in plain.items()}}


def likely(bed: Any, generator: Any) -> float:
    """The first percentile of the likelihood of nobody's own words, as many as follow a prompt."""
    import torch

    ids = bed.task.batch(2000, generator, torch.full((2000,), bed.task.n_roles)).input_ids
    return float(bed.task.log_marginal(ids[:, 2 + WORDS :]).quantile(0.01))


def steered(bed: Any, ids: Any, step: Any, numbers: Any, floor: float) -> dict[str, Any]:
    """Whether the words after each prompt show the concept, and whether they are corrupted."""
    import torch

    from regard.tasks.sampling import sample
    from regard.watch.intervene import Edit, intervene

    shown, corrupted = [], []
    for rows in torch.arange(len(ids)).split(CHUNK):
        edit = Edit(bed.site(), "add", value=step[rows][:, None])
        with intervene(bed.model, edit, anatomy=bed.parts):
            words = sample(bed.model, ids[rows], numbers[rows]).cpu()
        whole = bed.words[words].all(1)
        told = torch.full((len(words),), -torch.inf, dtype=torch.float64)
        told[whole] = bed.task.log_marginal(words[whole])
        shown.append((bed.task.judge(words) >= 4).double())
        corrupted.append((told < floor).double())
    return {"concept": torch.cat(shown).numpy(), "corrupted": torch.cat(corrupted).numpy()}


def first(outcome: Any) -> Any:
    """The number of the first strength with the outcome, [..., n] of [..., strength, n]; one past the last for none."""
    return np.where(outcome.any(-2), outcome.argmax(-2), outcome.shape[-2]).astype(float)


def steerability(bed: Any, n: int, seed: int) -> dict[str, Any]:
    """Slope of the share of concept on strength of n samples, with their axes and angles to the mean difference."""
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * seed + 53)
    v = vector(bed, "mean", generator)
    without, told = prompts(bed, n, generator)
    axis = at_last(bed, told) - at_last(bed, without)
    numbers = torch.rand(n * REPEATS, bed.task.words - WORDS, generator=generator)
    ids = without.repeat_interleave(REPEATS, 0)
    share = [
        steered(bed, ids, strength * v.expand(len(ids), -1), numbers, -np.inf)["concept"].reshape(n, REPEATS).mean(1)
        for strength in RISE
    ]
    unit = axis / axis.norm(dim=-1, keepdim=True)
    mean = np.mean(share, axis=1)
    # Beyond the rise slopes tell where it was, not how steep.
    rise = np.flatnonzero((mean > 0.02) & (mean < 0.98))
    rise = rise if len(rise) > 1 else np.arange(len(RISE))
    centred = np.array(RISE)[rise] - np.mean(np.array(RISE)[rise])
    return {
        "slope": np.stack(share, 1)[:, rise] @ centred / (centred @ centred),
        "share": mean.tolist(),
        "length": axis.norm(dim=-1).double().cpu().numpy(),
        "cosine": (unit @ (v / v.norm())).double().cpu().numpy(),
        "alike": (unit @ unit.T).double().cpu().numpy(),
    }


def exponents(found: dict[str, Any], seed: int) -> Finding:
    """Exponents fitted on half of the samples with an acute angle, judged on the others against permuted angles."""
    generator = np.random.default_rng(seed)
    usable = generator.permutation(np.flatnonzero(found["cosine"] > 0))
    halves = usable[: len(usable) // 2], usable[len(usable) // 2 :]

    def correlation(rows: Any, k: float, m: float, angles: Any = None) -> float:
        cosine = found["cosine"][rows if angles is None else angles]
        geometry = np.sqrt(1 - cosine**2) ** m * cosine ** (k - m)
        relative = found["slope"][rows] / found["length"][rows] ** k
        return float(np.corrcoef(relative, geometry)[0, 1]) if geometry.std() * relative.std() > 0 else 0.0

    best = [max((correlation(halves[0], k, m), m) for m in POWERS[k >= POWERS]) for k in POWERS]
    peak = int(np.argmax([r for r, _ in best]))
    k, m = float(POWERS[peak]), float(best[peak][1])
    curve = [correlation(halves[1], float(POWERS[i]), float(b)) for i, (_, b) in enumerate(best)]
    rises = np.sign(np.diff(curve))
    one = bool((np.diff(rises[rises != 0]) <= 0).all())
    figure = correlation(halves[1], k, m)
    chance = [correlation(halves[1], k, m, generator.permutation(halves[1])) for _ in range(500)]
    p = (1 + sum(c >= figure for c in chance)) / 501
    rows = np.stack([halves[1]], 1)
    interval = evidence.bootstrap(rows, lambda r: correlation(r[:, 0].astype(int), k, m), draws=500, seed=seed)
    baseline = float(np.quantile(chance, 0.95))
    details = {"k": POWERS.tolist(), "curve": curve, "m": [float(b) for _, b in best], "p": p}
    details["share"] = found["share"]
    reason = f"k = {k:g}, m = {m:g}; {len(usable)} samples, p = {p:.3f}; {'one peak' if one else 'several peaks'}"
    return Finding(
        "exponents", verdict(figure > baseline and one), figure, interval, 0.0, 1.0, baseline, reason, details
    )


def unlike(found: dict[str, Any], seed: int) -> Finding:
    """Pairs of samples: the cosine of their axes against minus the difference of their slopes."""

    def correlation(rows: Any) -> float:
        at = rows[:, 0].astype(int)
        a, b = np.triu_indices(len(at), 1)
        apart = at[a] != at[b]  # a sample drawn twice is no pair
        a, b = at[a][apart], at[b][apart]
        return float(np.corrcoef(found["alike"][a, b], -np.abs(found["slope"][a] - found["slope"][b]))[0, 1])

    samples = np.arange(len(found["slope"]))[:, None]
    figure, (low, high) = correlation(samples), evidence.bootstrap(samples, correlation, draws=200, seed=seed)
    reason = f"{len(samples)} samples; a correlation beyond {(high - low) / 2:.3f} would have been seen"
    return Finding("unlike", verdict(abs(figure) <= 0.1), figure, (low, high), 0.0, reason=reason)


def _split(found: list[dict[str, Any]]) -> Finding:
    worst = max(f["gap"] for f in found)
    return Finding("split", verdict(worst <= 1e-5), worst, floor=0.0, reason=f"{len(WAYS)} vectors a seed, float32")


def later(found: list[dict[str, Any]], way: str, kind: str) -> tuple[float, tuple[float, float], Any]:
    """First strength with an outcome without the part beside the axis less that with it: mean, interval, by penalty."""
    at = np.stack([first(f["outcomes"][way][kind]) for f in found])  # [seed, penalty, n]
    steps = at[:, -1] - at[:, 0]
    return float(steps.mean()), evidence.seeds_and_items(steps), at.mean((0, 2))


def _concept(found: list[dict[str, Any]]) -> Finding:
    each = {way: later(found, way, "concept") for way in WAYS}
    figure, interval, _ = each["mean"]
    details: dict[str, Any] = {w: {"later": f, "interval": i, "first": at.tolist()} for w, (f, i, at) in each.items()}
    details["shown"] = {w: np.mean([f["outcomes"][w]["concept"].mean(-1) for f in found], 0).tolist() for w in WAYS}
    plain = float(np.mean([f["plain"]["concept"] for f in found]))
    shown = "; ".join(f"{w} {f:.2f} ({i[0]:.2f} .. {i[1]:.2f})" for w, (f, i, _) in each.items())
    reason = f"{shown}; unsteered {plain:.1%} show the concept"
    state = verdict(all(i[0] > 0 for _, i, _ in each.values()))
    return Finding("concept-later", state, figure, interval, 0.0, reason=reason, details=details)


def _corruption(found: list[dict[str, Any]]) -> Finding:
    by_strength = np.mean([f["outcomes"]["mean"]["corrupted"][0].mean(-1) for f in found], 0)
    plain = float(np.mean([f["plain"]["corrupted"] for f in found]))
    details = {"corrupted": by_strength.tolist(), "plain": plain}
    if by_strength[-1] < LEAST:
        reason = (
            f"steering does not corrupt this testbed: {by_strength[-1]:.1%} of words at the largest strength are less "
            f"likely than 99% of the generator's, {plain:.1%} unsteered; {LEAST:.0%} are needed"
        )
        return Finding("corruption-later", "not measured", reason=reason, details=details)
    each = {way: later(found, way, "corrupted") for way in WAYS}
    details |= {w: {"later": f, "interval": i, "first": at.tolist()} for w, (f, i, at) in each.items()}
    figure, interval, _ = each["mean"]
    reason = f"{by_strength[-1]:.1%} of words are corrupted at the largest strength, {plain:.1%} unsteered"
    return Finding("corruption-later", verdict(interval[0] > 0), figure, interval, 0.0, reason=reason, details=details)
