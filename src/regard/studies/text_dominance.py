"""Text dominance (arXiv 2508.10552): mass on text and on visual tokens, each by its number of tokens, and pruning.

Rows are those of the last token of a question, which gives the answer (our reading of "generated" where answers are
one word). A is averaged over heads and questions before it is divided. Text is all that is no picture; there is no
system prompt, and the first token, a text token that may be a sink, is told apart. Pruned pictures keep the visual
tokens that the encoder's class token looks at most in its last layer; dropping tokens of little mass raises the mean
of the rest, so that MDI falls by construction: random pruning is the control.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, unmeasured, verdict

PAPER = "text-dominance"
MODEL = "testbed:vlm"
CLAIMS = [
    Claim(
        "identity",
        "AEI follows from MDI and the share of text tokens",
        kind="instrument",
        ours="largest gap between AEI_T and MDI / (MDI Q + 1 - Q) over layers",
        holds_if="at most 1e-6",
    ),
    Claim(
        "dominance",
        "a text token gets more mass than a visual one",
        kind="mechanism",
        paper="MDI 10.23 for LLaVA-7B, above 1 in image, video, audio, time-series and graph models",
        ours="MDI over all layers without the first token; the baseline is MDI with it",
        holds_if="the interval over draws and questions is above 1",
    ),
    Claim(
        "dilution",
        "more visual tokens of the same content raise the dominance of text",
        kind="mechanism",
        paper="token redundancy is named as its cause",
        ours="ratio of MDI with every visual token five times to MDI with each once, without the first token; the "
        "baseline is the ratio at fixed queries and keys, which is 1 for a head but not for heads that are averaged",
        holds_if="the interval over draws and questions is above the baseline, and above 1",
    ),
    Claim(
        "compression",
        "keeping what the class token looks at rebalances more than keeping as many at random",
        kind="mechanism",
        paper="compression lowers LLaVA-7B's MDI from 10.23 to 0.86",
        ours="MDI without the first token after class pruning over that after random pruning, the mean of three shares",
        holds_if="its interval is below 1 and the accuracy is not lower than with random pruning",
    ),
    Claim(
        "llava",
        "MDI of large models of five modalities",
        kind="replication",
        paper="LLaVA-7B 10.23, and 0.86 compressed",
        ours="MDI",
        holds_if="above 1, and at most 1 when compressed",
        waits="needs LLaVA-1.5-7B and its kin from the hub",
    ),
]
QUESTIONS = {"smoke": 40, "full": 400}
DRAWS = {"smoke": 3, "full": 5}
REMOVED = (0.5, 0.75, 0.9)
WAYS: tuple[Literal["highest", "random", "lowest"], ...] = ("highest", "random", "lowest")
REPEATS, CHUNK = 5, 8
GROUPS = ("first", "text", "question", "image")


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Watch questions as they are, diluted, and pruned in three ways."""
    from regard.studies.testbed import below_gate
    from regard.tasks.vlm import seer

    eye = seer(model, device)
    draws = [eye.questions(QUESTIONS[size], seed + 1000 * d) for d in range(DRAWS[size])]
    plain = [watched(eye, probes) for probes in draws]
    identity = _identity(plain[0])
    if reason := below_gate(eye.loaded):
        return [identity, *unmeasured(CLAIMS[1:], reason)]
    diluted = [watched(eye, probes, copies(eye, len(probes))) for probes in draws]
    single = [watched(eye, probes, chunk=1) for probes in draws]
    alone = float(np.mean([by_averaging(w.heads, REPEATS) for w in single]))
    return [identity, _dominance(plain), _dilution(plain, diluted, alone), _compression(eye, draws, plain, seed)]


class Watched:
    """Mass and keys by groups of some questions, and which were answered rightly."""

    def __init__(self, atlases: list[Any], right: Any):
        self.atlas, self.right = sum(atlases), right
        taken = [[a.need(name).sel(q_group="all", k_group=list(GROUPS)) for a in atlases] for name in NAMES]
        mass, keys = (np.stack([x.transpose("layer", "head", "k_group").values for x in each]) for each in taken)
        self.heads = mass.reshape(-1, mass.shape[-1])  # rows of one question where chunks are
        self.mass, self.keys = mass.sum(2), keys.sum(2)  # [chunk, layer, group]

    def mdi(self, text: str = "question", rows: Any = None) -> Any:
        """MDI of chosen chunks, summed over layers before it is divided."""
        chosen = slice(None) if rows is None else rows
        mass, keys = (x[chosen].sum((0, 1)) for x in (self.mass, self.keys))
        at, other = GROUPS.index(text), GROUPS.index("image")
        return (mass[at] / keys[at]) / (mass[other] / keys[other])


NAMES = ("group", "group_keys")


def by_averaging(mass: Any, times: int) -> float:
    """How MDI grows where visual tokens are repeated and no query or key changes, from masses [rows, group].

    A row's masses f, t and o on the first token, the question and the picture become t / Z and times o / Z,
    Z = f + t + times o: the row's own ratio stays, but the mean gives rows that look at text more weight.
    """
    first, question, image = (mass[:, GROUPS.index(name)] for name in ("first", "question", "image"))
    whole = first + question + times * image
    return float((question / whole).sum() / (image / whole).sum() / (question.sum() / image.sum()))


def copies(eye: Any, n: int) -> Any:
    """Numbers of visual tokens, every one several times in its place."""
    import torch

    return torch.arange(eye.patches).repeat_interleave(REPEATS).expand(n, -1)


def watched(eye: Any, probes: Any, kept: Any = None, chunk: int = CHUNK) -> Watched:
    """Groups of keys as the last token of each question sees them; `kept`: visual tokens that stay, in order."""
    import torch

    import regard
    from regard.models.vlm import decoder_blocks, embed_inputs, see
    from regard.tasks.scene_text import IMAGE, NO, VOCABULARY, YES
    from regard.tokens.class_token import keep_visual
    from regard.watch.settings import Watch

    device = next(eye.model.parameters()).device
    kept = torch.arange(eye.patches).expand(len(probes), -1) if kept is None else kept
    layers = [f"{name}.*" for name in decoder_blocks(eye.model)]
    atlases, right = [], []
    for rows in torch.arange(len(probes)).split(chunk):
        part = probes.pick(rows)
        with torch.no_grad():
            features, _ = see(eye.model, part.scenes.pixels.to(device))
            ids = part.tokens.input_ids.to(device)
            ids, features = keep_visual(ids, features, kept[rows].to(device), VOCABULARY[IMAGE])
            image = ids == VOCABULARY[IMAGE]
            question = ~image
            question[:, 0] = False
            last = torch.arange(ids.shape[1]) == ids.shape[1] - 1
            masks = {"text": ~image, "question": question, "image": image}
            settings = Watch(("group",), rows=last, groups=dict.fromkeys(masks), layers=layers, tokens=False)
            with regard.watch(eye.model, statistics=settings) as recorder:
                recorder.annotate(groups=masks)
                logits = eye.model(**embed_inputs(eye.model, ids, features), use_cache=False).logits[:, -1]
        atlases.append(recorder.atlas)
        right += ((logits[:, YES] > logits[:, NO]).cpu() == part.answers).tolist()
    return Watched(atlases, np.array(right, dtype=np.float64))


def _identity(plain: Watched) -> Finding:
    from regard.measures.modality import aei, mdi

    m = mdi(plain.atlas, text="text", other="image").values
    a = aei(plain.atlas, text="text", other="image").values
    keys = plain.keys.sum((0, 1))
    share = keys[GROUPS.index("text")] / (keys[GROUPS.index("text")] + keys[GROUPS.index("image")])
    gap = float(np.abs(a - m / (m * share + 1 - share)).max())
    return Finding("identity", verdict(gap <= 1e-6), gap, reason=f"{len(m)} layers, {len(plain.right)} questions")


def _resampled(statistic: Any, sets: list[Any], draws: int = 500) -> tuple[float, float]:
    """Interval of the mean over draws of a statistic of chunks: draws are resampled, then the chunks of each."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        some = generator.integers(len(sets), size=len(sets))
        chunks = len(sets[0][0].mass) if isinstance(sets[0], tuple) else len(sets[0].mass)
        values.append(np.mean([statistic(sets[i], generator.integers(chunks, size=chunks)) for i in some]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _dominance(plain: list[Watched]) -> Finding:
    from regard.measures.modality import mdi

    figure = float(np.mean([w.mdi() for w in plain]))
    interval = _resampled(lambda w, rows: w.mdi(rows=rows), plain)
    whole = float(np.mean([w.mdi("text") for w in plain]))
    thirds = {
        name: np.mean([mdi(w.atlas, text=group, other="image", by="third").values for w in plain], axis=0).tolist()
        for name, group in (("with the first token", "text"), ("without it", "question"))
    }
    first = float(np.mean([w.mass[..., 0].sum() / w.keys[..., 0].sum() for w in plain]))
    shown = "; ".join(f"{k}: " + ", ".join(f"{x:.2f}" for x in v) for k, v in thirds.items())
    details = {"thirds": thirds, "mass on the first token": first}
    reason = f"early, middle and late thirds of the layers {shown}"
    return Finding("dominance", verdict(interval[0] > 1), figure, interval, 1.0, None, whole, reason, details)


def _dilution(plain: list[Watched], diluted: list[Watched], alone: float) -> Finding:
    def rise(pair: Any, rows: Any = None) -> Any:
        return pair[1].mdi(rows=rows) / pair[0].mdi(rows=rows)

    pairs = list(zip(plain, diluted, strict=True))
    figure, interval = float(np.mean([rise(p) for p in pairs])), _resampled(rise, pairs)
    whole = float(np.mean([d.mdi("text") / p.mdi("text") for p, d in pairs]))
    right = [float(np.mean([w.right.mean() for w in each])) for each in (plain, diluted)]
    reason = (
        f"at fixed queries and keys {alone:.2f}, as heads are averaged; with the first token {whole:.2f}; accuracy "
        f"{100 * right[0]:.1f}% once, {100 * right[1]:.1f}% {REPEATS} times"
    )
    state = verdict(interval[0] > max(1.0, alone))
    return Finding("dilution", state, figure, interval, 1.0, None, alone, reason, {"accuracy": right})


def _compression(eye: Any, draws: list[Any], plain: list[Watched], seed: int) -> Finding:
    import torch

    from regard.tokens.class_token import class_weights, rank_tokens

    device = next(eye.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    pairs = [(share, how) for share in REMOVED for how in WAYS]
    found: dict[tuple[float, str], list[Watched]] = {pair: [] for pair in pairs}
    for probes in draws:
        weights = class_weights(eye.model.model.vision_tower, probes.scenes.pixels.to(device)).cpu()
        for share, how in pairs:
            keep = max(1, round((1 - share) * eye.patches))
            kept = rank_tokens(weights, keep, how, generator=generator)
            found[share, how].append(watched(eye, probes, kept))
    ours = list(zip(*(found[s, "highest"] for s in REMOVED), *(found[s, "random"] for s in REMOVED), strict=True))

    def over(sets: Any, rows: Any = None) -> Any:
        half = len(sets) // 2
        return np.mean([a.mdi(rows=rows) / b.mdi(rows=rows) for a, b in zip(sets[:half], sets[half:], strict=True)])

    figure, interval = float(np.mean([over(s) for s in ours])), _resampled(over, ours)
    right = {h: np.concatenate([w.right for s in REMOVED for w in found[s, h]]) for h in WAYS}
    gain, low, high = evidence.paired_difference(right["highest"], right["random"], seed=seed)
    table = {
        f"{share:.0%} removed, {how}": [
            float(np.mean([w.mdi() for w in ws])),
            float(np.mean([w.right.mean() for w in ws])),
        ]
        for (share, how), ws in found.items()
    }
    table["nothing removed"] = [
        float(np.mean([w.mdi() for w in plain])),
        float(np.mean([w.right.mean() for w in plain])),
    ]
    reason = (
        f"accuracy {100 * gain:.1f} points [{100 * low:.1f}, {100 * high:.1f}] above random pruning; MDI "
        + ", ".join(f"{v[0]:.2f} at {100 * v[1]:.0f}% ({k})" for k, v in table.items() if "lowest" not in k)
    )
    holds = interval[1] < 1 and gain >= 0
    details = {"mdi and accuracy": table}
    return Finding("compression", verdict(holds), figure, interval, None, None, 1.0, reason, details)
