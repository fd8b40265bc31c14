"""Instruction tuning that costs context awareness (arXiv 2411.02688), on facts against a context that says otherwise.

The testbed is a model that has learned 200 facts and to answer from a context, before and after a short tuning in which
role words come in and memory alone is right in 90 % of the answers. A prompt is judged by its first choice, the object
that its context says. Before tuning there are no role words; the score of attention and the cells with the other
format are told beside. Both testbeds are shipped; `--model` names the tuned one. Attention is scored at the layer that
lies as deep as 15 of 22 does; the response is one word, so its row is the one that predicts it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "context-awareness"
MODEL = "testbed:conflict-sft"
CLAIMS = [
    Claim(
        "score",
        "the streamed score of attention to the user equals the one from the attention matrices",
        kind="instrument",
        ours="largest difference over layers and samples",
        holds_if="at most 1e-6",
    ),
    Claim(
        "loss",
        "with a chat template, tuned models answer from memory against the context",
        kind="mechanism",
        ours="share of answers from the context before tuning minus after, with the template; the baseline is after, "
        "without the template",
        holds_if="at least 0.15, and better",
    ),
    Claim(
        "attention",
        "with a chat template, tuned models attend less to what the user's context says",
        kind="mechanism",
        ours="most of any head's attention to the context at the scored layer, before tuning minus after; the baseline "
        "is the same for all the user's words",
        holds_if="better than 0",
    ),
    Claim(
        "steering",
        "attention turned towards the user's words brings the context back",
        kind="mechanism",
        ours="share of answers from the context with all other weights times 0.9 minus without; the baseline is "
        "that with the user's weights times 0.9 instead",
        holds_if="better than 0",
    ),
    Claim(
        "indicator",
        "marking context-dependent examples in tuning keeps the use of context, at no cost elsewhere",
        kind="mechanism",
        ours="share of answers from the context, tuned with marks by score minus tuned with as many random marks; the "
        "baseline is that against tuning without marks",
        holds_if="both better than 0, and memory accuracy down by less than 0.02",
    ),
]
PROMPTS = 128
DRAWS = {"smoke": 5, "full": 20}  # of the prompts
ALPHA = 0.9
LAYER = 2  # of 4, as 15 of 22
SEEDS, EXAMPLES, MARKED = 5, 4096, 0.1


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Compare the two stages; in size full tune three ways from the first one."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    before, after = load("testbed:conflict", device=device), load(model, device=device)
    for loaded in (before, after):
        if reason := below_gate(loaded):
            return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    seeds = [seed * 1000 + n for n in range(DRAWS[size])]
    findings = [
        _score(after.model, seed),
        _loss(before.model, after.model, seeds, seed),
        _attention(before.model, after.model, seeds, seed),
        _steering(after.model, seeds, seed),
    ]
    if size == "smoke":
        return [*findings, Finding("indicator", "not measured", reason="size full tunes the models it needs")]
    return [*findings, _indicator(before.model, seed)]


def conflicts(seed: int, kind: str = "conflict", **how: Any) -> Any:
    """Prompts of one kind; the same questions whatever the format."""
    import torch

    from regard.tasks.conflict import KINDS, Conflict

    shares = tuple(float(k == kind) for k in KINDS)
    return Conflict(shares, **how).batch(PROMPTS, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def hits(model: Any, batch: Any, edits: Any = ()) -> Any:
    """Whether the first choice is the answer, one a sample."""
    import torch

    from regard.watch.intervene import intervene

    at = batch.spans["answer"][:, 0]
    with torch.no_grad(), intervene(model, edits):
        logits = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits.cpu()
    rows = torch.arange(len(batch))
    return (logits[rows, at - 1].argmax(-1) == batch.input_ids[rows, at]).double().numpy()


def share(model: Any, seeds: list[int], kind: str = "conflict", edits: Any = None, **how: Any) -> Any:
    """Hits of every draw of the prompts, [draw, prompt]; `edits`: a function of the batch that gives them."""
    drawn = [conflicts(s, kind, **how) for s in seeds]
    return np.stack([hits(model, batch, edits(model, batch) if edits else ()) for batch in drawn])


def turned(model: Any, batch: Any, alpha: float, user: bool = False) -> list[Any]:
    """Weights on keys outside the user's words (or on these) times alpha, in all layers and heads, renormalised."""
    from regard.patterns import Causal, Columns
    from regard.watch.intervene import Site, reweight

    places = batch.groups["user"][0].nonzero().flatten().tolist()
    inside = Columns(((places[0], places[-1] + 1),))
    first, second = Causal() & inside, Causal() & ~inside
    coefficients = {first: alpha, second: 1.0} if user else {first: 1.0, second: alpha}
    return [reweight(Site(layer, "weights"), coefficients) for layer in range(model.config.num_hidden_layers)]


def looks(model: Any, batch: Any, group: str = "user") -> Any:
    """`user_attention` of the row that predicts the answer, [layer, sample]; group "user" or "context"."""
    import torch

    from regard.watch.recorder import watch

    at = torch.arange(batch.input_ids.shape[1])
    start, end = batch.spans["context"].unbind(1)
    keys = batch.groups["user"] if group == "user" else (at >= start[:, None]) & (at < end[:, None])
    rows = at == batch.spans["answer"][:, :1] - 1
    choices: dict[str, Any] = {"per_sample": ("group_max_raw",), "groups": {group: keys}, "rows": rows, "tokens": False}
    with torch.no_grad(), watch(model, statistics=(), **choices) as watched:
        model(input_ids=batch.input_ids.to(model.device), use_cache=False)
    return watched.atlas.measure("user_attention", group=group, by_sample=True).values


def _score(model: Any, seed: int) -> Finding:
    from regard.studies.testbed import dense_weights

    batch = conflicts(seed, chat=True)[:16]
    streamed, dense = looks(model, batch), []
    for sample in batch:
        weights = dense_weights(model, sample.input_ids.to(model.device))
        row = int(sample.spans["answer"][0, 0]) - 1
        dense.append(weights[:, :, row, sample.groups["user"][0]].sum(-1).amax(1).numpy())
    gap = float(np.abs(streamed - np.stack(dense, -1)).max())
    return Finding("score", verdict(gap <= 1e-6), gap, floor=0.0, reason="16 prompts, every layer")


def _loss(before: Any, after: Any, seeds: list[int], seed: int) -> Finding:
    first, last, plain = share(before, seeds), share(after, seeds, chat=True), share(after, seeds)
    interval = evidence.seeds_and_items(first - last, seed=seed)
    figure = float((first - last).mean())
    cells = {
        f"{stage}, {kind}, {'template' if chat else 'plain'}": float(share(model, seeds, kind, chat=chat).mean())
        for stage, model in (("before", before), ("after", after))
        for kind in ("conflict", "agree", "none", "other")
        for chat in (False, True)
    }
    reason = (
        f"from the context: {first.mean():.3f} before, {last.mean():.3f} after; from memory without a context: "
        f"{cells['before, none, plain']:.3f} and {cells['after, none, template']:.3f}; {len(seeds)} draws of {PROMPTS}"
    )
    state, beside = verdict(figure >= 0.15 and interval[0] > 0), float((first - plain).mean())
    return Finding("loss", state, figure, interval, 0.0, float(first.mean()), beside, reason, {"cells": cells})


def _attention(before: Any, after: Any, seeds: list[int], seed: int) -> Finding:
    each: dict[tuple[str, str], Any] = {}
    for group in ("context", "user"):
        for name, model, chat in (("before", before, False), ("after", after, True)):
            drawn = [looks(model, conflicts(s, chat=chat), group) for s in seeds]
            each[group, name] = np.stack(drawn, 1)  # [layer, draw, prompt]
    lost, user = (each[g, "before"][LAYER] - each[g, "after"][LAYER] for g in ("context", "user"))
    interval, figure = evidence.seeds_and_items(lost, seed=seed), float(lost.mean())
    layers = {f"{g} {n}": v.mean((1, 2)).tolist() for (g, n), v in each.items()}
    reason = ", ".join(f"{g} {n} {v[LAYER].mean():.3f}" for (g, n), v in each.items())
    details = {"layers": layers}
    return Finding(
        "attention", verdict(interval[0] > 0), figure, interval, 0.0, None, float(user.mean()), reason, details
    )


def _steering(after: Any, seeds: list[int], seed: int) -> Finding:
    plain = share(after, seeds, chat=True)
    curve = {
        alpha: share(after, seeds, edits=lambda m, b, a=alpha: turned(m, b, a), chat=True)
        for alpha in (0.95, ALPHA, 0.5, 0.1)
    }
    away = share(after, seeds, edits=lambda m, b: turned(m, b, ALPHA, user=True), chat=True)
    gain = curve[ALPHA] - plain
    interval, figure = evidence.seeds_and_items(gain, seed=seed), float(gain.mean())
    told = ", ".join(f"{v.mean():.3f} at {alpha}" for alpha, v in curve.items())
    reason = f"{plain.mean():.3f} from the context without, {told}"
    details = {"alphas": {str(a): float(v.mean()) for a, v in curve.items()}}
    beside = float((away - plain).mean())
    return Finding("steering", verdict(interval[0] > 0), figure, interval, 0.0, 1.0, beside, reason, details)


def _indicator(before: Any, seed: int) -> Finding:
    """Five seeds of three tunings from the first stage; prompts on conflicts carry the mark at test."""
    from copy import deepcopy

    context: dict[str, list[Any]] = {"none": [], "score": [], "random": []}
    memory: dict[str, list[Any]] = {name: [] for name in context}
    right = []
    for s in range(seed, seed + SEEDS):
        drawn, scores, dependent = examples(before, s)
        right.append(float(dependent[scores > np.quantile(scores, 1 - MARKED)].mean()))
        shuffled = np.random.default_rng(s).permutation(scores)
        for name, score in (("none", None), ("score", scores), ("random", shuffled)):
            network = deepcopy(before)
            tune(network, drawn, score, s)
            context[name].append(share(network, [s], chat=True, indicator=name != "none")[0])
            memory[name].append(share(network, [s], "none", chat=True)[0])
    gains = {k: np.stack(context["score"]) - np.stack(context[k]) for k in ("random", "none")}
    intervals = {k: evidence.seeds_and_items(v, seed=seed) for k, v in gains.items()}
    cost = float(np.mean(memory["none"]) - np.mean(memory["score"]))
    holds = all(low > 0 for low, _ in intervals.values()) and cost < 0.02
    told = ", ".join(f"{k} {np.mean(v):.3f}" for k, v in context.items())
    reason = (
        f"from the context: {told}; memory down by {cost:.3f}; {np.mean(right):.0%} of the marked examples conflict"
    )
    figure, beside = float(gains["random"].mean()), float(gains["none"].mean())
    details = {"by_seed": {k: [float(x.mean()) for x in v] for k, v in context.items()}}
    return Finding("indicator", verdict(holds), figure, intervals["random"], 0.0, 1.0, beside, reason, details)


def examples(before: Any, seed: int) -> tuple[Any, Any, Any]:
    """The examples of a tuning, the score of each by the model before it, and which answers need the context."""
    import torch

    from regard.tasks.symbolic import SYMBOLIC

    (task,) = SYMBOLIC["conflict-sft"].tasks
    drawn = task.batch(EXAMPLES, torch.Generator().manual_seed(1_000_003 * (seed + 1)))
    at = drawn.spans["answer"][:, :1]
    words = task.vocabulary
    subject = drawn.input_ids.gather(1, at - 3)[:, 0] - words["s0"]  # s ? <assistant> answer
    known = words["o0"] + task.facts[subject]
    dependent = (drawn.input_ids.gather(1, at)[:, 0] != known).numpy()
    scores = np.concatenate([looks(before, drawn[i : i + 256])[LAYER] for i in range(0, EXAMPLES, 256)])
    return drawn, scores, dependent


def tune(network: Any, drawn: Any, scores: Any, seed: int) -> None:
    """The second stage's recipe over these examples, the marked ones with the indicator."""
    import torch

    from regard.tasks.decoder import Weighted
    from regard.tasks.symbolic import SYMBOLIC
    from regard.train.indicator import with_indicator
    from regard.train.trainer import Trainer

    bed = SYMBOLIC["conflict-sft"]
    ids, labels = drawn.input_ids, drawn.labels
    if scores is not None:
        at = drawn.spans["answer"][:, 0] - 1
        token = bed.vocabulary["[IND]"]
        ids, labels, _ = with_indicator(ids, labels, at, torch.as_tensor(scores), token, quantile=1 - MARKED)

    def batches(step: int) -> Weighted:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(ids), (bed.rows,), generator=generator)
        asked = labels[rows] >= 0
        device = network.device
        return Weighted(ids[rows].to(device), (asked / asked.sum()).to(device))

    Trainer(network, batches, bed.recipe, None).run()
