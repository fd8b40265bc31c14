"""Brain-grounded axes (arXiv 2512.19399): axes found in recordings of a reader, read and steered in a model.

The reader is simulated: 12 subjects read a text of the testbed's grammar, a word every half second, and 128 sensors
answer with a random mixture of five features of the word (log-frequency, function or content, animacy, two that mean
nothing), now and, more weakly, half a second and a second later; noise has 10 times the signal's standard deviation. A
ridge encoding with those lags gives one vector a word, the mean over subjects; their independent components are axes.

The encoding's penalty is 1 where the paper has 200: a word read n times keeps about n / (n + penalty) of its vector, so
200 would shrink rare words and write frequency into the atlas by itself. A reader without the feature is the floor.

Words, not tokens, are halved: axes are named and adapters fitted on one half, figures come from the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.studies import evidence
from regard.studies.protocol import Claim, Finding, verdict

PAPER = "brain-axes"
MODEL = "testbed:lexicon"
CLAIMS = [
    Claim(
        "encoding",
        "without noise and penalty, the encoding returns what the sensors answer to a word",
        kind="instrument",
        ours="largest gap over the largest answer",
        holds_if="at most 1e-6",
    ),
    Claim(
        "axis",
        "some axis of the recordings is the words' frequency",
        kind="mechanism",
        ours="|r| with log-frequency on half of the words, axis chosen on the others; the floor is that for readers "
        "without the feature",
        holds_if="at least 0.6, and above the floor",
    ),
    Claim(
        "adapter",
        "hidden states tell the axis",
        kind="mechanism",
        ours="R2 on words that the adapter has not seen; the baseline is the largest of 100 with the words permuted",
        holds_if="above the baseline at every seed",
    ),
    Claim(
        "stable",
        "the axis comes back in another atlas",
        kind="mechanism",
        paper="|r| of matched axes 0.64 to 0.95",
        ours="|r| of the axis with its best match from the other half of the subjects and of the text",
        holds_if="at least 0.64",
    ),
    Claim(
        "steering",
        "steering along the axis changes how frequent the words are, beyond its cost in perplexity",
        kind="mechanism",
        paper="a frequency axis in a middle layer survives matching by perplexity",
        ours="mean log-frequency at strength 2 less that at -2, in standard deviations of running text; the baseline "
        "is the largest of random directions at equal perplexity",
        holds_if="monotone in strength, and better than the baseline",
    ),
    Claim(
        "text-probe",
        "the axis moves words more than a probe trained on the frequencies themselves does at the same perplexity",
        kind="mechanism",
        paper="larger shift at lower perplexity than the text probe",
        ours="the same movement; the baseline is the probe's at equal perplexity",
        holds_if="better than the baseline",
    ),
]
SUBJECTS, SENSORS, NOISE, PENALTY = 12, 128, 10.0, 1.0
TEXT = {"smoke": 400, "full": 1000}
SEEDS = {"smoke": 3, "full": 5}
COMPONENTS, ADAPTER, PERMUTATIONS = 8, 10.0, 100
STEERED = {"smoke": (1, 22), "full": (5, 44)}
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SHOWN = 2.0
RANDOM, TEMPERATURE, OFTEN = 3, 0.7, 10


def run(size: str = "smoke", device: str = "cpu", seed: int = 0, model: str = MODEL) -> list[Finding]:
    """Read, find axes, fit adapters, once a seed; then steer with the axes of the first ones."""
    from regard.studies.testbed import below_gate
    from regard.tasks.testbeds import load

    loaded = load(model, device=device)
    if reason := below_gate(loaded):
        return [Finding(c.id, "not measured", reason=reason) for c in CLAIMS]
    bed = Words(loaded.model, device)
    found = [judge(bed, TEXT[size], s) for s in range(seed, seed + SEEDS[size])]
    seeds, texts = STEERED[size]
    moved = [steer(bed, f, texts, seed + i) for i, f in enumerate(found[:seeds])]
    return [_encoding(seed), _axis(found), _adapter(found), _stable(found), _steering(moved), _probe(moved)]


class Words:
    """A model over the grammar's words, the block where it is read, and what is known of the words."""

    def __init__(self, model: Any, device: str):
        import torch

        from regard.tasks.lexicon import Lexicon
        from regard.watch.anatomy import anatomy

        self.model, self.device, self.task = model, device, Lexicon()
        self.parts = anatomy(model, {"input_ids": torch.ones(1, 2, dtype=torch.long, device=device)})
        self.count = len(self.task.vocabulary) - 2
        self.log_frequency = self.task.frequency[2:].log()

    @property
    def site(self) -> Any:
        """The stream after the middle block, as the paper's layer 11 of 22."""
        from regard.watch.intervene import Site

        return Site(len(self.parts) // 2, "resid_post")

    def hidden(self, texts: int, generator: Any) -> Any:
        """The mean state at each word over all its places in new texts, [words, dim]; NaN for words that never came."""
        import torch

        from regard.watch.intervene import trace

        total: Any = 0.0
        seen: Any = 0.0
        for _ in range(0, texts, 100):
            ids = self.task.batch(100, generator).input_ids.to(self.device)
            states = trace(self.model, {"input_ids": ids}, self.site, anatomy=self.parts)[self.site]
            word = (ids[:, 1:] - 2).flatten()
            sums = torch.zeros(self.count, states.shape[-1], dtype=torch.float64, device=self.device)
            total = total + sums.index_add_(0, word, states[:, 1:].flatten(0, 1).double())
            seen = seen + torch.bincount(word, minlength=self.count)
        return (total / seen[:, None]).cpu()


def atlas(bed: Words, texts: int, subjects: int, seed: int, half: int, frequency: bool = True) -> Any:
    """One reading: the vector of every word [words, sensors], rows of words that were never read being 0.

    Sensors and meaningless features depend on the seed alone; the text and the noise on the half besides.
    """
    import torch

    from regard.tasks.listener import encode, features, read

    fixed = torch.Generator().manual_seed(1_000_003 * seed + 61)
    own = torch.Generator().manual_seed(1_000_003 * seed + 67 + half)
    of_word = features(bed.task, fixed, frequency=frequency)
    of_word = of_word @ torch.randn(of_word.shape[1], SENSORS, generator=fixed, dtype=torch.float64)
    words = bed.task.batch(texts, own).input_ids[:, 1:].flatten() - 2
    answers = read(of_word, words, own, subjects=subjects, noise=NOISE)
    return encode(answers, words, bed.count, PENALTY)


def correlations(axes: Any, target: Any) -> Any:
    """|r| of each column with a target."""
    return np.abs([np.corrcoef(a, target)[0, 1] for a in axes.T.numpy()])


def judge(bed: Words, texts: int, seed: int) -> dict[str, Any]:
    """One seed: axes from two readings and from a reader blind to frequency, and the adapter of the frequency axis."""
    import torch

    from regard.steer.external import external_axes, fit_adapter

    generator = torch.Generator().manual_seed(1_000_003 * seed + 71)
    hidden = bed.hidden(texts, generator)
    readings = [atlas(bed, texts // 2, SUBJECTS // 2, seed, half) for half in (0, 1)]
    blind = atlas(bed, texts, SUBJECTS, seed, 2, frequency=False)
    whole = atlas(bed, texts, SUBJECTS, seed, 3)
    usable = ~hidden.isnan().any(1)
    for signal in (*readings, blind, whole):
        usable &= signal.any(1)
    hidden, target = hidden[usable], bed.log_frequency[usable]
    order = torch.randperm(int(usable.sum()), generator=generator)
    choose, test = order[: len(order) // 2], order[len(order) // 2 :]

    def chosen(axes: Any) -> tuple[int, float]:
        best = int(correlations(axes[choose], target[choose]).argmax())
        return best, float(correlations(axes[test], target[test])[best])

    axes = external_axes(whole[usable], COMPONENTS, seed)
    k, r = chosen(axes)
    halves = [external_axes(signal[usable], COMPONENTS, seed) for signal in readings]
    first = chosen(halves[0])[0]
    reader = fit_adapter(hidden[choose], axes[choose], ADAPTER)
    permuted = []
    for _ in range(PERMUTATIONS):
        dealt = axes[torch.randperm(len(axes), generator=generator)][:, k : k + 1]
        permuted.append(float(fit_adapter(hidden[choose], dealt[choose], ADAPTER).r2(hidden[test], dealt[test])))
    sign = float(np.sign(np.corrcoef(axes[choose, k], target[choose])[0, 1]))
    probe = fit_adapter(hidden[choose], target[choose, None], ADAPTER)
    return {
        "r": r,
        "blind": chosen(external_axes(blind[usable], COMPONENTS, seed))[1],
        "r2": float(reader.r2(hidden[test], axes[test])[k]),
        "permuted": max(permuted),
        "probe_r2": float(probe.r2(hidden[test], target[test, None])),
        "stable": float(correlations(halves[1], halves[0][:, first]).max()),
        "axis": sign * reader.direction(k),
        "probe": probe.direction(0),
        "std": reader.std,
        "words": int(usable.sum()),
    }


def steer(bed: Words, found: dict[str, Any], texts: int, seed: int) -> dict[str, Any]:
    """Log-frequency and negative log-likelihood of words along each direction, [direction, strength, way, text].

    Directions: the axis, the probe, random ones; ways: against and along. Log-frequency is in units of running text.
    """
    import torch

    from regard.tasks.sampling import sample
    from regard.watch.intervene import Edit, intervene

    generator = torch.Generator().manual_seed(1_000_003 * seed + 73)
    length = bed.task.length - 1
    noise = torch.randn(RANDOM, len(found["std"]), generator=generator, dtype=torch.float64)
    random = found["std"] * noise / noise.norm(dim=-1, keepdim=True)
    directions = torch.cat([torch.stack([found["axis"], found["probe"]]), random])
    size = torch.tensor([[s * way for way in (-1, 1)] for s in STRENGTHS], dtype=torch.float64)
    step = directions[:, None, None] * size[..., None]  # [direction, strength, way, dim]
    numbers = torch.rand(texts, length, generator=generator)
    rows = step.flatten(0, 2).shape[0]
    start = torch.full((rows * texts, 1), bed.task.vocabulary.BOS, device=bed.device)
    every = step.flatten(0, 2).repeat_interleave(texts, 0)[:, None].float().to(bed.device)
    among = torch.arange(bed.count + 2) >= 2
    with intervene(bed.model, Edit(bed.site, "add", value=every), anatomy=bed.parts):
        words = sample(bed.model, start, numbers.repeat(rows, 1), temperature=TEMPERATURE, among=among)
    plain = sample(bed.model, start[:texts], numbers, temperature=TEMPERATURE, among=among)
    frequency = torch.cat([torch.zeros(2, dtype=torch.float64), bed.log_frequency])
    share = bed.task.frequency
    mean = (share * frequency).sum()
    spread = (share * (frequency - mean) ** 2).sum().sqrt()

    def told(words: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            logits = bed.model(input_ids=torch.cat([start[: len(words)], words], 1), use_cache=False).logits[:, :-1]
        cost = -logits.double().log_softmax(-1).gather(-1, words[..., None])[..., 0].mean(1).cpu()
        return ((frequency[words.cpu()] - mean) / spread).mean(1), cost

    level, cost = (x.view(*step.shape[:3], texts).numpy() for x in told(words))
    base = [x.numpy() for x in told(plain)]
    return {"level": level, "cost": cost, "plain": base[0], "plain_cost": float(base[1].mean())}


def shift(moved: dict[str, Any], direction: int, cost: float | None = None) -> Any:
    """Level along a direction less that against it, by text, at the shown strength, or where words cost as much.

    Between the grid's strengths, and no strength at all, both are taken to be linear; beyond the last, the last counts.
    """
    level, spent = moved["level"][direction], moved["cost"][direction].mean((1, 2))
    moves = np.concatenate([0 * level[:1, 1], level[:, 1] - level[:, 0]])
    spent = np.concatenate([[moved["plain_cost"]], spent])
    at = STRENGTHS.index(SHOWN) + 1
    if cost is None:
        return moves[at]
    over = np.flatnonzero(spent >= cost)
    if not len(over):
        return moves[-1]
    i = int(over[0])
    if i == 0:
        return moves[0]
    part = (cost - spent[i - 1]) / (spent[i] - spent[i - 1])
    return moves[i - 1] + part * (moves[i] - moves[i - 1])


def _encoding(seed: int) -> Finding:
    import torch

    from regard.tasks.lexicon import Lexicon
    from regard.tasks.listener import encode, read

    generator = torch.Generator().manual_seed(seed)
    words = Lexicon().batch(TEXT["smoke"], generator).input_ids[:, 1:].flatten() - 2
    of_word = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    # Rarer words may stand beside each other only, and then answers now and later cannot be told apart.
    often = torch.bincount(words, minlength=400) >= OFTEN
    back = encode(read(of_word, words, generator, noise=0.0), words, 400, 1e-9)[often]
    # One constant is open all the same: what all words add now may be taken away half a second later.
    gap = (back - back.mean(0)) - (of_word[often] - of_word[often].mean(0))
    worst, reason = (
        float(gap.abs().max() / of_word.abs().max()),
        f"{int(often.sum())} words read at least {OFTEN} times",
    )
    return Finding("encoding", verdict(worst <= 1e-6), worst, floor=0.0, reason=reason)


def _axis(found: list[dict[str, Any]]) -> Finding:
    r, blind = (np.array([f[k] for f in found]) for k in ("r", "blind"))
    shown = ", ".join(f"{x:.2f} (blind {y:.2f})" for x, y in zip(r, blind, strict=True))
    reason = f"{min(f['words'] for f in found)} words at least; by reader {shown}"
    state = verdict(r.mean() >= 0.6 and (r > blind).all())
    return Finding("axis", state, float(r.mean()), evidence.bootstrap(r), float(blind.mean()), 1.0, reason=reason)


def _adapter(found: list[dict[str, Any]]) -> Finding:
    r2, permuted = (np.array([f[k] for f in found]) for k in ("r2", "permuted"))
    probe = np.mean([f["probe_r2"] for f in found])
    shown = ", ".join(f"{x:.2f}" for x in r2)
    reason = f"by reader {shown}; a probe of log-frequency itself reads {probe:.2f} of it"
    state, interval = verdict((r2 > permuted).all()), evidence.bootstrap(r2)
    return Finding("adapter", state, float(r2.mean()), interval, 0.0, 1.0, float(permuted.max()), reason)


def _stable(found: list[dict[str, Any]]) -> Finding:
    r = np.array([f["stable"] for f in found])
    reason = "each atlas from six subjects and half of the text"
    return Finding("stable", verdict(r.mean() >= 0.64), float(r.mean()), evidence.bootstrap(r), 0.0, 1.0, reason=reason)


def _steering(moved: list[dict[str, Any]]) -> Finding:
    cost = [float(m["cost"][0, STRENGTHS.index(SHOWN)].mean()) for m in moved]
    mine = [shift(m, 0) for m in moved]
    random = [[shift(m, 2 + i, c) for i in range(RANDOM)] for m, c in zip(moved, cost, strict=True)]
    best = [max(r, key=lambda x: abs(x.mean())) for r in random]
    better = [a - b * np.sign(b.mean()) for a, b in zip(mine, best, strict=True)]
    low = evidence.seeds_and_items(better)[0]
    against, along = (np.mean([m["level"][0, :, way].mean(-1) for m in moved], 0) for way in (0, 1))
    curve = [*against[::-1], float(np.mean([m["plain"].mean() for m in moved])), *along]
    strengths = [*(-s for s in STRENGTHS[::-1]), 0, *STRENGTHS]
    up_to = [v for s, v in zip(strengths, curve, strict=True) if abs(s) <= SHOWN]
    costs = np.mean([m["cost"].mean((2, 3)) for m in moved], 0)
    plain = float(np.mean([m["plain_cost"] for m in moved]))
    details: dict[str, Any] = {"strengths": strengths, "level": [float(v) for v in curve], "plain_cost": plain}
    details |= {"cost": costs.tolist(), "above_random": [float(np.mean(better)), low]}
    shown = ", ".join(f"{s:g}: {v:.2f}" for s, v in zip(strengths, curve, strict=True))
    reason = f"{shown}; {np.mean(cost):.2f} nat a word at strength 2, {plain:.2f} unsteered; {len(moved)} seeds"
    state = verdict((np.diff(up_to) > 0).all() and low > 0)
    baseline = float(np.mean([np.abs(b.mean()) for b in best]))
    return Finding(
        "steering", state, float(np.mean(mine)), evidence.seeds_and_items(mine), 0.0, None, baseline, reason, details
    )


def _probe(moved: list[dict[str, Any]]) -> Finding:
    cost = [float(m["cost"][0, STRENGTHS.index(SHOWN)].mean()) for m in moved]
    mine = [shift(m, 0) for m in moved]
    theirs = [shift(m, 1, c) for m, c in zip(moved, cost, strict=True)]
    better = [a - b for a, b in zip(mine, theirs, strict=True)]
    low, high = evidence.seeds_and_items(better)
    reason = f"the axis moves {np.mean(better):.2f} more ({low:.2f} .. {high:.2f}) at {np.mean(cost):.2f} nat a word"
    interval, baseline = evidence.seeds_and_items(mine), float(np.mean(theirs))
    return Finding("text-probe", verdict(low > 0), float(np.mean(mine)), interval, 0.0, None, baseline, reason)
