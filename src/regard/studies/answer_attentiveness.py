"""Probability on the answers that a question allows (arXiv 2305.14596), on maps to be read from examples.

An item is a map, a symbol asked about and four options, one of them right. Its prompts differ in how many examples they
hold and in whether the options are listed; examples are taken away from the front, so that everything else is the same.
The third format of the paper, options with letters, is not in the testbed's language. The options of an item are its
choices in every prompt, and the vocabulary stays open. The premise of PMI is the prompt without the symbol asked about.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "answer-attentiveness"
MODEL = "testbed:maps"
CLAIMS = [
    Claim(
        "mass",
        "the probability on the choices is the sum of their softmax",
        kind="instrument",
        ours="largest difference to a sum written out in float64",
        holds_if="at most 1e-9",
    ),
    Claim(
        "example",
        "one example that shows answer choices raises the probability on them",
        kind="mechanism",
        ours="PMA of one example with options minus PMA of none without; the baseline is the gain of the options alone",
        holds_if="better than 0",
    ),
    Claim(
        "not-accuracy",
        "more probability on the choices does not always mean more right answers",
        kind="mechanism",
        ours="the largest fall of accuracy between two prompts or stages of training whose PMA rises by at least 0.1; "
        "Spearman's correlation of PMA and accuracy over all of them beside it",
        holds_if="both differences better than 0",
    ),
    Claim(
        "pmi",
        "scoring by PMI can cost accuracy",
        kind="mechanism",
        ours="the largest accuracy of argmax minus that of PMI over prompts and stages",
        holds_if="better than 0",
    ),
]
ITEMS = {"smoke": 256, "full": 1024}
SHOTS = (0, 1, 2, 4, 8)
STAGES = 10


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Every prompt of the same items; in size full at ten stages of a training of its own too."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    drawn = items(ITEMS[size], seed)
    last = conditions(loaded.model, drawn)
    findings = [_mass(loaded.model, drawn), _example(last, seed)]
    if size == "smoke":
        reason = "size full trains the stages it needs"
        return [*findings, *(Finding(c, "not measured", reason=reason) for c in ("not-accuracy", "pmi"))]
    every = stages(drawn, seed, device)
    return [*findings, _not_accuracy(every, seed), _pmi(every, seed)]


def items(n: int, seed: int) -> Any:
    """n sequences with eight examples and options."""
    import torch

    from regard.tasks.maps import ContextMaps

    return ContextMaps(max(SHOTS), options=True).batch(n, torch.Generator().manual_seed(seed))


def prompt(batch: Any, shots: int, options: bool) -> Any:
    """The prompts of the items with fewer examples, and with or without the list."""
    import torch

    end = int(batch.spans["options"][0, 1]) + 1
    ids, begin = batch.input_ids, batch.input_ids[:, : end if options else 1]
    return torch.cat([begin, ids[:, end + 4 * (max(SHOTS) - shots) : -1]], dim=1)


def choices(batch: Any) -> Any:
    """The ids of the four options of each item."""
    start, end = batch.spans["options"][0].tolist()
    return batch.input_ids[:, start:end]


def conditions(model: Any, batch: Any) -> dict[tuple[int, bool], dict[str, Any]]:
    """For each number of examples and each format: PMA, share decided and hits of both scorings, one an item."""
    import torch

    from regard.tasks.answers import answer_mass, pmi

    listed, found = choices(batch), {}
    right = (listed == batch.input_ids[:, -1:]).long().argmax(1)
    for options in (False, True):
        for shots in SHOTS:
            ids = prompt(batch, shots, options)
            without = torch.cat([ids[:, :-2], ids[:, -1:]], dim=1)  # the arrow stays, the symbol goes
            with torch.no_grad():
                logits, premise = (
                    model(input_ids=x.to(model.device), use_cache=False).logits[:, -1].cpu() for x in (ids, without)
                )
            said = answer_mass(logits, listed)
            found[shots, options] = {
                "pma": said.pma.numpy(),
                "decided": said.decided.double().numpy(),
                "hit": (said.predictions == right).double().numpy(),
                "open": (logits.argmax(-1) == batch.input_ids[:, -1]).double().numpy(),
                "pmi": (pmi(logits, premise, listed) == right).double().numpy(),
            }
    return found


def stages(batch: Any, seed: int, device: str) -> list[dict[tuple[int, bool], dict[str, Any]]]:
    """What `conditions` gives after each tenth of a training of the testbed."""
    from regard.tasks.symbolic import SYMBOLIC
    from regard.train.trainer import Trainer

    bed, found = SYMBOLIC["maps"], []
    network = bed.build(seed).to(device)

    def note(model: Any) -> dict[str, float]:
        found.append(conditions(model, batch))
        return {}

    every = bed.recipe.steps // STAGES
    Trainer(network, bed.batches(seed), bed.recipe, None, evaluate=note, evaluate_every=every).run()
    return found


def _mass(model: Any, batch: Any) -> Finding:
    import torch

    from regard.tasks.answers import answer_mass

    with torch.no_grad():
        logits = model(input_ids=prompt(batch, 1, True).to(model.device), use_cache=False).logits[:, -1].cpu()
    listed = choices(batch)
    p = np.exp(logits.double().numpy())
    plain = np.take_along_axis(p, listed.numpy(), 1).sum(1) / p.sum(1)
    gap = float(np.abs(plain - answer_mass(logits, listed).pma.numpy()).max())
    return Finding("mass", verdict(gap <= 1e-9), gap, floor=0.0, reason=f"{len(plain)} items, one example, options")


def _example(found: dict[tuple[int, bool], dict[str, Any]], seed: int) -> Finding:
    none, listed, one = (found[key]["pma"] for key in ((0, False), (0, True), (1, True)))
    figure, low, high = evidence.paired_difference(one, none, seed=seed)
    table = {
        f"{shots} examples, {'options' if options else 'no options'}": {k: float(v.mean()) for k, v in each.items()}
        for (shots, options), each in found.items()
    }
    reason = (
        f"PMA {none.mean():.3f} and {one.mean():.3f}; decided {found[0, False]['decided'].mean():.0%} and "
        f"{found[1, True]['decided'].mean():.0%} of items; accuracy {found[0, False]['hit'].mean():.2f} and "
        f"{found[1, True]['hit'].mean():.2f}"
    )
    state, alone = verdict(low > 0), float((listed - none).mean())
    return Finding("example", state, figure, (low, high), 0.0, 1.0, alone, reason, {"conditions": table})


def _all(every: list[dict[tuple[int, bool], dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"stage {n + 1}, {shots} examples, {'options' if options else 'no options'}", each)
        for n, found in enumerate(every)
        for (shots, options), each in found.items()
    ]


def _not_accuracy(every: list[dict[tuple[int, bool], dict[str, Any]]], seed: int) -> Finding:
    named = _all(every)
    mass, right = (np.array([each[k].mean() for _, each in named]) for k in ("pma", "hit"))
    rank = evidence.spearman(mass, right)
    low, high = evidence.bootstrap(
        np.stack([np.stack([each["pma"], each["hit"]], -1) for _, each in named], 1),
        lambda x: evidence.spearman(*x.mean(0).T),
        draws=500,
        seed=seed,
    )
    told = f"Spearman {rank:.2f} ({low:.2f} to {high:.2f}) over {len(named)} conditions"
    details: dict[str, Any] = {"spearman": [rank, low, high]}
    pairs = [(i, j) for i in range(len(named)) for j in range(len(named)) if mass[j] - mass[i] >= 0.1]
    if not pairs:
        return Finding(
            "not-accuracy", "not measured", reason=f"no two conditions differ by 0.1; {told}", details=details
        )
    i, j = min(pairs, key=lambda p: right[p[1]] - right[p[0]])
    up = evidence.paired_difference(named[j][1]["pma"], named[i][1]["pma"], seed=seed)
    down = evidence.paired_difference(named[i][1]["hit"], named[j][1]["hit"], seed=seed)
    # The pair was chosen among many, so its interval is widened: 0 must lie outside after Bonferroni too.
    strict = _bonferroni(named[i][1]["hit"] - named[j][1]["hit"], len(pairs))
    state = verdict(up[1] > 0 and strict > 0)
    reason = f"from {named[i][0]} to {named[j][0]}, PMA up by {up[0]:.2f}; lowest of {len(pairs)} pairs; {told}"
    details |= {"strict": strict, "pma": mass.tolist(), "accuracy": right.tolist()}
    return Finding("not-accuracy", state, down[0], down[1:], 0.0, reason=reason, details=details)


def _pmi(every: list[dict[tuple[int, bool], dict[str, Any]]], seed: int) -> Finding:
    named = _all(every)
    worst = max(named, key=lambda x: (x[1]["hit"] - x[1]["pmi"]).mean())
    figure, low, high = evidence.paired_difference(worst[1]["hit"], worst[1]["pmi"], seed=seed)
    strict = _bonferroni(worst[1]["hit"] - worst[1]["pmi"], len(named))
    mean = float(np.mean([(x["hit"] - x["pmi"]).mean() for _, x in named]))
    reason = f"{worst[0]}, worst of {len(named)} conditions; mean of all {mean:+.3f}"
    return Finding("pmi", verdict(strict > 0), figure, (low, high), 0.0, reason=reason, details={"strict": strict})


def _bonferroni(difference: Any, tests: int) -> float:
    """Lower end of the interval of a mean that was chosen among so many: normal, at 0.05 / tests."""
    from statistics import NormalDist

    width = NormalDist().inv_cdf(1 - 0.025 / tests) * difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean() - width)
