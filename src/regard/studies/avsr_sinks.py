"""Sinks in speech models (arXiv 2510.22603): tokens that turn into the first one, and a loss that keeps them from it.

A massive activation has `|h_tc| > ratio * median_c |h_tc|` at a block's output. An intermediate sink is a token after
the first that gets, in some head, a mean weight above 0.3 from the rows that may see it (at least 8 later ones), while
the cosine of its stream before that block to the first token's exceeds 0.9 (our reading). The loss is that of
`bos_decorrelation` on the blocks from the one where the activations appear, the largest rise of max / median.

Full size fine-tunes the decoder to transcribe `AVCode`, frames stacked by r, three ways: cross-entropy alone, with the
loss, and with an L2 penalty on the same hidden states, of the weight whose cross-entropy comes nearest to the loss's
(chosen on the first seed of each r).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import DEFAULT_MODEL, Claim, Finding, verdict

PAPER = "avsr-sinks"
TRAINS = "fine-tunes sixteen speech decoders; `--size full` does"
CLAIMS = [
    Claim(
        "massive",
        "tokens flagged by the streamed figures are those that the stream itself flags",
        kind="instrument",
        ours="share of (ratio, block, sample, token) that agree",
        holds_if="all agree",
    ),
    Claim(
        "indices",
        "intermediate sinks have their massive activations at the first token's features",
        kind="mechanism",
        paper="the same few feature indices in all sinks",
        ours="mean Jaccard overlap with the first token of the two largest features, over tokens flagged at ratio 30; "
        "the floor is that of tokens that are not flagged",
        holds_if="at least 0.5, and better than the floor",
    ),
    Claim(
        "decorrelates",
        "a few steps of the loss lower the cosine to the first token and cost little",
        kind="mechanism",
        ours="mean squared cosine after 20 steps over that before; the baseline is that of 20 steps without the loss",
        holds_if="better than the baseline, and cross-entropy up by less than 5%",
    ),
    Claim(
        "fewer-sinks",
        "the loss removes intermediate sinks",
        kind="mechanism",
        paper="sinks and massive activations vanish",
        ours="intermediate sinks a text, r = 2 and 8, with the loss over without; the baseline is an L2 penalty's",
        holds_if="at most 0.5, and at most half the L2 penalty's",
    ),
    Claim(
        "high-downsampling",
        "the loss lowers the error where much is thinned out",
        kind="mechanism",
        paper="word error falls at high downsampling",
        ours="character error at r = 8 without the loss less with it",
        holds_if="better than 0",
    ),
    Claim(
        "low-downsampling",
        "the loss costs nothing where little is",
        kind="mechanism",
        paper="stable at low downsampling",
        ours="character error at r = 2 without the loss less with it",
        holds_if="the interval reaches above -0.01",
    ),
]
RATIOS = (30, 100, 1000)
SAMPLES, LENGTH = 8, 256
SEEDS = {"smoke": 2, "full": 5}
# Steps, rows, tokens, learning rate and the loss's factor: a factor large enough to act in 20 steps.
SHORT = (20, 4, 128, 3e-4, 1.0)
# Steps, rows, learning rate, the loss's factor (the middle one of the paper's), seeds, texts of the test.
SPEECH = (1500, 32, 1e-3, 0.1, 2, 128)
PENALTIES = (1e-4, 1e-3, 1e-2)
RATES = (2, 8)
GATE = 0.3  # greatest character error of plain fine-tuning at the lowest rate
WEIGHT, COSINE, LATER = 0.3, 0.9, 8


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = DEFAULT_MODEL) -> list[Finding]:
    """Look for sinks in a trained model and try the loss on it; at full size fine-tune it on speech."""
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    seeds = range(seed, seed + SEEDS[size])
    looks = [look(loaded, s, device) for s in seeds]
    layers = layers_of(looks)
    findings = [
        _massive(looks),
        _indices(looks),
        _decorrelates([short(model, s, layers, device) for s in seeds], layers),
    ]
    if size == "smoke":
        return findings + [Finding(c.id, "not measured", reason=TRAINS) for c in CLAIMS[3:]]
    return findings + judge(speech(model, layers, seed, device))


def look(loaded: Any, seed: int, device: str) -> dict[str, Any]:
    """Flags, sinks and their largest features in one draw of texts."""
    import torch

    import regard
    from regard.measures.sinks import massive
    from regard.tasks.retoken import texts
    from regard.watch.intervene import Site, trace

    inputs = {"input_ids": texts(loaded, SAMPLES, LENGTH, seed).to(device)}
    parts = regard.anatomy(loaded.model, {"input_ids": inputs["input_ids"][:2]})
    atlas = watched(loaded.model, inputs)
    sites = [Site(block, "resid_post") for block in range(len(parts))]
    with torch.no_grad():
        size = torch.stack(list(trace(loaded.model, inputs, sites, anatomy=parts).values())).abs()
    over = (size.amax(-1) / size.median(-1).values).cpu().numpy()  # [layer, sample, token]
    pairs = size.topk(2, -1).indices.cpu().numpy()
    shared = (pairs[..., None] == pairs[:, :, :1, None]).any(-1).sum(-1)
    jaccard = shared / (4 - shared)
    flags = {r: massive(atlas, ratio=float(r)).values for r in RATIOS}
    return {
        "agree": float(np.mean([(flags[r] == (over > r)).mean() for r in RATIOS])),
        "flagged": {r: int((flags[r][..., 1:] > 0).sum()) for r in RATIOS},
        "first": {r: int((flags[r][..., 0] > 0).sum()) for r in RATIOS},
        "over": over,
        "jaccard": jaccard,
        "sinks": sinks(atlas),
    }


def watched(model: Any, inputs: dict[str, Any]) -> Any:
    """The atlas of received weight and of the stream."""
    import torch

    import regard
    from regard.watch.settings import Watch

    settings = Watch((), per_sample=("received_raw",), stream=True, tokens=False)
    with torch.no_grad(), regard.watch(model, statistics=settings) as recorded:
        model(**inputs, use_cache=False)
    return recorded.atlas


def sinks(atlas: Any) -> np.ndarray[Any, Any]:
    """Which tokens are intermediate sinks, [layer, sample, token]; none in the first block, before which none is."""
    received = atlas.need("received_raw").max("head").values
    like = atlas.need("bos_cos").values
    found = np.zeros(received.shape, dtype=bool)
    found[1:] = (received[1:] > WEIGHT) & (like[:-1] > COSINE)
    found[..., 0] = False
    found[..., found.shape[-1] - LATER :] = False
    return found


def layers_of(looks: list[dict[str, Any]]) -> list[int]:
    """Blocks from the one where massive activations appear: where the mean largest max / median rises most."""
    highest = np.mean([x["over"].max(-1).mean(-1) for x in looks], axis=0)
    return list(range(int(np.diff(highest, prepend=1.0).argmax()), len(highest)))


def blocks_of(model: Any, device: str) -> list[Any]:
    """The blocks of a decoder."""
    import torch

    import regard

    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    return [model.get_submodule(name) for name in regard.anatomy(model, {"input_ids": ids}).blocks]


def short(name: str, seed: int, layers: list[int], device: str) -> dict[str, Any]:
    """A few steps on text with the loss and without: mean squared cosine and cross-entropy of held-out windows."""
    import torch

    from regard.tasks.bytetext import StandardLibrary
    from regard.tasks.retoken import is_bytes, texts
    from regard.tasks.testbeds import load
    from regard.train.auxiliary import block_outputs
    from regard.train.objectives import bos_decorrelation
    from regard.train.simple import fit

    steps, rows, length, lr, factor = SHORT
    found: dict[str, Any] = {}
    for arm in ("with", "without"):
        loaded = load(name, device=device)
        if not is_bytes(loaded.tokenizer):
            raise ValueError(f"model must read bytes to be trained on, as testbed:decoder does; {name!r} does not")
        test, text = texts(loaded, 2 * SAMPLES, length, 10_000_019 + seed).to(device), StandardLibrary()
        with block_outputs(blocks_of(loaded.model, device)) as given:

            def entropy(network: Any, ids: Any, reduction: str = "mean") -> Any:
                logits = network(input_ids=ids, use_cache=False).logits[:, :-1].float()
                return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction=reduction)

            def loss(
                network: Any, ids: Any, factor: float = factor if arm == "with" else 0.0, given: Any = given
            ) -> Any:
                plain = entropy(network, ids)
                return plain + factor * bos_decorrelation(given, layers) if factor else plain

            def figures(given: Any = given, network: Any = loaded.model, test: Any = test) -> tuple[Any, Any]:
                with torch.no_grad():
                    each = entropy(network, test, "none").mean(1)
                    cosines = [
                        float(bos_decorrelation([g[i : i + 1] for g in given], layers)) for i in range(len(test))
                    ]
                return np.array(cosines), each.double().cpu().numpy()

            def drawn(generator: Any, text: Any = text) -> Any:
                return text.cut(rows, length, generator).to(device)

            if arm == "with":
                found["before"] = figures()
            fit(loaded.model, loss, drawn, steps, lr, seed)
            found[arm] = figures()
    return found


def speech(name: str, layers: list[int], seed: int, device: str) -> dict[str, Any]:
    """Every arm at every rate and seed: figures of `tuned`, and the penalties chosen."""
    _, _, _, factor, seeds, _ = SPEECH
    found: dict[str, Any] = {"chosen": {}, "arms": {}}
    for rate in RATES:
        for s in range(seed, seed + seeds):
            plain = tuned(name, rate, s, layers, 0.0, 0.0, device)
            kept = tuned(name, rate, s, layers, factor, 0.0, device)
            tried = PENALTIES if rate not in found["chosen"] else (found["chosen"][rate],)
            penalised = {p: tuned(name, rate, s, layers, 0.0, p, device) for p in tried}
            best = min(penalised, key=lambda p: abs(penalised[p]["entropy"].mean() - kept["entropy"].mean()))
            found["chosen"].setdefault(rate, best)
            found["arms"][rate, s] = {"without": plain, "with": kept, "l2": penalised[best]}
    return found


def tuned(
    name: str, rate: int, seed: int, layers: list[int], factor: float, penalty: float, device: str
) -> dict[str, Any]:
    """The decoder fine-tuned to transcribe, and what it does on new texts."""
    import torch

    from regard.tasks.avcode import AVCode, Rendering, Transcriber, error_rate
    from regard.tasks.testbeds import load
    from regard.train.auxiliary import block_outputs
    from regard.train.objectives import bos_decorrelation
    from regard.train.simple import fit

    steps, rows, lr, _, _, texts = SPEECH
    task, decoder = AVCode(), load(name, device=device).model
    blocks = blocks_of(decoder, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Transcriber(decoder, rate).to(device)

    def moved(batch: Any) -> Any:
        return Rendering(batch.frames.to(device), batch.text.to(device))

    with block_outputs(blocks) as given:

        def loss(module: Any, batch: Any) -> Any:
            total = module.loss(batch)
            total = total + factor * bos_decorrelation(given, layers) if factor else total
            return (
                total + penalty * torch.stack([given[i].square().mean() for i in layers]).mean() if penalty else total
            )

        fit(network, loss, lambda g: moved(task.batch(rows, g)), steps, lr, seed, warmup=steps // 20, decay=steps // 4)
    test = moved(task.batch(texts, torch.Generator().manual_seed(10_000_019 + seed)))
    with torch.no_grad():
        logits = network(test.frames, test.text).float()
        read = torch.cat([network.prompt(test.frames), decoder.get_input_embeddings()(test.text[:, :-1])], 1)
    atlas = watched(decoder, {"inputs_embeds": read})
    written = network.transcribe(test.frames, test.text.shape[1])
    return {
        "entropy": torch.nn.functional.cross_entropy(logits.mT, test.text, reduction="none").mean(1).cpu().numpy(),
        "error": error_rate(written.cpu(), test.text.cpu()).numpy(),
        "sinks": sinks(atlas).any(0).sum(-1).astype(float),
        "massive": float((atlas.need("resid_absmax") / atlas.need("resid_absmedian")).max()),
        "solver": float(error_rate(task.solve(test.frames.cpu()), test.text.cpu()).mean()),
    }


def _massive(looks: list[dict[str, Any]]) -> Finding:
    share = float(np.mean([x["agree"] for x in looks]))
    return Finding("massive", verdict(share == 1), share, ceiling=1.0, reason=f"ratios {', '.join(map(str, RATIOS))}")


def _indices(looks: list[dict[str, Any]]) -> Finding:
    over, jaccard = (np.stack([x[name] for x in looks])[..., 1:] for name in ("over", "jaccard"))
    sunk = np.stack([x["sinks"] for x in looks])[..., 1:]
    flagged = {str(r): sum(x["flagged"][r] for x in looks) for r in RATIOS}
    first = {str(r): sum(x["first"][r] for x in looks) for r in RATIOS}
    details: dict[str, Any] = {"flagged_after_the_first": flagged, "flagged_first": first, "sinks": int(sunk.sum())}
    details["jaccard_of_sinks"] = float(jaccard[sunk].mean()) if sunk.any() else None
    details["jaccard_of_all"] = jaccard.mean((0, 2, 3)).tolist()
    told = ", ".join(f"{flagged[str(r)]} at ratio {r}" for r in RATIOS)
    shown = f"tokens flagged after the first: {told}; {int(sunk.sum())} (block, token) are intermediate sinks"
    marked = over > RATIOS[0]
    if not marked.any():
        reason = f"none found: {shown}; the largest ratio after the first token is {over.max():.1f}"
        return Finding("indices", "not measured", reason=reason, details=details)
    # One row a text that has flagged tokens: the mean of these, and the mean of its others.
    ours, others = [], []
    for draw, flags in zip(jaccard, marked, strict=True):
        for text in range(flags.shape[1]):
            if flags[:, text].any():
                ours.append(draw[:, text][flags[:, text]].mean())
                others.append(draw[:, text][~flags[:, text]].mean())
    figure, floor = float(np.mean(ours)), float(np.mean(others))
    better = evidence.paired_difference(ours, others)[1] > 0
    return Finding(
        "indices", verdict(figure >= 0.5 and better), figure, evidence.bootstrap(ours), floor, 1.0, None, shown, details
    )


def _decorrelates(found: list[dict[str, Any]], layers: list[int]) -> Finding:
    def stacked(arm: str, figure: int) -> Any:
        return np.stack([f[arm][figure] for f in found])

    before, ours, plain = (stacked(arm, 0) for arm in ("before", "with", "without"))
    scale = before.mean()
    rise = float(stacked("with", 1).mean() / stacked("before", 1).mean() - 1)
    other = float(stacked("without", 1).mean() / stacked("before", 1).mean() - 1)
    better = evidence.seeds_and_items(plain - ours)[0] > 0
    reason = (
        f"blocks {layers[0]} to {layers[-1]}, mean squared cosine {scale:.3f} before; cross-entropy {100 * rise:+.1f}%"
    )
    reason += f", {100 * other:+.1f}% without the loss"
    return Finding(
        "decorrelates",
        verdict(better and rise < 0.05),
        float(ours.mean() / scale),
        evidence.seeds_and_items(ours / scale),
        baseline=float(plain.mean() / scale),
        reason=reason,
        details={"layers": layers, "cross_entropy_rise": rise, "factor": SHORT[4]},
    )


def judge(found: dict[str, Any]) -> list[Finding]:
    """What the fine-tuned decoders say."""
    arms = found["arms"]
    seeds = sorted({s for _, s in arms})

    def stacked(figure: str, arm: str, rates: Any = RATES) -> Any:
        return np.stack([np.concatenate([arms[rate, s][arm][figure] for rate in rates]) for s in seeds])

    reached = float(stacked("error", "without", RATES[:1]).mean())
    names = ("without", "with", "l2")
    details: dict[str, Any] = {
        arm: {f"r={r}": {k: float(stacked(k, arm, [r]).mean()) for k in ("error", "entropy", "sinks")} for r in RATES}
        for arm in names
    }
    details |= {"massive": {arm: max(arms[key][arm]["massive"] for key in arms) for arm in names}}
    details |= {"solver": float(np.mean([a["with"]["solver"] for a in arms.values()]))}
    details |= {"penalty": {f"r={r}": p for r, p in found["chosen"].items()}}
    if reached > GATE:
        reason = (
            f"testbed below its gate: character error {reached:.2f} without the loss at r = {RATES[0]}, {GATE} needed"
        )
        return [Finding(c.id, "not measured", reason=reason, details=details) for c in CLAIMS[3:]]
    counts = {arm: stacked("sinks", arm) for arm in names}
    plain, ours, penalised = (float(counts[arm].mean()) for arm in names)
    told = f"{plain:.2f} intermediate sinks a text without, {ours:.2f} with the loss, {penalised:.2f} with L2"
    if plain == 0:
        fewer = Finding("fewer-sinks", "not measured", reason=f"no sinks to remove: {told}", details=details)
    else:
        interval = evidence.seeds_and_items(counts["with"] / plain)
        holds = ours <= plain / 2 and ours <= penalised / 2
        fewer = Finding(
            "fewer-sinks", verdict(holds), ours / plain, interval, 0.0, None, penalised / plain, told, details
        )
    findings = [fewer]
    for claim, rate, least in (("high-downsampling", RATES[-1], 0.0), ("low-downsampling", RATES[0], -0.01)):
        gain = stacked("error", "without", [rate]) - stacked("error", "with", [rate])
        low, high = evidence.seeds_and_items(gain)
        state = verdict(low > 0 if claim == "high-downsampling" else high > least)
        reason = ", ".join(f"{arm} {details[arm][f'r={rate}']['error']:.3f}" for arm in names)
        findings.append(Finding(claim, state, float(gain.mean()), (low, high), reason=f"character error: {reason}"))
    return findings
