"""AttentionInfluence (arXiv 2505.07293): documents chosen by how much a small model needs its retrieval heads for them.

Heads are found on look-ups in a JSON object and score as in `retrieval-heads`; the top 5% are masked with uniform rows,
`1 / (i + 1)`. A document's score is `(L_masked - L_base) / L_base`. The smoke pool are needles with two questions
(recall) and filler with as many or fewer codes that nobody asks for; each recall document is compared with the filler
document of the nearest base loss, since dividing by the base loss favours easy text. Told besides, and no part of a
verdict: what masking every head that copies does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "attention-influence"
TRAINS = "trains a scorer and nine decoders on what is chosen from 20,000 documents; `--size full` does"
CLAIMS = [
    Claim(
        "uniform",
        "a masked head gives the running mean of its values",
        kind="instrument",
        ours="largest difference from the mean of v over the keys up to each row",
        holds_if="at most 1e-5",
    ),
    Claim(
        "masking",
        "masking retrieval heads is far worse than masking as many others",
        kind="mechanism",
        paper="GSM8K 0.182 to 0.007, random heads 0.127",
        ours="share of answer tokens that are the first choice, lost on look-ups; the baseline is that of random heads",
        holds_if="at least twice the baseline, and better than it",
    ),
    Claim(
        "selects",
        "the score tells documents that need recall from filler of the same base loss",
        kind="mechanism",
        ours="AUROC of the score; the baseline is that of as many random heads, the floor that of the base loss alone",
        holds_if="at least 0.9, and the baseline lower by 0.2",
    ),
    Claim(
        "selected-data",
        "a model trained on the selected documents recalls better",
        kind="mechanism",
        paper="1.4 to 3.5 points on several benchmarks, 7B parameters",
        ours="recall accuracy after training on the top 20%; the baseline is a random 20%, the floor the 20% of "
        "highest loss",
        holds_if="better than both",
    ),
]
SHARE, COPIES = 0.05, 0.1  # of all heads; the score from which a head counts as copying
PROBES = {"smoke": (8, 1024), "full": (800, 4096)}  # look-ups and their length
TESTS, TEST_LENGTH = 8, 1024
DOCUMENTS, LENGTH, DRAWS = 64, 256, 5
# Recall documents, filler for each, and candidates for one filler; dims of scorer and student; steps of each; seeds.
POOL = (4000, 4, 3)
TRAINING = (128, 256, 2000, 1000, 3)
LAYERS, ROWS, WIDTH = 4, 32, 128


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Find the heads, mask them on look-ups and on documents; at full size also train on what they choose."""
    import torch

    from regard.studies.testbed import below_gate
    from regard.tasks.keyvalue import KeyValueRetrieval
    from regard.tasks.retoken import batches
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    n, length = PROBES[size]
    generator = torch.Generator().manual_seed(seed)
    scores = head_scores(loaded.model, batches(loaded, KeyValueRetrieval(length), n, generator, chunk=4))
    ranked = [divmod(int(i), scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]
    count = max(1, round(SHARE * len(ranked)))
    heads, random = ranked[:count], evidence.random_equal(ranked[count:], count, draws=DRAWS, seed=seed)
    tests = batches(loaded, KeyValueRetrieval(TEST_LENGTH), TESTS, generator, chunk=4)
    findings = [_uniform(loaded.model, tests[0], heads, device)]
    if reason := below_gate(loaded, "needle_256", "copy_paste"):
        findings += [Finding(c.id, "not measured", reason=reason) for c in CLAIMS[1:3]]
    else:
        copying = [head for head in ranked if scores[head] >= COPIES]
        findings.append(_masking(loaded.model, tests, heads, random, copying, scores))
        findings.append(_selects(loaded, heads, random, copying, seed))
    if size == "smoke":
        return [*findings, Finding("selected-data", "not measured", reason=TRAINS)]
    _, _, _, _, seeds = TRAINING
    return [*findings, _selected([trained_on_choices(s, device) for s in range(seed, seed + seeds)])]


def head_scores(model: Any, lookups: list[Any]) -> np.ndarray[Any, Any]:
    """Mean copy-paste rate of every head, [layer, head]."""
    from regard.tasks.probes import watch_needles

    return watch_needles(model, lookups).measure("retrieval").values


def right(model: Any, lookups: list[Any], masked: list[tuple[int, int]] | None = None) -> np.ndarray[Any, Any]:
    """Share of each test's answer tokens that are the model's first choice, the true ones before them given."""
    import torch

    from regard.watch.heads import mask_heads
    from regard.watch.intervene import intervene

    device, found = next(model.parameters()).device, []
    with torch.no_grad(), intervene(model, mask_heads(masked or [], "uniform")):
        for batch in lookups:
            top = model(input_ids=batch.input_ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
            asked = batch.labels[:, 1:]
            found += ((top == asked).sum(-1) / (asked >= 0).sum(-1)).tolist()
    return np.array(found)


def recall_documents(n: int, generator: Any) -> Any:
    """Three codes said among filler, and two of them asked for."""
    from regard.tasks.needle import Needle

    return Needle(LENGTH, distractors=(2, 2), questions=2, split="test").batch(n, generator).input_ids


def filler_documents(n: int, generator: Any) -> Any:
    """Filler with none to six codes said, no name twice and nothing asked for."""
    import random

    import torch

    from regard.tasks.bytetext import BOS
    from regard.tasks.needle import draw_name, sentences

    rows = []
    for seed in torch.randint(2**62, (n,), generator=generator).tolist():
        rng = random.Random(seed)
        names = {draw_name(rng, "test"): rng.randrange(10**5) for _ in range(rng.randint(0, 6))}
        told = [f"the code of {name} is {code:05}. ".encode() for name, code in names.items()]
        hay, ends = sentences(rng, LENGTH - 1 - sum(map(len, told)))
        cuts = sorted(rng.choice(ends) for _ in told)
        pieces = [hay[a:b] for a, b in zip([0, *cuts], [*cuts, len(hay)], strict=True)]
        text = pieces[0] + b"".join(t + p for t, p in zip(told, pieces[1:], strict=True))
        rows.append([BOS, *text])
    return torch.tensor(rows)


def trained_on_choices(seed: int, device: str) -> dict[str, Any]:
    """One seed: a scorer on the unchosen mixture, a pool, three choices from it, and a model trained on each."""
    import torch

    from regard.tasks.associative import AssociativeRecall
    from regard.tasks.pool import MarkovFiller, matched
    from regard.train.select import attention_influence, document_losses, keep_top

    scorer_dim, dim, scorer_steps, steps, _ = TRAINING
    recalls, each, offered = POOL
    task = AssociativeRecall(WIDTH, pairs=16, queries=16)
    filler = MarkovFiller(WIDTH, task.vocab)
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7)

    def mixture(g: Any) -> Any:
        some = ROWS // 4
        return torch.cat([task.batch(some, g).input_ids, filler.batch(ROWS - some, g)]).to(device)

    scorer = fitted(scorer_dim, mixture, scorer_steps, seed, device)
    probes = task.batch(256, generator)
    spans = {"value": probes.spans["pair"] + torch.tensor([1, 0]), "answer": probes.spans["answer"]}
    scores = head_scores(scorer, [type(probes)(probes.input_ids, probes.labels, spans)])
    ranked = [divmod(int(i), scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]
    heads = ranked[: max(1, round(SHARE * len(ranked)))]

    needed, others = task.batch(recalls, generator).input_ids, filler.batch(recalls * each * offered, generator)
    easy, hard = document_losses(scorer, needed, chunk=64), document_losses(scorer, others, chunk=64)
    partners = matched(easy, hard, each).flatten()
    documents = torch.cat([needed, others[partners]])
    base = torch.cat([easy, hard[partners]])
    score = attention_influence(scorer, heads, documents, base=base, chunk=64).score
    kept = {
        "selected": keep_top(score),
        "random": keep_top(torch.rand(len(score), generator=generator)),
        "highest loss": keep_top(base),
    }
    test, plain = task.batch(512, generator), filler.batch(256, generator)
    found: dict[str, Any] = {
        "auroc": evidence.auc(score.numpy(), np.arange(len(score)) < recalls),
        "gap": float((easy.mean() - hard[partners].mean()).abs()),
        "best_head": float(scores.max()),
    }
    for name, mask in kept.items():
        chosen = documents[mask]

        def drawn(g: Any, chosen: Any = chosen) -> Any:
            return chosen[torch.randint(len(chosen), (ROWS,), generator=g)].to(device)

        student = fitted(dim, drawn, steps, seed, device)
        found[name] = {
            "right": right(student, [test[i : i + 64] for i in range(0, len(test), 64)]),
            "recall_share": float((mask.nonzero() < recalls).double().mean()),
            "filler_loss": float(document_losses(student, plain, chunk=64).mean()),
        }
    return found


def fitted(dim: int, batches: Any, steps: int, seed: int, device: str) -> Any:
    """A decoder of this width trained on batches of documents."""
    from dataclasses import replace

    import torch

    from regard.tasks.decoder import SIZES, build
    from regard.train.simple import fit

    shape: dict[str, Any] = {
        "dim": dim,
        "layers": LAYERS,
        "heads": dim // 32,
        "kv_heads": dim // 32,
        "mlp": 8 * dim // 3,
    }
    with torch.random.fork_rng(devices=[]):
        network = build(replace(SIZES["full"], **shape), seed).to(device)

    def loss(module: Any, ids: Any) -> Any:
        logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    fit(network, loss, batches, steps, 2e-3, seed, warmup=steps // 20, decay=steps // 4)
    return network


def _uniform(model: Any, batch: Any, heads: list[tuple[int, int]], device: str) -> Finding:
    import torch

    from regard.watch.heads import mask_heads
    from regard.watch.intervene import Site, trace

    inputs, worst = {"input_ids": batch.input_ids[:2, :256].to(device)}, 0.0
    for layer, head in heads:
        sites = [Site(layer, "v"), Site(layer, "z", head=head)]
        with torch.no_grad():
            v, z = trace(model, inputs, sites, edits=mask_heads([(layer, head)], "uniform")).values()
        group = model.config.num_attention_heads // v.shape[1]
        own = v[:, head // group].double()
        running = own.cumsum(1) / torch.arange(1, own.shape[1] + 1, device=own.device)[:, None]
        worst = max(worst, float((z.reshape(running.shape) - running).abs().max()))
    return Finding("uniform", verdict(worst <= 1e-5), worst, floor=0.0, reason=f"heads {heads}")


def _masking(model: Any, tests: list[Any], heads: Any, random: Any, copying: Any, scores: Any) -> Finding:
    before, after = right(model, tests), right(model, tests, heads)
    lost, low, high = evidence.paired_difference(before, after)
    others = np.stack([before - right(model, tests, draw) for draw in random])
    beside = float(others.mean())
    better = evidence.paired_difference(before - after, others.mean(0))[1] > 0
    reason = f"{len(heads)} of {scores.size} heads; {before.mean():.0%} of answer tokens right before"
    details = {"heads": heads, "scores": [float(scores[h]) for h in heads], "copying": copying}
    if copying:
        details["without_all_copying"] = float((before - right(model, tests, copying)).mean())
        reason += f"; {len(copying)} heads copy, and without all of them {details['without_all_copying']:.2f} are lost"
    details |= {"random": others.mean(1).tolist()}
    state = verdict(better and lost >= 2 * beside)
    return Finding("masking", state, lost, (low, high), 0.0, float(before.mean()), beside, reason, details)


def _selects(loaded: Any, heads: Any, random: Any, copying: Any, seed: int) -> Finding:
    """Documents of two seeds, half of them each; intervals resample matched pairs."""
    import torch

    from regard.tasks.pool import matched
    from regard.train.select import attention_influence, document_losses

    generators = [torch.Generator().manual_seed(1_000_003 * (seed + s) + 11) for s in range(2)]
    needed = torch.cat([recall_documents(DOCUMENTS // 2, g) for g in generators])
    others = torch.cat([filler_documents(DOCUMENTS, g) for g in generators])
    easy, hard = document_losses(loaded.model, needed), document_losses(loaded.model, others)
    partners = matched(easy, hard).flatten()
    documents, base = torch.cat([needed, others[partners]]), torch.cat([easy, hard[partners]])

    def pairs(values: Any) -> Any:
        return values.numpy().reshape(2, -1).T  # [pair, (recall, filler)]

    def area(items: Any) -> float:
        return evidence.auc(items.T.ravel(), np.repeat([True, False], len(items)))

    def scored(chosen: Any) -> Any:
        return pairs(attention_influence(loaded.model, chosen, documents, base=base).score)

    own, draws = scored(heads), [scored(draw) for draw in random]
    figure, others_area = area(own), [area(x) for x in draws]
    baseline, floor = float(np.mean(others_area)), area(pairs(base))
    shown = own.mean(0)
    reason = (
        f"{DOCUMENTS} pairs of {LENGTH} bytes; mean score {shown[0]:.3f} of recall, {shown[1]:.3f} of filler; base "
    )
    reason += f"losses {easy.mean():.3f} and {hard[partners].mean():.3f}"
    details: dict[str, Any] = {"random": others_area, "by_seed": [area(half) for half in np.split(own, 2)]}
    if copying:
        details["all_copying"] = area(scored(copying))
        reason += f"; with all {len(copying)} heads that copy masked {details['all_copying']:.3f}"
    return Finding(
        "selects",
        verdict(figure >= 0.9 and baseline <= figure - 0.2),
        figure,
        evidence.bootstrap(own, area, draws=500),
        floor,
        1.0,
        baseline,
        reason,
        details,
    )


def _selected(found: list[dict[str, Any]]) -> Finding:
    def over(name: str) -> Any:
        return np.stack([f[name]["right"] for f in found])

    ours, chance, hardest = (over(name) for name in ("selected", "random", "highest loss"))
    better = all(evidence.seeds_and_items(ours - other)[0] > 0 for other in (chance, hardest))
    names = ("selected", "random", "highest loss")
    details: dict[str, Any] = {
        name: {k: [f[name][k] for f in found] for k in ("recall_share", "filler_loss")} for name in names
    }
    details |= {k: [f[k] for f in found] for k in ("auroc", "gap", "best_head")}
    shares = ", ".join(f"{np.mean(details[n]['recall_share']):.0%} {n}" for n in names)
    losses = ", ".join(f"{np.mean(details[n]['filler_loss']):.3f} {n}" for n in names)
    reason = f"{len(found)} seeds; recall documents among the chosen: {shares}; loss on filler: {losses}"
    return Finding(
        "selected-data",
        verdict(better),
        float(ours.mean()),
        evidence.seeds_and_items(ours),
        float(hardest.mean()),
        1.0,
        float(chance.mean()),
        reason,
        details,
    )
