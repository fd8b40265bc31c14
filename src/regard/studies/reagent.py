"""ReAGent (arXiv 2402.00794): token importance by repeated random replacement, and how faithful it is.

Lists of 8 coloured objects, the longest that the testbed is trained on. Three tokens matter: the object asked for,
where it stands in the list, and its colour before it. The metric of the other methods is the probability of the answer,
their scores without sign. Replacements come from bigrams of other lists. The first token is the beginning of all
sequences and is left out of every ranking.

In so short a prompt the paper's stopping rule is met by luck: with k = 3 and 8 tokens kept, of 27, the colour asked for
is soon among the model's first three. So k = 1 here, 3 tokens are kept, as many as matter, and the rule is looked at
every 25 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "reagent"
MODEL = "testbed:lists"
CLAIMS = [
    Claim(
        "step",
        "a step adds logit((D + 1) / 2) to the scores of what it replaced and takes it from the others'",
        kind="instrument",
        ours="largest gap between the scores after one step and those of the formula with plain forward passes",
        holds_if="at most 1e-6",
    ),
    Claim(
        "planted",
        "replacement finds the tokens that decide, and attention finds them less well",
        kind="mechanism",
        ours="area under the ROC curve of the object asked for, its place in the list and its colour among all tokens; "
        "the baseline is that of the mean weight received",
        holds_if="at least 0.8, and better than the baseline",
    ),
    Claim(
        "faithful",
        "its scores are more faithful than those of other methods",
        kind="mechanism",
        paper="more faithful than seven popular methods on six decoders",
        ours="smallest difference, over six methods, random scores and both measures (Soft-NS, Soft-NC), of ReAGent's "
        "mean less the other's",
        holds_if="better than each, in both measures",
    ),
    Claim(
        "replication",
        "the same on six language models",
        kind="replication",
        paper="more faithful than seven popular methods on six decoders",
        ours="Soft-NS and Soft-NC",
        holds_if="better than each method on each model",
        waits="needs six decoders of 125M to 6.7B parameters from the hub, and RoBERTa to propose replacements",
    ),
]
PROMPTS = {"smoke": 10, "full": 200}
STEPS, RUNS, CHECK, KEEP, FIRST = 300, 5, 25, 3, 1
RATIO = 0.3
ITEMS = 8
MASKS, POINTS, SAMPLES = 20, 50, 512
RELEVANT = ("query", "object", "colour")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """ReAGent on new lists, mean attention beside it, and in size full six methods with their faithfulness."""
    import torch

    from regard.studies.circuit_reuse import answered, inputs_of
    from regard.studies.testbed import below_gate
    from regard.tasks.lists import ColouredObjects
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return unmeasured(CLAIMS, reason)
    generator = torch.Generator().manual_seed(seed)
    task, n = ColouredObjects(ITEMS), PROMPTS[size]
    drawn = task.batch(4 * n, generator)
    keep = answered(loaded.model, drawn).nonzero()[:n, 0]
    if len(keep) < n:
        reason = f"the model answers only {len(keep)} of {4 * n} lists of {ITEMS} rightly, {n} are needed"
        return unmeasured(CLAIMS, reason)
    batch = drawn[keep]
    inputs, answer = inputs_of(loaded.model, batch), batch.input_ids[:, -1].to(device)
    scores = {"reagent": replaced(loaded.model, inputs, answer, task, generator, seed)}
    for name in OTHERS if size == "full" else OTHERS[:1]:
        scores[name] = by_method(name, loaded.model, inputs, answer, seed)
    found = [_step(loaded.model, inputs, answer, task, seed), _planted(batch, scores, seed)]
    if size == "smoke":
        reason = "in size full alone: 200 prompts, six methods, 20 masks each"
        return [*found, Finding("faithful", "not measured", reason=reason)]
    scores["random"] = torch.rand(scores["reagent"].shape, generator=generator)
    return [*found, _faithful(loaded.model, inputs, scores, seed)]


def replaced(model: Any, inputs: Any, answer: Any, task: Any, generator: Any, seed: int) -> Any:
    """ReAGent's scores, [prompt, token]."""
    from regard.steer.reagent import bigrams, reagent

    sampler = bigrams(task.batch(2000, generator).input_ids[:, :-1], len(task.vocabulary))
    how: dict[str, Any] = {
        "k": FIRST,
        "keep": KEEP,
        "ratio": RATIO,
        "steps": STEPS,
        "runs": RUNS,
        "check": CHECK,
        "seed": seed,
    }
    return reagent(model, inputs, answer, sampler, **how).cpu()


def one_step(model: Any, inputs: Any, answer: Any, sampler: Any, seed: int) -> Any:
    """The scores after one step of one run from the paper's formula, [prompt, token]."""
    import torch

    ids, generator = inputs["input_ids"], torch.Generator().manual_seed(seed)

    def believed(tokens: Any) -> Any:
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": tokens}).logits[:, -1].double()
        return logits.softmax(-1).gather(1, answer[:, None])[:, 0]

    start = torch.rand(ids.shape, generator=generator).double()
    drawn = torch.rand(ids.shape, generator=generator) < RATIO
    other = torch.where(drawn.to(ids.device), sampler(ids, generator), ids)
    half = (believed(ids) - believed(other) + 1).cpu() / 2
    change = (half.log() - (1 - half).log())[:, None]
    return (start + torch.where(drawn, change, -change)).softmax(-1)


def _step(model: Any, inputs: Any, answer: Any, task: Any, seed: int) -> Finding:
    import torch

    from regard.steer.reagent import bigrams, reagent

    ids = task.batch(200, torch.Generator().manual_seed(seed)).input_ids[:, :-1]
    sampler = bigrams(ids, len(task.vocabulary))
    found = reagent(model, inputs, answer, sampler, ratio=RATIO, k=FIRST, keep=KEEP, steps=1, runs=1, seed=seed).cpu()
    worst = float((found - one_step(model, inputs, answer, sampler, seed)).abs().max())
    reason = f"{len(found)} prompts of {found.shape[1]} tokens"
    return Finding("step", verdict(worst <= 1e-6), worst, floor=0.0, reason=reason)


def by_method(name: str, model: Any, inputs: Any, answer: Any, seed: int) -> Any:
    """Another method's scores without their sign, [prompt, token]."""
    from regard.steer import attribution, flow
    from regard.watch.effects import probability

    metric = probability(answer)
    methods: dict[str, Callable[[], Any]] = {
        "attention": lambda: flow.attention_mean(model, inputs),
        "rollout": lambda: flow.rollout(model, inputs),
        "gradient x input": lambda: attribution.grad_x_input(model, inputs, metric),
        "integrated gradients": lambda: attribution.integrated_gradients(model, inputs, metric, steps=POINTS),
        "occlusion": lambda: attribution.occlusion(model, inputs, metric),
        "lime": lambda: attribution.lime(model, inputs, metric, samples=SAMPLES, seed=seed),
    }
    return methods[name]().detach().abs().cpu()


OTHERS = ("attention", "rollout", "gradient x input", "integrated gradients", "occlusion", "lime")


def planted(batch: Any, scores: Any) -> Any:
    """Area under the ROC curve of the tokens that decide, one a prompt; the first token is left out."""
    relevant = np.zeros(scores.shape, dtype=bool)
    for name in RELEVANT:
        relevant[np.arange(len(batch)), batch.spans[name][:, 0].numpy()] = True
    rows = zip(scores[:, 1:].numpy(), relevant[:, 1:], strict=True)
    return np.array([evidence.auc(s, r) for s, r in rows])


def _planted(batch: Any, scores: dict[str, Any], seed: int) -> Finding:
    each = {name: planted(batch, s) for name, s in scores.items()}
    own, beside = each["reagent"], each["attention"]
    difference = evidence.paired_difference(own, beside, seed=seed)
    figure = float(own.mean())
    details = {"auroc": {name: float(x.mean()) for name, x in each.items()}, "over_attention": difference}
    reason = f"{len(own)} lists of {ITEMS}, {STEPS} steps; over attention {difference[0]:.3f} ({difference[1]:.3f} to "
    reason += f"{difference[2]:.3f})"
    state = verdict(figure >= 0.8 and difference[1] > 0)
    interval = evidence.bootstrap(own, seed=seed)
    return Finding("planted", state, figure, interval, 0.5, 1.0, float(beside.mean()), reason, details)


def _faithful(model: Any, inputs: Any, scores: dict[str, Any], seed: int) -> Finding:
    from regard.steer.faithfulness import soft_faithfulness

    device = inputs["input_ids"].device
    found = {}
    for name, s in scores.items():
        both = soft_faithfulness(model, inputs, s.to(device), masks=MASKS, seed=seed)
        found[name] = {k: v.double().cpu().numpy() for k, v in both._asdict().items()}
    gaps = {}
    for kind, own in found["reagent"].items():
        for name in found:
            if name != "reagent":
                gaps[f"{kind} over {name}"] = evidence.paired_difference(own, found[name][kind], seed=seed)
    worst = min(gaps, key=lambda name: gaps[name][0])
    figure, low, high = gaps[worst]
    details = {
        "means": {name: {k: float(v.mean()) for k, v in x.items()} for name, x in found.items()},
        "differences": gaps,
    }
    behind = [name for name, (_, bound, _) in gaps.items() if bound <= 0]
    reason = f"smallest is {worst}; {len(behind)} of {len(gaps)} comparisons not better than 0"
    return Finding("faithful", verdict(not behind), figure, (low, high), floor=0.0, reason=reason, details=details)
