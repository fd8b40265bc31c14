"""Causal tracing across modalities and IRI (arXiv 2511.05923): where a picture's object becomes an answer.

Questions that are to be answered with yes, on pictures drowned in noise of three times the pixels' deviation (one draw
a picture). One part of one layer at one class of tokens gets the clean run's values back; the recovery rate RR is the
share of p(yes) that returns, the mean over questions. IRI then writes what the layers of largest RR wrote at the last
token into later layers again. Its strength, sources and targets are chosen on other questions than it is judged on.

Our reading: questions with clean p(yes) over 0.8 of which noise takes 0.2 or more; the numbers of sources and targets
are 1 or 2 of 6 layers where the paper has 3 and 10 of 32. Questions end with the object's name and "?", so there is no
late text. The layers are those of the decoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "causal-tracing"
MODEL = "testbed:vlm"
CLAIMS = [
    Claim(
        "trivial",
        "putting back the whole stream of the last token after the last layer restores everything",
        kind="instrument",
        ours="largest distance of RR of (resid_post, last layer, last token) from 1",
        holds_if="at most 1e-4",
    ),
    Claim(
        "middle",
        "what attention writes at the last token in middle layers carries the effect",
        kind="mechanism",
        paper="the peak lies in the middle layers of LLaVA-1.5-7B",
        ours="largest RR of attn_out at the last token; the baseline is the largest at early visual tokens",
        holds_if="its layer is neither the first nor the last in every draw, and it beats the baseline by 0.3",
    ),
    Claim(
        "iri",
        "injecting the strongest outputs again answers more questions rightly",
        kind="mechanism",
        paper="POPE accuracy 4.89 points higher on average",
        ours="points of accuracy gained over the plain model; the baseline is the gain with RR permuted over layers",
        holds_if="above 0 and above the baseline, both by the paired 95% interval",
    ),
    Claim(
        "early",
        "injection within the first third of the layers does not help",
        kind="mechanism",
        paper="78.46% against 78.96% without",
        ours="points of accuracy gained where sources and targets lie in the first third of the layers",
        holds_if="the paired 95% interval is not above 0",
    ),
    Claim(
        "pope",
        "IRI on a large model",
        kind="replication",
        paper="LLaVA-1.5-7B and others on POPE: 4.89 points",
        ours="POPE accuracy",
        holds_if="better than plain",
        waits="needs a vision-language model from the hub and POPE's pictures",
    ),
]
QUESTIONS = {"smoke": 20, "full": 100}
DRAWS = {"smoke": 3, "full": 5}
TUNED, TESTED = 100, 400
NOISE, SURE, GAP, AHEAD = 3.0, 0.8, 0.2, 0.3
LEAST = 8
PARTS = ("attn_out", "mlp_out", "resid_post")
STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8)
SHAPES = ((1, 1), (1, 2), (2, 2), (2, 3))


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Trace questions of several draws, then inject."""
    from regard.studies.testbed import below_gate
    from regard.tasks.vlm import seer

    eye = seer(model, device)
    if reason := below_gate(eye.loaded):
        return unmeasured(CLAIMS, reason)
    chosen = [asked_and_sure(eye, QUESTIONS[size], seed + 1000 * draw) for draw in range(DRAWS[size])]
    if min(len(probes) for probes, _ in chosen) < LEAST:
        counted = ", ".join(str(len(probes)) for probes, _ in chosen)
        reason = f"premise not met: {counted} questions are answered surely and lost to noise, {LEAST} are needed"
        return unmeasured(CLAIMS, reason)
    grids = [traced(eye, *each) for each in chosen]
    return [_trivial(grids), _middle(grids), *_injected(eye, grids[0], seed, device)]


def asked_and_sure(eye: Any, n: int, seed: int) -> tuple[Any, Any]:
    """Up to n yes-questions that the model is sure of and noise makes it unsure of, and the noisy pictures."""
    import torch

    from regard.tasks.scene_text import token_classes

    pool = eye.questions(8 * n, seed)
    yes = pool.pick(pool.answers.nonzero()[:, 0])
    classes = token_classes(yes)
    whole = torch.stack([mask.any(1) for mask in classes.values()]).all(0)
    yes = yes.pick(whole.nonzero()[:, 0])
    pixels = yes.scenes.pixels
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed + 1))
    noisy = pixels + NOISE * pixels.std() * noise
    clean, lost = (chance(eye.model, {**yes.inputs, "pixel_values": x}) for x in (pixels, noisy))
    kept = ((clean > SURE) & (clean - lost >= GAP)).nonzero()[:n, 0]
    return yes.pick(kept), noisy[kept]


def chance(model: Any, inputs: dict[str, Any]) -> Any:
    """p(yes) after each question."""
    import torch

    from regard.tasks.scene_text import YES

    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False).logits[:, -1]
    return logits.float().softmax(-1)[:, YES].cpu()


def traced(eye: Any, probes: Any, noisy: Any) -> Any:
    """RR of every part, layer and class, [part, layer, class, sample]."""
    import torch

    from regard.models.vlm import decoder_parts
    from regard.steer.causal import patch_grid
    from regard.tasks.scene_text import YES, positions, token_classes
    from regard.watch.effects import probability

    device = next(eye.model.parameters()).device
    clean = {k: v.to(device) for k, v in probes.inputs.items()}
    classes: dict[str, Any] = {name: positions(mask) for name, mask in token_classes(probes).items()}
    return patch_grid(
        eye.model,
        clean,
        {**clean, "pixel_values": noisy.to(device)},
        PARTS,
        classes,
        probability(torch.full((len(probes),), YES, device=device)),
        anatomy=decoder_parts(eye.model, clean),
    )


def _trivial(grids: list[Any]) -> Finding:
    last = [g.sel({"part": "resid_post", "class": "last"}).isel(layer=-1).values for g in grids]
    gap = float(np.abs(np.concatenate(last) - 1).max())
    reason = f"{sum(len(x) for x in last)} questions; so this cell is no finding and is left out of the others"
    return Finding("trivial", verdict(gap <= 1e-4), gap, reason=reason)


def _middle(grids: list[Any]) -> Finding:
    curves = [g.sel({"part": "attn_out", "class": "last"}).values for g in grids]  # [layer, sample] each
    layers = [int(c.mean(1).argmax()) for c in curves]
    rates = [float(c.mean(1).max()) for c in curves]
    early = [float(g.sel({"part": "attn_out", "class": "early visual"}).mean("sample").max()) for g in grids]
    fewest = min(c.shape[1] for c in curves)
    peaks = np.stack([c[layer, :fewest] for c, layer in zip(curves, layers, strict=True)])
    figure, beside = float(np.mean(rates)), float(np.mean(early))
    between = all(0 < layer < len(c) - 1 for layer, c in zip(layers, curves, strict=True))
    means = sum(g.mean("sample").values for g in grids) / len(grids)
    details = {
        "classes": [str(c) for c in grids[0]["class"].values],
        "rr": {part: np.round(means[i], 4).tolist() for i, part in enumerate(PARTS)},
        "questions": [c.shape[1] for c in curves],
    }
    reason = f"of layers 0 to {len(curves[0]) - 1}, largest in {', '.join(map(str, layers))} (draws of questions)"
    state = verdict(between and figure - beside >= AHEAD)
    interval = evidence.seeds_and_items(peaks)
    return Finding("middle", state, figure, interval, 0.0, 1.0, beside, reason=reason, details=details)


def accuracy(eye: Any, probes: Any, injection: Any = None) -> Any:
    """1 for each question that is answered rightly, with an injection in force."""
    from contextlib import nullcontext

    from regard.tasks.hallucination import answer

    with injection or nullcontext():
        margins, _ = answer(eye.model, probes)
    return ((margins > 0) == probes.answers).double().numpy()


def _injected(eye: Any, grid: Any, seed: int, device: str) -> list[Finding]:
    import torch

    from regard.models.vlm import decoder_parts
    from regard.steer.iri import Injection

    tuning, test = eye.questions(TUNED, seed + 7), eye.questions(TESTED, seed + 8)
    parts = decoder_parts(eye.model, {k: v[:2].to(device) for k, v in tuning.inputs.items()})
    layers = len(parts)
    last = grid.sel({"class": "last"}).mean("sample")
    rates = {part: torch.from_numpy(last.sel(part=part).values.copy()).float() for part in ("attn_out", "mlp_out")}

    def inject(own: dict[str, Any], setting: tuple[float, tuple[int, int]]) -> Any:
        (strength, (sources, targets)) = setting
        return Injection(eye.model, own, sources=sources, targets=targets, lam=strength, anatomy=parts)

    def best(own: dict[str, Any], shapes: Any) -> tuple[float, tuple[int, int]]:
        settings = [(s, shape) for s in STRENGTHS for shape in shapes]
        return max(settings, key=lambda setting: accuracy(eye, tuning, inject(own, setting)).mean())

    chosen = best(rates, SHAPES)
    plain, ours = accuracy(eye, test), accuracy(eye, test, inject(rates, chosen))
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(layers) for _ in range(5)]
    permuted = [accuracy(eye, test, inject({k: v[o] for k, v in rates.items()}, chosen)) for o in orders]
    gain, low, high = evidence.paired_difference(ours, plain, seed=seed)
    over, over_low, over_high = evidence.paired_difference(ours, np.mean(permuted, axis=0), seed=seed)
    details: dict[str, Any] = {
        "plain": float(plain.mean()),
        "lam": chosen[0],
        "sources": chosen[1][0],
        "targets": chosen[1][1],
    }
    details["permuted"] = [float(p.mean()) for p in permuted]
    reason = (
        f"plain {100 * plain.mean():.1f}%, lam {chosen[0]}, {chosen[1][0]} sources, {chosen[1][1]} targets; over the "
        f"permuted {100 * over:.1f} points [{100 * over_low:.1f}, {100 * over_high:.1f}]"
    )
    iri = Finding(
        "iri",
        verdict(low > 0 and over_low > 0),
        100 * gain,
        (100 * low, 100 * high),
        floor=0.0,
        ceiling=100 * (1 - float(plain.mean())),
        baseline=100 * float(np.mean(permuted) - plain.mean()),
        reason=reason,
        details=details,
    )
    third = max(2, layers // 3)
    first = {k: torch.where(torch.arange(layers) < third, v, -torch.inf) for k, v in rates.items()}
    setting = best(first, ((1, 2), (2, 2)))
    gain, low, high = evidence.paired_difference(accuracy(eye, test, inject(first, setting)), plain, seed=seed)
    reason = f"layers 0 to {third - 1}, lam {setting[0]}, chosen on the same questions"
    early = Finding("early", verdict(low <= 0), 100 * gain, (100 * low, 100 * high), 0.0, reason=reason)
    return [iri, early]
