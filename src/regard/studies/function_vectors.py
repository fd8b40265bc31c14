"""Function vectors steer where no read-out decodes (arXiv 2604.02608).

The tasks are the eight maps of `ContextMaps`. The symbols are dealt into four parts: a vector is the mean over two
parts of the last token's state with five examples minus without; layer and strength are chosen on the third part, and
the fourth is judged; each part is judged once. A prompt without examples does not say which map is meant, so that a
guess is right in about a fifth of them: the floor. Only layers below the last are steered and read.

The probe of `full` reads the map's value from a state and is tested on the other template. States hold x, and there are
as few x as there are values: what it reads of a shuffled map is subtracted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "function-vectors"
MODEL = "testbed:maps"
CLAIMS = [
    Claim(
        "lens",
        "the lens at the last layer is the model",
        kind="instrument",
        ours="largest difference of logits",
        holds_if="at most 1e-5",
    ),
    Claim(
        "gap",
        "function vectors make the model do what the logit lens does not show",
        kind="mechanism",
        paper="steerable without decodable is common, the reverse holds in 3 of 72 cases",
        ours="accuracy when steered minus accuracy of the best intermediate lens of the same prompts, mean of eight "
        "tasks; the floor is the plain model's accuracy, the baseline that of the lens",
        holds_if="better than 0",
    ),
    Claim(
        "random",
        "random vectors of equal norm do not steer",
        kind="mechanism",
        ours="accuracy under random vectors of the chosen layers and strengths; the floor is the plain model's",
        holds_if="at most 0.1",
    ),
    Claim(
        "cells",
        "what can be decoded can be steered",
        kind="mechanism",
        paper="3 of 72",
        ours="share of (model, task, template of the vector, template of the prompts) with lens accuracy of at least "
        "0.5 and steered accuracy below 0.5",
        holds_if="at most 0.1",
    ),
]
PARTS, SHOTS, PROMPTS, DRAWS = 4, 5, 64, 5
ALPHAS = (0.5, 1.0, 2.0)
CELL = 0.5
MODELS = 5  # trained in size full
PROBE_STEPS = 300


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Steer and read the shipped model; in size full also models of five seeds, with both templates."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    templates = (0,) if size == "smoke" else (0, 1)
    judged = [judge(loaded.model, (t, t), seed) for t in templates]
    findings = [_lens(loaded.model, seed), _gap(judged, seed), _random(judged, seed)]
    if size == "smoke":
        return [*findings, Finding("cells", "not measured", reason="size full trains the models it needs")]
    networks = [trained(s, device) for s in range(seed, seed + MODELS)]
    return [*findings, _cells([n for n, ready in networks if ready], seed, loaded.model)]


def trained(seed: int, device: str) -> tuple[Any, bool]:
    """The testbed of another seed, and whether it passes its gates."""
    from regard.tasks.symbolic import SYMBOLIC
    from regard.train.trainer import Trainer

    bed = SYMBOLIC["maps"]
    network = bed.build(seed)
    Trainer(network, bed.batches(seed), bed.recipe, None).run()
    ready = bed.gates(network, 500)["ready"]
    return network.to(device), ready


def judge(model: Any, templates: tuple[int, int], seed: int) -> dict[str, Any]:
    """Vectors of one template on prompts of another: hits [task, symbol] of every read-out.

    Keys: `plain`, `steered`, `random` [task, symbol, draw], `lens` [task, layer, symbol], `steered_lens` (likewise, of
    the steered model; NaN below the layer that was steered), `chosen` [task, part] (layer, alpha), `overlap` (share of
    the vector's ten best words that are values of the map, which is all symbols, so: that are symbols).
    """
    import torch

    from regard.steer.directions import mean_difference
    from regard.tasks.maps import ContextMaps

    generator = torch.Generator().manual_seed(seed)
    task = ContextMaps()
    parts = torch.randperm(task.symbols, generator=generator).chunk(PARTS)
    layers = range(model.config.num_hidden_layers - 1)
    tasks, symbols = task.maps, task.symbols
    found: dict[str, Any] = {name: np.zeros((tasks, symbols)) for name in ("plain", "steered")}
    found["random"] = np.zeros((tasks, symbols, DRAWS))
    found["lens"] = np.zeros((tasks, len(layers), symbols))
    found["steered_lens"] = np.full((tasks, len(layers), symbols), np.nan)
    found["overlap"] = np.zeros(tasks)
    chosen: list[list[tuple[int, float]]] = []
    zero = ContextMaps(0, template=templates[1], options=False)
    for which in range(tasks):
        chosen.append([])
        for n in range(PARTS):
            train = torch.cat([parts[(n + 2) % PARTS], parts[(n + 3) % PARTS]])
            few = prompts(ContextMaps(SHOTS, templates[0], False), train, which, PROMPTS, generator)
            none = prompts(ContextMaps(0, templates[0], False), train, which, 4 * len(train), generator)
            a, b = (states(model, ids[:, :-1], layers) for ids in (few, none))
            vectors = {layer: mean_difference(a[layer], b[layer]) for layer in layers}
            validate, test = (every(zero, parts[k % PARTS], which) for k in (n + 1, n))
            layer, alpha = max(
                ((at, x) for at in layers for x in ALPHAS),
                key=lambda c: steer(model, validate, c[0], c[1] * vectors[c[0]]).mean(),
            )
            chosen[-1].append((layer, alpha))
            at, vector = parts[n].numpy(), alpha * vectors[layer]
            found["plain"][which, at] = steer(model, test, layer, 0 * vector)
            found["steered"][which, at] = steer(model, test, layer, vector)
            found["lens"][which][:, at] = lens(model, test, layers)
            found["steered_lens"][which][layer:, at] = lens(model, test, layers, (layer, vector))[layer:]
            found["overlap"][which] += coherent(model, vectors[layer], task) / PARTS
            for draw in range(DRAWS):
                other = torch.randn(vector.shape, generator=generator).to(vector)
                found["random"][which, at, draw] = steer(model, test, layer, other / other.norm() * vector.norm())
    return {**found, "chosen": chosen}


def prompts(task: Any, symbols: Any, which: int, n: int, generator: Any) -> Any:
    """n sequences of one map over some of the symbols; the last token is the answer."""
    import torch

    return task.batch(n, generator, torch.full((n,), which), inputs=symbols).input_ids


def every(task: Any, symbols: Any, which: int) -> Any:
    """The prompts without examples of these symbols, one each."""
    import torch

    ids = task.batch(1, torch.Generator().manual_seed(0), torch.tensor([which])).input_ids.repeat(len(symbols), 1)
    ids[:, 1], ids[:, 3] = (task.vocabulary["s0"] + x for x in (symbols, task.table[which, symbols]))
    return ids


def states(model: Any, ids: Any, layers: Any, how: tuple[int, Any] | None = None) -> dict[int, Any]:
    """`resid_post` of the last token at some layers, maybe with a vector added at one of them."""
    from regard.watch.intervene import Edit, Site, trace

    edits = [] if how is None else [Edit(Site(how[0], "resid_post", pos=-1), "add", value=how[1])]
    sites = {layer: Site(layer, "resid_post", pos=-1) for layer in layers}
    read = trace(model, {"input_ids": ids.to(model.device)}, list(sites.values()), edits=edits)
    return {layer: read[site] for layer, site in sites.items()}


def steer(model: Any, ids: Any, layer: int, vector: Any) -> Any:
    """Whether the first choice after each prompt is its answer, with a vector added at the last token."""
    import torch

    from regard.watch.intervene import Edit, Site, intervene

    with torch.no_grad(), intervene(model, Edit(Site(layer, "resid_post", pos=-1), "add", value=vector)):
        top = model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits[:, -1].argmax(-1)
    return (top.cpu() == ids[:, -1]).double().numpy()


def lens(model: Any, ids: Any, layers: Any, how: tuple[int, Any] | None = None, tuned: Any = None) -> Any:
    """Whether the first choice of the lens at each layer is the answer, [layer, prompt]."""
    import torch

    from regard.steer.lens import logit_lens

    read = torch.stack(list(states(model, ids[:, :-1], layers, how).values()))
    with torch.no_grad():
        top = logit_lens(model, read if tuned is None else tuned(read)).argmax(-1).cpu()
    return (top == ids[:, -1]).double().numpy()


def coherent(model: Any, vector: Any, task: Any) -> float:
    """Share of the ten words that a vector is projected on most that are symbols, not signs."""
    import torch

    from regard.steer.lens import logit_lens

    with torch.no_grad():
        top = logit_lens(model, vector[None])[0].topk(10).indices.cpu() - task.vocabulary["s0"]
    return float(((top >= 0) & (top < task.symbols)).double().mean())


def other_readings(model: Any, template: int, seed: int) -> dict[str, Any]:
    """Accuracy on prompts without examples, [task, layer], of a tuned lens, a probe, and the probe on shuffled maps."""
    import torch

    from regard.steer.lens import TunedLens
    from regard.tasks.maps import ContextMaps

    generator = torch.Generator().manual_seed(seed)
    layers = range(model.config.num_hidden_layers - 1)
    task, everything = ContextMaps(), torch.arange(ContextMaps().symbols)
    ids = ContextMaps(SHOTS, template, False).batch(512, generator).input_ids[:, :-1]
    seen = states(model, ids, range(len(layers) + 1))
    tuned = TunedLens(len(layers), model.config.hidden_size).to(model.device)
    tuned.fit(torch.stack([seen[layer] for layer in layers]), seen[len(layers)], seed=seed)
    tests = [every(ContextMaps(0, template, False), everything, which) for which in range(task.maps)]
    found = {"tuned": np.stack([lens(model, ids, layers, tuned=tuned).mean(-1) for ids in tests])}
    both = [
        states(model, every(ContextMaps(0, t, False), everything, 0)[:, :-1], layers) for t in (1 - template, template)
    ]
    for name in ("probe", "control"):
        table = task.table if name == "probe" else task.table.gather(1, shuffled(task, generator))
        found[name] = np.array(
            [[probe(both[0][at], both[1][at], values, seed) for at in layers] for values in table.to(model.device)]
        )
    return found


def shuffled(task: Any, generator: Any) -> Any:
    """An order of the symbols for every map."""
    import torch

    return torch.rand(task.maps, task.symbols, generator=generator).argsort(1)


def probe(train: Any, test: Any, values: Any, seed: int) -> float:
    """Accuracy on `test` of two layers trained to tell each symbol's value from `train`."""
    import torch
    from torch import nn

    from regard.train.simple import fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(train.shape[1], 64), nn.ReLU(), nn.Linear(64, len(values))).to(train)
    fit(net, lambda m, _: nn.functional.cross_entropy(m(train), values), lambda g: None, PROBE_STEPS, 1e-2, seed)
    with torch.no_grad():
        return float((net(test).argmax(-1) == values).double().mean())


def _lens(model: Any, seed: int) -> Finding:
    import torch

    from regard.steer.lens import logit_lens
    from regard.tasks.maps import ContextMaps

    ids = ContextMaps(3, options=False).batch(32, torch.Generator().manual_seed(seed)).input_ids
    last = model.config.num_hidden_layers - 1
    with torch.no_grad():
        read = logit_lens(model, states(model, ids, [last])[last])
        gap = float((read - model(input_ids=ids.to(model.device), use_cache=False).logits[:, -1]).abs().max())
    return Finding("lens", verdict(gap <= 1e-5), gap, floor=0.0, reason="32 prompts, every word")


def _best(hits: Any) -> Any:
    """Of hits [task, layer, symbol], those of each task's best layer: chosen on what is judged, against the claim."""
    best = hits.mean(-1).argmax(-1)
    return np.stack([of_task[layer] for of_task, layer in zip(hits, best, strict=True)])


def _gap(judged: list[dict[str, Any]], seed: int) -> Finding:
    from regard.tasks.maps import ContextMaps

    steered = np.concatenate([j["steered"] for j in judged])
    read = np.concatenate([_best(j["lens"]) for j in judged])
    after = np.concatenate([np.nan_to_num(j["steered_lens"]).mean(-1).max(-1) for j in judged])
    plain = float(np.mean([j["plain"].mean() for j in judged]))
    figure = float((steered - read).mean())
    low, high = evidence.seeds_and_items(steered - read, seed=seed)
    signs = float(np.mean([j["overlap"].mean() for j in judged]))
    task = ContextMaps()
    share = task.symbols / len(task.vocabulary)
    details = {
        "steered": steered.mean(1).tolist(),
        "lens": read.mean(1).tolist(),
        "lens_when_steered": after.tolist(),
        "chosen": [j["chosen"] for j in judged],
    }
    reason = (
        f"steered {steered.mean():.3f}, lens {read.mean():.3f} (best layer of the judged prompts), lens of the steered "
        f"model {after.mean():.3f}; {signs:.0%} of a vector's ten best words are symbols, {share:.0%} of all words; "
        "tasks and symbols resampled"
    )
    return Finding("gap", verdict(low > 0), figure, (low, high), plain, 1.0, float(read.mean()), reason, details)


def _random(judged: list[dict[str, Any]], seed: int) -> Finding:
    hits = np.concatenate([j["random"].mean(-1) for j in judged])
    plain, steered = (float(np.mean([j[k].mean() for j in judged])) for k in ("plain", "steered"))
    figure, interval = float(hits.mean()), evidence.seeds_and_items(hits, seed=seed)
    beyond = ", which is above 0.1 already" if plain > 0.1 else ""
    reason = f"{DRAWS} draws a prompt; without any vector {plain:.3f}{beyond}, with the function vectors {steered:.3f}"
    return Finding("random", verdict(figure <= 0.1), figure, interval, plain, reason=reason)


def _cells(models: list[Any], seed: int, shipped: Any) -> Finding:
    if not models:
        return Finding("cells", "not measured", reason="none of the models that were trained passes its gates")
    odd, names = [], ("neither", "decoded only", "steered only", "both")
    counts = dict.fromkeys(names, 0)
    for model in models:
        one = []
        for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
            found = judge(model, pair, seed)
            read, done = _best(found["lens"]).mean(1) >= CELL, found["steered"].mean(1) >= CELL
            one += [float(r and not d) for r, d in zip(read, done, strict=True)]
            for r, d in zip(read, done, strict=True):
                counts[names[int(r) + 2 * int(d)]] += 1
        odd.append(one)
    figure, interval = float(np.mean(odd)), evidence.seeds_and_items(np.array(odd), seed=seed)
    readings = {k: v.max(1).tolist() for k, v in other_readings(shipped, 0, seed).items()}
    told = ", ".join(f"{n} {name}" for name, n in counts.items())
    means = ", ".join(f"{k} {np.mean(v):.2f}" for k, v in readings.items())
    reason = f"{len(models)} of {MODELS} models pass their gates; {told}; best layers of the shipped model: {means}"
    details = {"cells": counts, "readings": readings}
    return Finding("cells", verdict(figure <= 0.1), figure, interval, reason=reason, details=details)
