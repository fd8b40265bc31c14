"""Saliency of the earlier output (arXiv 2601.20279): weights times their gradient, at words for what is not there.

Captions are written greedily; every word that names an object is judged by the row that predicts it. Layers 6 to 8 of
32 lie a fifth down; here that is the layer at the same depth. Controls are log p of the word and the plain weights on
earlier output. SGRS samples among five words and rejects what rests too little on the output; LocoRE strengthens the
weights on the last eight output tokens. Both are held against plain decoding of equal recall: sampling among as many
words without rejection, and the plain model with the end of the sentence made likelier (the stop curve).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "saliency-drops"
MODEL = "testbed:vlm"
CLAIMS = [
    Claim(
        "dense",
        "saliency from one row equals that from the matrices and their gradients",
        kind="instrument",
        ours="largest difference over the object words of one caption",
        holds_if="at most 1e-5",
    ),
    Claim(
        "auroc",
        "words for objects that are not there have lower saliency",
        kind="mechanism",
        paper="hallucination rate 68-76% in the lowest bin of saliency, 18-28% in the highest (second-hand)",
        ours="AUROC of low saliency for false objects; the baseline is that of low weights on earlier output",
        holds_if="above 0.6, and its interval over draws and captions above 0.5",
    ),
    Claim(
        "confidence",
        "saliency tells more than the word's own probability",
        kind="mechanism",
        ours="AUROC of low saliency less that of low log p",
        holds_if="the interval over draws and captions is above 0",
    ),
    Claim(
        "locore",
        "stronger weights on recent output lower hallucination",
        kind="mechanism",
        paper="lower CHAIR at equal POPE for LLaVA-1.5 and Qwen2-VL",
        ours="share of false objects among those named, LocoRE less plain; the baseline is the stop curve there",
        holds_if="below 0 by the paired interval over captions, and below the stop curve at equal recall",
    ),
    Claim(
        "sgrs",
        "rejecting words of low saliency lowers hallucination",
        kind="mechanism",
        paper="lower CHAIR at equal POPE for LLaVA-1.5 and Qwen2-VL",
        ours="share of false objects among those named, SGRS less sampling among as many words without rejection",
        holds_if="below 0 by the paired interval over captions, and below the stop curve at equal recall",
    ),
    Claim(
        "large",
        "both lower CHAIR on large models",
        kind="replication",
        paper="LLaVA-1.5 and Qwen2-VL",
        ours="CHAIR",
        holds_if="lower at equal recall",
        waits="needs large vision-language models from the hub and COCO's pictures",
    ),
]
TOKENS = {"smoke": 100, "full": 600}
DRAWS = {"smoke": 2, "full": 5}
CAPTIONS = {"smoke": 48, "full": 1000}
SAMPLED = {"smoke": 16, "full": 200}
BETA, WIDTH, TOP, MOST = 0.15, 8, 5, 24


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Judge words of captions, then decode with both mechanisms."""
    from regard.studies.testbed import below_gate
    from regard.tasks.vlm import seer

    eye = seer(model, device)
    draws = [judged(eye, TOKENS[size], seed + 1000 * d) for d in range(DRAWS[size])]
    dense = _dense(eye, draws[0])
    if reason := below_gate(eye.loaded, "caption_f1", "chair_i", "partner"):
        return [dense, *unmeasured(CLAIMS[1:], reason)]
    curve = stopped(eye, CAPTIONS[size], seed + 9)
    return [
        dense,
        *_tells(draws),
        _locore(eye, curve, CAPTIONS[size], seed),
        _sgrs(eye, curve, SAMPLED[size], seed),
    ]


class Parts:
    """The decoder's anatomy, the layer that counts, and how a caption is asked for."""

    def __init__(self, eye: Any):
        import torch

        from regard.models.vlm import decoder_parts
        from regard.tasks.scene_text import captions
        from regard.tasks.scenes import Scenes

        self.eye, self.device = eye, next(eye.model.parameters()).device
        one = captions(Scenes().draw(2, torch.Generator().manual_seed(0)), eye.patches)
        self.inputs = {k: v.to(self.device) for k, v in one.inputs.items()}
        self.anatomy = decoder_parts(eye.model, self.inputs)
        self.prompt = one.tokens.input_ids.shape[1]
        layers = len(self.anatomy)
        self.layers = sorted({layers * paper // 32 for paper in (6, 7, 8)})

    def tokens(self, scenes: Any) -> dict[str, Any]:
        """The prompts for these pictures, on the model's device."""
        from regard.tasks.scene_text import captions

        return {k: v.to(self.device) for k, v in captions(scenes, self.eye.patches).inputs.items()}


def judged(eye: Any, most: int, seed: int) -> dict[str, Any]:
    """The object words of greedy captions: saliency at every layer, log p, weight on the output, whether false."""
    import torch

    from regard.tasks.hallucination import describe
    from regard.tasks.scene_text import FIRST_OBJECT
    from regard.tasks.scenes import OBJECTS, Scenes

    parts = Parts(eye)
    scenes = Scenes().draw(most, torch.Generator().manual_seed(seed))
    words = describe(eye.model, scenes, eye.patches, most=MOST)
    ended = (words == 2).cumsum(1) > 0
    number = torch.where(ended, -1, words - FIRST_OBJECT)
    row, place = ((number >= 0) & (number < len(OBJECTS))).nonzero(as_tuple=True)
    row, place = row[:most], place[:most]
    false = ~scenes.visible[row, number[row, place]]
    shape = (len(row), len(parts.anatomy))
    found = {"saliency": torch.full(shape, torch.nan), "weight": torch.full(shape, torch.nan)}
    found["log p"] = torch.full(shape[:1], torch.nan)
    inputs = parts.tokens(scenes)
    ids = torch.cat([inputs["input_ids"], words.to(parts.device)], dim=1)
    for at in place.unique().tolist():
        chosen = (place == at).nonzero()[:, 0]
        now = {"input_ids": ids[row[chosen], : parts.prompt + at], "pixel_values": inputs["pixel_values"][row[chosen]]}
        each = rows_of(eye.model, now, words[row[chosen], at], parts)
        for name, values in each.items():
            found[name][chosen] = values
    return {k: v.numpy() for k, v in found.items()} | {
        "false": false.numpy(),
        "caption": row.numpy(),
        "layers": parts.layers,
        "scenes": scenes,
        "words": words,
        "place": place.numpy(),
    }


def rows_of(model: Any, inputs: dict[str, Any], words: Any, parts: Parts) -> dict[str, Any]:
    """Figures of the next word of sequences of one length: by layer for saliency and plain weights."""
    import torch

    from regard.steer.saliency import token_saliency
    from regard.watch.intervene import Site, trace

    device = next(model.parameters()).device
    layers = range(len(parts.anatomy))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, -1].float()
    how: dict[str, Any] = {"prompt": parts.prompt, "anatomy": parts.anatomy}
    each = [token_saliency(model, inputs, words[:, None].to(device), layers=[i], **how)[:, 0] for i in layers]
    sites = [Site(i, "weights", pos=-1) for i in layers]
    weights = trace(model, inputs, sites, anatomy=parts.anatomy)
    plain = [weights[s].mean(1)[:, parts.prompt :].mean(-1) for s in sites]
    return {
        "saliency": torch.stack(each, dim=1).cpu(),
        "weight": torch.stack(plain, dim=1).cpu(),
        "log p": logits.log_softmax(-1).gather(1, words[:, None].to(device))[:, 0].cpu(),
    }


def _dense(eye: Any, draw: dict[str, Any]) -> Finding:
    """The saliency of a caption's words again, from eager attention's matrices and autograd."""
    import torch

    from regard.tasks.gates import dense

    if not len(draw["caption"]):
        return Finding("dense", "not measured", reason="no caption names an object")
    row, parts, words = int(draw["caption"][0]), Parts(eye), draw["words"]
    one = parts.tokens(draw["scenes"].pick(torch.tensor([row])))
    gaps = []
    for index in np.flatnonzero(draw["caption"] == row):
        at = int(draw["place"][index])
        ids = torch.cat([one["input_ids"], words[row : row + 1, :at].to(parts.device)], dim=1)
        with dense(eye.model), torch.enable_grad():
            out = eye.model(input_ids=ids, pixel_values=one["pixel_values"], output_attentions=True, use_cache=False)
            loss = -out.logits[0, -1].log_softmax(-1)[words[row, at]]
            slopes = torch.autograd.grad(loss, out.attentions)
        for layer, (p, g) in enumerate(zip(out.attentions, slopes, strict=True)):
            s = (p * g).abs()[0, :, -1].mean(0).detach()
            s = s / s.norm()
            gaps.append(abs(float(s[parts.prompt :].mean()) - float(draw["saliency"][index, layer])))
    gap = max(gaps)
    return Finding("dense", verdict(gap <= 1e-5), gap, reason=f"{len(gaps)} figures, of words by layers")


def low_means_false(scores: Any, false: Any) -> float:
    """AUROC of low scores for false words."""
    import torch

    from regard.tasks.hallucination import auroc

    return auroc(-torch.from_numpy(scores), torch.from_numpy(false))


def _tells(draws: list[dict[str, Any]]) -> list[Finding]:
    def mean(draw: dict[str, Any], name: str) -> Any:
        return draw[name] if draw[name].ndim == 1 else draw[name][:, draw["layers"]].mean(1)

    def scores(name: str) -> list[float]:
        return [low_means_false(mean(d, name), d["false"]) for d in draws]

    def interval(statistic: Any) -> tuple[float, float]:
        generator, values = np.random.default_rng(0), []
        for _ in range(500):
            picked = []
            for i in generator.integers(len(draws), size=len(draws)):
                captions = np.unique(draws[i]["caption"])
                rows = [np.flatnonzero(draws[i]["caption"] == c) for c in generator.choice(captions, len(captions))]
                picked.append(statistic(draws[i], np.concatenate(rows)))
            values.append(np.nanmean(picked))
        low, high = np.nanquantile(values, [0.025, 0.975])
        return float(low), float(high)

    figures = {name: float(np.mean(scores(name))) for name in ("saliency", "weight", "log p")}
    by_layer = [
        float(np.mean([low_means_false(d["saliency"][:, layer], d["false"]) for d in draws]))
        for layer in range(draws[0]["saliency"].shape[1])
    ]
    false = [int(d["false"].sum()) for d in draws]
    counted = f"{sum(false)} of {sum(len(d['false']) for d in draws)} words are false"
    if min(false) < 5:
        return [Finding(c, "not measured", reason=f"premise not met: {counted}") for c in ("auroc", "confidence")]
    tells = interval(lambda d, r: low_means_false(mean(d, "saliency")[r], d["false"][r]))
    more = interval(
        lambda d, r: (
            low_means_false(mean(d, "saliency")[r], d["false"][r]) - low_means_false(d["log p"][r], d["false"][r])
        )
    )
    details = {"auroc": figures, "saliency by layer": by_layer, "layers": draws[0]["layers"]}
    shown = ", ".join(f"{x:.2f}" for x in by_layer)
    reason = f"{counted}; low log p gives {figures['log p']:.3f}; saliency of layers 0 to {len(by_layer) - 1}: {shown}"
    beyond = figures["saliency"] - figures["log p"]
    return [
        Finding(
            "auroc",
            verdict(figures["saliency"] > 0.6 and tells[0] > 0.5),
            figures["saliency"],
            tells,
            0.5,
            1.0,
            figures["weight"],
            reason,
            details,
        ),
        Finding("confidence", verdict(more[0] > 0), beyond, more, 0.0, 1 - figures["log p"], reason=reason),
    ]


def stopped(eye: Any, n: int, seed: int) -> list[tuple[float, float]]:
    """The stop curve of the plain model on scenes of its own."""
    import torch

    from regard.tasks.hallucination import stop_curve
    from regard.tasks.scenes import Scenes

    return stop_curve(eye.model, Scenes().draw(n, torch.Generator().manual_seed(seed)), eye.patches)


def _against(name: str, ours: Any, plain: Any, scenes: Any, curve: Any, told: str, seed: int) -> Finding:
    import torch

    from regard.tasks.hallucination import counts, false_rate, on_curve

    tables = [counts(words, scenes) for words in (ours, plain)]
    (rate, recall), (before, recall_before) = (
        (false_rate(t), float(t[:, 2].sum() / t[:, 3].sum().clamp(min=1))) for t in tables
    )

    def difference(both: Any) -> float:
        table = torch.from_numpy(both)
        return false_rate(table[:, :4]) - false_rate(table[:, 4:])

    interval = evidence.bootstrap(torch.cat(tables, dim=1).numpy(), difference, draws=1000, seed=seed)
    at = on_curve(curve, recall)
    beats = rate < at or (recall > curve[-1][0] and recall >= recall_before)
    reason = f"{told}: {rate:.3f} at recall {recall:.3f}, without it {before:.3f} at {recall_before:.3f}; " + (
        f"the stop curve gives {at:.3f} at that recall" if at == at else "the stop curve does not reach that recall"
    )
    details = {"stop curve": [list(p) for p in curve], "recall": [recall, recall_before]}
    baseline = None if np.isnan(at) else at - before
    state = verdict(interval[1] < 0 and beats)
    return Finding(name, state, rate - before, interval, 0.0, None, baseline, reason, details)


def _locore(eye: Any, curve: list[tuple[float, float]], n: int, seed: int) -> Finding:
    import torch

    from regard.steer.locore import locore
    from regard.tasks.hallucination import describe
    from regard.tasks.scenes import Scenes
    from regard.watch.intervene import intervene

    parts = Parts(eye)
    scenes = Scenes().draw(n, torch.Generator().manual_seed(seed + 11))
    plain = describe(eye.model, scenes, eye.patches, most=MOST)
    edits = locore(range(len(parts.anatomy)), prompt=parts.prompt, width=WIDTH, beta=BETA)
    with intervene(eye.model, edits, anatomy=parts.anatomy):
        ours = describe(eye.model, scenes, eye.patches, most=MOST)
    same = ours.shape == plain.shape
    changed = int((ours != plain).any(1).sum()) if same else n
    told = f"LocoRE, beta {BETA}, {n} greedy captions, {changed} of them changed"
    return _against("locore", ours, plain, scenes, curve, told, seed)


def _sgrs(eye: Any, curve: list[tuple[float, float]], n: int, seed: int) -> Finding:
    import torch

    from regard.steer.decoding import saliency_sampling
    from regard.tasks.scenes import Scenes

    parts = Parts(eye)
    scenes = Scenes().draw(n, torch.Generator().manual_seed(seed + 13))
    inputs = parts.tokens(scenes)
    how: dict[str, Any] = {"layers": parts.layers, "eos": 2, "pad": 0, "most": MOST, "top": TOP, "never": (3,)}
    found = {}
    for alpha in (0.0, 0.6):
        generator = torch.Generator().manual_seed(seed)
        found[alpha] = saliency_sampling(
            eye.model, inputs, alpha=alpha, generator=generator, anatomy=parts.anatomy, **how
        )
    turned = int(found[0.6].rejected.sum())
    told = f"SGRS, {n} captions, {turned} draws rejected"
    return _against("sgrs", found[0.6].words, found[0.0].words, scenes, curve, told, seed)
