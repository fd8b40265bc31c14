"""The price of discrete logic (arXiv 2603.23577): what a task adds to the representation of a number, in two parts.

A number n is read at the last token of `n TASK`. Its shift is taken from the neutral task, copying, whose prompt is as
long. The class means of the shift give a common direction e1 and C - 1 divergent ones E (Gram-Schmidt; for two classes
the paper's e2). Directions come from 70 numbers, figures from the other 30, over several such splits.

Removal takes `((y - mean).E) E` away at a layer and at all later ones, each with its own directions. The random control
takes as much away from every number along random directions instead, at the same layers. Told besides, and no part of a
verdict: what is left after removal along divergent directions of answers dealt out at random. They are differences of
means too, so they lean towards whatever varies most, which in a task is its own answer.

A wrong claim never wins this testbed's first choice (it was trained to be right in 60 % of such cases), so "answered
wrongly" is taken in expectation over answers drawn from the model: an item counts with its probability of each.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "geometric-price"
MODEL = "testbed:numbers"
CLAIMS = [
    Claim(
        "removal",
        "removal as edits equals the formula, and the means of the classes then agree along what was removed",
        kind="instrument",
        ours="largest gap, over the largest state",
        holds_if="at most 1e-5",
    ),
    Claim(
        "parity",
        "without its divergent direction a model no longer tells odd from even, and nothing else is lost",
        kind="mechanism",
        paper="parity falls from 100% to 38.57%",
        ours="share of held-out numbers whose parity is still right, from the best of three layers on; the baseline is "
        "the lower of the share with as much removed along random directions and that without e1",
        holds_if="at most 0.6, at least 0.9 for the baseline and for copying without the direction",
    ),
    Claim(
        "other-tasks",
        "the same holds of every other task",
        kind="mechanism",
        ours="largest balanced accuracy of at-least-50, mod-3 and prime, less chance; the baseline is the smallest "
        "balanced accuracy of a control, less chance",
        holds_if="at most 0.1, with every control at 0.9 or more (our reading)",
    ),
    Claim(
        "pressure",
        "where a wrong claim wins, the divergent part of the shift is smaller",
        kind="mechanism",
        paper="divergence under social pressure is insufficient",
        ours="divergent share of the shift on items answered rightly less that on items answered wrongly, mean over "
        "tasks, claims all wrong; the baseline is the same for random directions",
        holds_if="better than 0",
    ),
]
FIT = 70
SPLITS = {"smoke": 5, "full": 40}
STARTS = (0, 1, 2)
NEUTRAL = "copy"


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Directions from 70 numbers, removal and shares on the other 30, once a split."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.numbers import TASKS
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    bed = Bed(loaded.model)
    tasks = [task for task in TASKS if task != NEUTRAL]
    results: list[dict[str, Any]] = []
    for split in range(SPLITS[size]):
        generator = torch.Generator().manual_seed(1_000_003 * seed + split)
        order = torch.randperm(100, generator=generator).to(device)
        fit, test = order[:FIT], order[FIT:]
        results.append({t: judge(bed, t, fit, test, generator) for t in tasks})
        for task in tasks:
            start = results[-1][task]["start"]
            results[-1][task]["pressure"] = pressure(bed, task, fit, test, start, generator)
    return [_removal(results), _parity(results), _others(results), _pressure(results)]


class Bed:
    """A model over numbers and tasks, its prompts and what it answers."""

    def __init__(self, model: Any):
        import torch

        from regard.tasks.numbers import TASKS, NumberTasks

        self.model, self.device = model, next(model.parameters()).device
        self.words = NumberTasks().vocabulary
        self.answers = NumberTasks().answers.to(self.device)
        self.row = {task: i for i, task in enumerate(TASKS)}
        self.torch = torch
        from regard.watch.anatomy import anatomy

        self.parts = anatomy(model, {"input_ids": self.prompts(NEUTRAL, torch.arange(2, device=self.device))})

    @property
    def sites(self) -> list[Any]:
        """The stream after every block, at the last token."""
        from regard.watch.intervene import Site

        return [Site(layer, "resid_post", pos=-1) for layer in range(len(self.parts))]

    def right(self, task: str, numbers: Any) -> Any:
        """The id of the right answer for each number."""
        return self.answers[self.row[task], numbers]

    def prompts(self, task: str, numbers: Any, claimed: Any = None) -> Any:
        """`<bos> n TASK`, with a claim `claim c` besides."""
        columns = [self.torch.full_like(numbers, i) for i in (self.words.BOS, self.words[task], self.words["claim"])]
        parts = [columns[0], self.words["0"] + numbers, columns[1]]
        return self.torch.stack(parts if claimed is None else [*parts, columns[2], claimed], 1)

    def states(self, ids: Any, edits: Any = ()) -> Any:
        """The stream after every block at the last token, [layer, n, dim], in float32."""
        from regard.watch.intervene import trace

        read = trace(self.model, {"input_ids": ids}, self.sites, edits=edits, anatomy=self.parts)
        return self.torch.stack([read[site] for site in self.sites])

    def scores(self, ids: Any, edits: Any = ()) -> Any:
        """The log-probabilities of the answer."""
        from regard.watch.intervene import intervene

        with self.torch.no_grad(), intervene(self.model, edits, anatomy=self.parts):
            return self.model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)


def judge(bed: Bed, task: str, fit: Any, test: Any, generator: Any) -> dict[str, Any]:
    """One split and task: where removal does most to the fitted numbers, and what it does to the others."""
    import torch

    from regard.steer.activation import remove_at_each, take_elsewhere
    from regard.steer.directions import class_directions

    layers = range(len(bed.parts))
    neutral, context = (bed.states(bed.prompts(t, torch.cat([fit, test]))) for t in (NEUTRAL, task))
    labels, answer = bed.right(task, fit), bed.right(task, test)
    dealt = labels[torch.randperm(FIT, generator=generator).to(labels.device)]
    # By layer: common, divergent, and divergent of answers dealt out at random.
    split = [
        (*class_directions(shift, labels), class_directions(shift, dealt)[1]) for shift in (context - neutral)[:, :FIT]
    ]

    def removal(ids: Any, states: Any, start: int, which: int) -> tuple[list[Any], list[Any]]:
        bases, means = [directions[which] for directions in split[start:]], list(states[start:, :FIT].mean(1))
        return remove_at_each(bed.model, {"input_ids": ids}, bed.sites[start:], bases, means, bed.parts)

    def chosen(of: str, numbers: Any, start: int, which: int = 1) -> Any:
        ids = bed.prompts(of, numbers)
        return bed.scores(ids, removal(ids, context if of == task else neutral, start, which)[0]).argmax(-1)

    starts = [float((chosen(task, fit, s) == labels).double().mean()) for s in STARTS]
    start = STARTS[int(np.argmin(starts))]
    ids = bed.prompts(task, test)
    edits, taken = removal(ids, context, start, 1)
    random = take_elsewhere(bed.sites[start:], taken, context.shape[-1], generator)
    told = {
        "clean": bed.scores(ids).argmax(-1),
        "divergent": bed.scores(ids, edits).argmax(-1),
        "common": chosen(task, test, start, 0),
        "random": bed.scores(ids, random).argmax(-1),
        "dealt": chosen(task, test, start, 2),
        "alone": bed.scores(ids, edits[:2]).argmax(-1),
    }
    return {
        "start": start,
        "starts": starts,
        "classes": len(labels.unique()),
        "right": {k: (v == answer).double().cpu().numpy() for k, v in told.items()},
        "copy": (chosen(NEUTRAL, test, start) == bed.right(NEUTRAL, test)).double().cpu().numpy(),
        "answer": answer.cpu().numpy(),
        "chosen": told["divergent"].cpu().numpy(),
        "gap": gap(bed, ids, split[start][1], context[start, :FIT].mean(0), start),
        "phases": [phases(neutral[i, FIT:], context[i, FIT:], answer, split[i][1]) for i in layers],
    }


def gap(bed: Bed, ids: Any, basis: Any, mean: Any, layer: int) -> float:
    """How far the edits are from the formula, and their result from a single point, over the largest state."""
    from regard.steer.activation import remove_directions
    from regard.steer.directions import project, remove

    plain = bed.states(ids)[layer]
    edited = bed.states(ids, remove_directions(bed.sites[layer], basis, mean))[layer]
    gaps = [edited - remove(plain, basis, mean), project(edited - mean, basis)]
    return float(max(g.abs().max() for g in gaps) / plain.abs().max())


def phases(neutral: Any, context: Any, answer: Any, basis: Any) -> dict[str, float]:
    """Preservation of distances within classes, divergent share of the shift, and distortion, at one layer."""
    import torch

    from regard.steer.directions import distortion, share_within

    kept = [
        evidence.spearman(*(torch.pdist(x[answer == c].double()).cpu().numpy() for x in (neutral, context)))
        for c in answer.unique()
        if (answer == c).sum() > 2
    ]
    return {
        "preservation": float(np.mean(kept)),
        "divergence": float(share_within(context - neutral, basis).mean()),
        "distortion": distortion(neutral, context),
    }


def pressure(bed: Bed, task: str, fit: Any, test: Any, layer: int, generator: Any) -> dict[str, Any]:
    """Divergent shares under wrong claims: sums a number, [100, directions, (share, 1) by (right, wrong)].

    Directions come from the fitted numbers with every claim, right and wrong; the neutral context holds the same claim.
    """
    import torch

    from regard.steer.directions import class_directions, gram_schmidt, share_within

    labels = bed.right(task, fit).unique()

    def shifts(numbers: Any) -> tuple[Any, Any, Any, Any]:
        n, c = (x.flatten() for x in torch.meshgrid(numbers, labels, indexing="ij"))
        ids, neutral = bed.prompts(task, n, c), bed.prompts(NEUTRAL, n, c)
        return bed.states(ids)[layer] - bed.states(neutral)[layer], ids, bed.right(task, n), c

    shift, _, answer, _ = shifts(fit)
    basis = class_directions(shift, answer)[1]
    shift, ids, answer, claimed = shifts(test)
    wrong = claimed != answer
    told, shift, number = bed.scores(ids)[wrong], shift[wrong], ids[wrong, 1] - bed.words["0"]
    right = told.exp().gather(1, answer[wrong, None])[:, 0].double()
    random = gram_schmidt(torch.randn(basis.shape, generator=generator).to(basis))
    shares = torch.stack([share_within(shift, b).double() for b in (basis, random)], 1)
    weight = torch.stack([right, 1 - right], 1)
    sums = torch.stack([shares[:, :, None] * weight[:, None], weight[:, None].expand(-1, 2, -1)], -1)
    items = torch.zeros(100, *sums.shape[1:], dtype=sums.dtype, device=sums.device).index_add_(0, number, sums)
    return {
        "items": items.cpu().numpy(),
        "yields": float((told.argmax(-1) != answer[wrong]).double().mean()),
        "wrong": float((1 - right).mean()),
        "spread": float(right.std()),
    }


def less(items: Any) -> Any:
    """Share on items answered rightly less share on those answered wrongly, by tasks and directions, from sums."""
    total = items.sum(0)
    share = total[..., 0] / total[..., 1]
    return share[..., 0] - share[..., 1]


def balanced(result: dict[str, Any], which: str) -> float:
    """Mean over classes of the share of right answers."""
    right = result["right"][which]
    return float(np.mean([right[result["answer"] == c].mean() for c in np.unique(result["answer"])]))


def _removal(results: list[dict[str, Any]]) -> Finding:
    worst = max(r["gap"] for result in results for r in result.values())
    reason = f"{len(results)} splits of {len(results[0])} tasks, float32"
    return Finding("removal", verdict(worst <= 1e-5), worst, floor=0.0, reason=reason)


def _parity(results: list[dict[str, Any]]) -> Finding:
    from regard.tasks.numbers import NumberTasks

    found = [r["parity"] for r in results]
    right = {k: np.stack([f["right"][k] for f in found]) for k in found[0]["right"]}
    copied = np.stack([f["copy"] for f in found])
    mean = {k: float(v.mean()) for k, v in right.items()} | {"copy": float(copied.mean())}
    words, phased = NumberTasks().vocabulary, [f["phases"] for f in found]
    asked, chosen = (np.concatenate([f[k] for f in found]) for k in ("answer", "chosen"))
    names = {int(c): words.text([c]) for c in np.unique(asked)}
    pairs = Counter((names[int(a)], names.get(int(b), "other")) for a, b in zip(asked, chosen, strict=True))
    confusion = {f"{a} -> {b}": n for (a, b), n in sorted(pairs.items())}
    layers = [{k: float(np.mean([p[k] for p in each])) for k in each[0]} for each in zip(*phased, strict=True)]
    details: dict[str, Any] = {"accuracy": mean, "confusion": confusion, "phases": layers}
    details["start"] = [f["start"] for f in found]
    details["starts"] = np.mean([f["starts"] for f in found], axis=0).round(3).tolist()
    held = min(mean["common"], mean["random"])
    reason = (
        f"{len(found)} splits; random directions {mean['random']:.2f}, without e1 {mean['common']:.2f}, copying "
        f"{mean['copy']:.2f}, one layer alone {mean['alone']:.2f}, answers dealt at random {mean['dealt']:.2f}; "
        + ", ".join(f"{k}: {v}" for k, v in confusion.items())
    )
    state = verdict(mean["divergent"] <= 0.6 and held >= 0.9 and mean["copy"] >= 0.9)
    interval = evidence.seeds_and_items(right["divergent"])
    return Finding("parity", state, mean["divergent"], interval, 0.5, mean["clean"], held, reason, details)


def _others(results: list[dict[str, Any]]) -> Finding:
    names = [task for task in results[0] if task != "parity"]

    def over(task: str, which: str) -> Any:
        return np.array([balanced(r[task], which) - 1 / r[task]["classes"] for r in results])

    rest = {task: over(task, "divergent") for task in names}
    controls = {(t, k): float(over(t, k).mean()) for t in names for k in ("common", "random")}
    reached = {(t, k): v + 1 / results[0][t]["classes"] for (t, k), v in controls.items()}
    worst = max(names, key=lambda t: rest[t].mean())
    copied = min(float(np.mean([r[t]["copy"].mean() for r in results])) for t in names)
    shown = "; ".join(
        f"{t} {rest[t].mean() + 1 / results[0][t]['classes']:.2f} (e1 {reached[t, 'common']:.2f}, random "
        f"{reached[t, 'random']:.2f})"
        for t in names
    )
    details = {
        t: {
            "start": [r[t]["start"] for r in results],
            "balanced": {k: float(np.mean([balanced(r[t], k) for r in results])) for k in results[0][t]["right"]},
        }
        for t in names
    }
    figure = float(rest[worst].mean())
    state = verdict(figure <= 0.1 and min(reached.values()) >= 0.9 and copied >= 0.9)
    reason = f"balanced accuracy without the divergent directions: {shown}; copying at least {copied:.2f}"
    interval = evidence.bootstrap(rest[worst])
    return Finding("other-tasks", state, figure, interval, 0.0, None, min(controls.values()), reason, details)


def _pressure(results: list[dict[str, Any]]) -> Finding:
    found = {task: [r[task]["pressure"] for r in results] for task in results[0]}
    # [number, task, directions, right or wrong, share or weight]; a number counts in every split that tests it.
    items = np.stack([sum(f["items"] for f in each) for each in found.values()], 1)
    mean = {k: float(np.mean([f[k] for each in found.values() for f in each])) for k in ("yields", "wrong", "spread")}
    by_task = less(items)
    figure, baseline = (float(x) for x in by_task.mean(0))
    low, high = evidence.bootstrap(items, lambda x: float(less(x).mean(0)[0]))
    share = items[..., 0, :, 0].sum((0, 2)) / items[..., 0, :, 1].sum((0, 2))
    details = {
        task: {"difference": float(d[0]), "random": float(d[1]), "share": float(s)}
        for task, d, s in zip(found, by_task, share, strict=True)
    }
    reason = (
        f"wrong claims win {mean['yields']:.1%} of first choices and {mean['wrong']:.1%} of drawn answers; the "
        f"probability of the right answer hardly varies (standard deviation {mean['spread']:.3f}): a small effect"
    )
    return Finding("pressure", verdict(low > 0), figure, (low, high), 0.0, None, baseline, reason, details)
