"""Circuit components shared by two tasks (arXiv 2310.08744): the same heads say who was given it and which colour.

Prompts are those that the model answers rightly, clean and corrupted, so that the gap that damage is measured in is
wide. A head's weight in a circuit is its mean damage; a circuit is the 20% of heads with most. Direct effects gather in
late layers whatever the task, so beside random sets there are random sets with as many heads in each layer as the
circuits have; that overlap is the baseline.

The three levels are: heads that write for the answer; heads that write for the queries of those, both in the last
token; heads that write, in the token that the question turns on (the second mention, the object asked for), for the
values that heads of the second level read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "circuit-reuse"
MODEL = "testbed:lists"
CLAIMS = [
    Claim(
        "direct",
        "a direct effect is what is left when every other head keeps its clean output",
        kind="instrument",
        ours="largest gap between the damage of path_patch and that of plain forward hooks on the output projections, "
        "over every head of 8 prompts of either task",
        holds_if="at most 1e-5",
    ),
    Claim(
        "shared",
        "the heads that write the answer in one task write it in the other",
        kind="mechanism",
        ours="|A and B| / min(|A|, |B|) of the 20% of heads with the largest direct effect on the answer; the floor is "
        "the mean of random sets, the baseline that of random sets with as many heads in each layer",
        holds_if="above the 99th percentile of random sets",
    ),
    Claim(
        "levels",
        "so do the heads behind them",
        kind="mechanism",
        paper="about 78% of in-circuit heads shared",
        ours="the same over (level, head) pairs of three levels of receivers, 10% of heads a level",
        holds_if="above the 99th percentile of random sets",
    ),
    Claim(
        "repair",
        "keeping the wrong items from a few heads repairs the lists that are too long",
        kind="mechanism",
        paper="four heads lift coloured objects from 49.6% to 93.7%",
        ours="points of accuracy gained on lists of 12 where the 4 heads with most damage cannot see the wrong items "
        "from the last token; the baseline is the mean of as many random heads",
        holds_if="at least 20, and under 5 for random heads",
    ),
    Claim(
        "replication",
        "GPT-2 medium uses the same heads for indirect objects and coloured objects",
        kind="replication",
        paper="78% of heads shared, 49.6% to 93.7% by four heads",
        ours="the figures above",
        holds_if="as above",
        waits="needs GPT-2 medium, which is not at hand without the hub",
    ),
]
PROMPTS = {"smoke": 32, "full": 256}
LONG = {"smoke": 96, "full": 500}
SHARE, LEVEL_SHARE, HEADS, ITEMS, DRAWS = 0.2, 0.1, 4, 12, 10_000
BOOTSTRAP, CHECKED = 500, 8


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Path patching on both tasks, then the overlaps, then longer lists with items kept from a few heads."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.lists import ColouredObjects, IndirectObject
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return unmeasured(CLAIMS, reason)
    generator = torch.Generator().manual_seed(seed)
    tasks = {"indirect object": IndirectObject(), "coloured objects": ColouredObjects(3)}
    pairs = {name: prompts(loaded.model, task, PROMPTS[size], generator) for name, task in tasks.items()}
    few = {name: len(clean) for name, (clean, _) in pairs.items() if len(clean) < PROMPTS[size]}
    if few:
        reason = f"too few prompts that the model answers rightly, clean and corrupted: {few} of {PROMPTS[size]}"
        return unmeasured(CLAIMS, reason)
    direct = [direct_effects(loaded.model, *pair) for pair in pairs.values()]
    found = [
        _direct(loaded.model, list(pairs.values()), direct),
        _overlap("shared", [[effect] for effect in direct], SHARE, seed),
    ]
    turns = {"indirect object": "s2", "coloured objects": "query"}
    levels = [[d, *deeper(loaded.model, *pairs[n], turns[n], d)] for n, d in zip(pairs, direct, strict=True)]
    found.append(_overlap("levels", levels, LEVEL_SHARE, seed))
    long = ColouredObjects(ITEMS).batch(LONG[size], generator)
    return [*found, _repair(loaded.model, long, direct[1].mean("sample").values, seed)]


def inputs_of(model: Any, batch: Any) -> dict[str, Any]:
    """The prompts without their answers."""
    return {"input_ids": batch.input_ids[:, :-1].to(next(model.parameters()).device), "use_cache": False}


def answered(model: Any, batch: Any, edits: Any = ()) -> Any:
    """Which answers are the model's first choice, bool [n]."""
    import torch

    from regard.watch.intervene import intervene

    with torch.no_grad(), intervene(model, edits):
        top = model(**inputs_of(model, batch)).logits[:, -1].argmax(-1).cpu()
    return top == batch.input_ids[:, -1]


def prompts(model: Any, task: Any, n: int, generator: Any) -> tuple[Any, Any]:
    """Clean and corrupted prompts, n at most, of which the model answers both rightly."""
    clean = task.batch(4 * n, generator)
    corrupt = task.corrupted(clean)
    keep = (answered(model, clean) & answered(model, corrupt)).nonzero()[:n, 0]

    return clean[keep], corrupt[keep]


def gap(clean: Any, corrupt: Any) -> Any:
    """The metric: logit of the clean answer less that of the corrupted one, in the last column."""
    from regard.watch.effects import logit_difference

    return logit_difference(clean.input_ids[:, -1], corrupt.input_ids[:, -1])


def direct_effects(model: Any, clean: Any, corrupt: Any) -> Any:
    """Damage of every head by the path from the last token straight to the answer, [layer, head, sample]."""
    from regard.steer.causal import path_patch
    from regard.watch.intervene import Site

    both = inputs_of(model, clean), inputs_of(model, corrupt)
    return path_patch(model, *both, Site(None, "final"), gap(clean, corrupt))


def by_hooks(model: Any, clean: Any, corrupt: Any) -> Any:
    """What `direct_effects` gives, by forward hooks alone, on a GPT-2: [layer, head, sample]."""
    import torch

    projections = [block.attn.c_proj for block in model.transformer.h]
    width = model.config.n_embd // model.config.n_head
    metric = gap(clean, corrupt)

    def outputs(batch: Any) -> list[Any]:
        held: list[Any] = [None] * len(projections)

        def keep(n: int, x: Any) -> None:
            held[n] = x

        hooks = [p.register_forward_pre_hook(lambda _, x, n=n: keep(n, x[0])) for n, p in enumerate(projections)]
        read(batch)
        for hook in hooks:
            hook.remove()
        return held

    def read(batch: Any) -> Any:
        with torch.no_grad():
            return metric(model(**inputs_of(model, batch)).logits)

    ours, theirs = outputs(clean), outputs(corrupt)
    whole, harmed = read(clean), read(corrupt)
    found = []
    for layer in range(len(projections)):
        for head in range(model.config.n_head):
            changed = ours[layer].clone()
            part = slice(head * width, (head + 1) * width)
            changed[:, -1, part] = theirs[layer][:, -1, part]
            values = [*ours[:layer], changed, *ours[layer + 1 :]]
            hooks = [
                p.register_forward_pre_hook(lambda _, x, v=v: (v,)) for p, v in zip(projections, values, strict=True)
            ]
            found.append((whole - read(clean)) / (whole - harmed))
            for hook in hooks:
                hook.remove()
    return torch.stack(found).view(len(projections), model.config.n_head, -1).cpu().double().numpy()


def deeper(model: Any, clean: Any, corrupt: Any, turn: str, direct: Any) -> list[Any]:
    """Damage by the paths to the queries of the heads that write the answer, then to the values those read."""
    from regard.steer.causal import path_patch
    from regard.watch.intervene import Site

    both, metric = (inputs_of(model, clean), inputs_of(model, corrupt)), gap(clean, corrupt)
    where = tuple((p,) for p in clean.spans[turn][:, 0].tolist())
    found, effect = [], direct
    for part, receiver_pos, sender_pos in (("q", -1, -1), ("v", None, where)):
        receivers = [Site(layer, part, head=head, pos=receiver_pos) for layer, head in top(effect, LEVEL_SHARE)]
        if all(site.layer == 0 for site in receivers):
            break  # nothing comes before them
        effect = path_patch(model, *both, receivers, metric, pos=sender_pos)
        found.append(effect)
    return found


def top(effect: Any, share: float) -> list[tuple[int, int]]:
    """The heads with most mean damage, (layer, head), as many as `share` of all heads of the model."""
    mean = effect.mean("sample").values if hasattr(effect, "dims") else effect
    order = np.argsort(-np.where(np.isnan(mean), -np.inf, mean), axis=None, kind="stable")
    n = min(max(1, round(share * mean.size)), int(np.isfinite(mean).sum()))
    return [(int(i) // mean.shape[1], int(i) % mean.shape[1]) for i in order[:n]]


def shared(a: list[Any], b: list[Any], share: float) -> float:
    """Overlap of two circuits given as mean damages, one array a level."""
    sets = [{(n, *head) for n, x in enumerate(side) for head in top(x, share)} for side in (a, b)]
    return len(sets[0] & sets[1]) / min(map(len, sets))


def by_chance(a: list[Any], b: list[Any], share: float, seed: int) -> tuple[Any, Any]:
    """Overlaps of random circuits of the same size: drawn among all heads that can send, and within each layer."""
    generator = np.random.default_rng(seed)
    anyhow, layered, sizes = np.zeros(DRAWS), np.zeros(DRAWS), np.zeros(2)
    for x, y in zip(a, b, strict=False):
        chosen = [np.zeros(x.shape, dtype=bool), np.zeros(x.shape, dtype=bool)]
        for mark, side in zip(chosen, (x, y), strict=True):
            for head in top(side, share):
                mark[head] = True
        # Heads that only one of the tasks can send from are never shared.
        pool = [int(np.isfinite(side).sum()) for side in (x, y)]
        both = int((np.isfinite(x) & np.isfinite(y)).sum())
        first = generator.hypergeometric(both, pool[0] - both, chosen[0].sum(), size=DRAWS)
        anyhow += generator.hypergeometric(first, pool[1] - first, chosen[1].sum())
        for layer in range(len(x)):
            one, two = (int(mark[layer].sum()) for mark in chosen)
            layered += generator.hypergeometric(one, x.shape[1] - one, two, size=DRAWS)
    for i, side in enumerate((a, b)):
        sizes[i] = sum(len(top(x, share)) for x in side)
    return anyhow / sizes.min(), layered / sizes.min()


def _direct(model: Any, pairs: list[tuple[Any, Any]], effects: list[Any]) -> Finding:
    worst = 0.0
    for (clean, corrupt), effect in zip(pairs, effects, strict=True):
        plain = by_hooks(model, clean[:CHECKED], corrupt[:CHECKED])
        worst = max(worst, float(np.abs(effect.values[..., :CHECKED] - plain).max()))
    return Finding(
        "direct",
        verdict(worst <= 1e-5),
        worst,
        floor=0.0,
        reason=f"damage in parts of the gap, {effects[0].size // effects[0].sizes['sample']} heads",
    )


def _overlap(claim: str, levels: list[list[Any]], share: float, seed: int) -> Finding:
    means = [[x.mean("sample").values for x in side] for side in levels]
    figure = shared(means[0], means[1], share)
    anyhow, layered = by_chance(means[0], means[1], share, seed)
    limit = float(np.quantile(anyhow, 0.99))
    # One row a prompt of either task: its damages, all levels side by side.
    shapes = [[x.shape[:2] for x in side] for side in levels]
    rows = [np.concatenate([x.values.reshape(-1, x.sizes["sample"]) for x in side]).T for side in levels]
    n = min(map(len, rows))

    def resampled(items: Any) -> float:
        parts: list[list[Any]] = []
        at = 0
        for side in shapes:
            parts.append([])
            for shape in side:
                parts[-1].append(items[:, at : at + shape[0] * shape[1]].mean(0).reshape(shape))
                at += shape[0] * shape[1]
        return shared(parts[0], parts[1], share)

    items = np.concatenate([r[:n] for r in rows], axis=1)
    interval = evidence.bootstrap(items, resampled, draws=BOOTSTRAP, seed=seed)
    named = [[top(x, share) for x in side] for side in means]
    beside = float(layered.mean())
    details: dict[str, Any] = {
        "circuits": named,
        "random_99": limit,
        "layered_99": float(np.quantile(layered, 0.99)),
        "p_layered": float((1 + (layered >= figure).sum()) / (1 + DRAWS)),
    }
    reason = (
        f"random sets reach {limit:.2f} in the 99th percentile, with as many heads in each layer "
        f"{details['layered_99']:.2f}"
    )
    return Finding(claim, verdict(figure > limit), figure, interval, float(anyhow.mean()), 1.0, beside, reason, details)


def forbidden(batch: Any, heads: list[tuple[int, int]]) -> list[tuple[Any, list[Any]]]:
    """(rows, edits) by the place of the item asked for: the other items are closed to the heads' last row."""
    from regard.patterns import Columns
    from regard.watch.intervene import Edit, Site

    places = batch.spans["colour"][:, 0]
    query = int(batch.spans["query"][0, 0])
    start, ends = query - 3 * ITEMS, query - 1
    found = []
    for place in places.unique().tolist():
        wrong = tuple((at, at + 2) for at in range(start, ends, 3) if at != place)
        edits = [
            Edit(Site(layer, "weights", head=head, pos=-1), "pattern", value=~Columns(wrong)) for layer, head in heads
        ]
        found.append(((places == place).nonzero()[:, 0], edits))
    return found


def accuracy(model: Any, batch: Any, heads: list[tuple[int, int]]) -> Any:
    """1 for each list whose colour is right with the wrong items kept from these heads."""
    right = np.zeros(len(batch))
    for rows, edits in forbidden(batch, heads):
        right[rows.numpy()] = answered(model, batch[rows], edits).numpy()
    return right


def _repair(model: Any, batch: Any, damage: Any, seed: int) -> Finding:
    chosen = top(damage, HEADS / damage.size)
    pool = [(layer, head) for layer in range(damage.shape[0]) for head in range(damage.shape[1])]
    others = [head for head in pool if head not in chosen]
    before, after = answered(model, batch).double().numpy(), accuracy(model, batch, chosen)
    gained, low, high = evidence.paired_difference(after, before, seed=seed)
    draws = [
        float((accuracy(model, batch, heads) - before).mean())
        for heads in evidence.random_equal(others, len(chosen), seed=seed)
    ]
    beside, plain = float(np.mean(draws)), float(before.mean())
    details = {"heads": chosen, "plain": plain, "random": draws}
    each = ", ".join(f"{100 * x:.1f}" for x in draws)
    reason = f"lists of {ITEMS}: {100 * plain:.1f}% right as they are; random heads gain {each} points"
    if plain > 0.8:
        reason += f", and no more than {100 * (1 - plain):.1f} could be gained"
    return Finding(
        "repair",
        verdict(100 * gained >= 20 and 100 * max(draws) < 5),
        100 * gained,
        (100 * low, 100 * high),
        floor=0.0,
        ceiling=100 * (1 - plain),
        baseline=100 * beside,
        reason=reason,
        details=details,
    )
