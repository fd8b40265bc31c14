"""Probes of what a vision-language model makes up: balanced questions, captions against what the picture shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.scene_text import EOS, NO, VOCABULARY, YES, Probes, captions, mentions, questions
from regard.tasks.scenes import OBJECTS, Drawn, Scenes, partner_of

__all__ = [
    "Split",
    "answer",
    "auroc",
    "chair",
    "counts",
    "describe",
    "false_rate",
    "leak",
    "on_curve",
    "pope",
    "probe_questions",
    "stop_curve",
]

Split = Literal["balanced", "random", "adversarial"]


def probe_questions(
    n: int,
    generator: torch.Generator,
    *,
    patches: int,
    patch: int,
    split: Split = "balanced",
    scenes: Scenes | None = None,
) -> Probes:
    """n questions, half of them to be answered with yes.

    ``random``: an object of all and an answer of both, drawn at will; then a scene in which that is the truth. So the
    name of the object says nothing about the answer. ``balanced``: so, and half of either answer asks for objects of
    the scene's own context, half for those of others: in ``random``, what is there mostly belongs to the context and
    what is not mostly does not, so that the background alone answers nine of ten. ``adversarial``: of scenes that show
    one of a pair alone, half the questions ask for it and half for the missing one. Objects that are named but not
    drawn are never asked for.

    Raises:
        ValueError: an odd n, or an unknown split.
    """
    if n % 2 or n < 2:
        raise ValueError(f"n must be even and at least 2, as half of the answers are yes; got {n}")
    if split not in ("balanced", "random", "adversarial"):
        raise ValueError(f"split must be 'balanced', 'random' or 'adversarial', got {split!r}")
    source = scenes or Scenes()
    answers = torch.arange(n) % 2 == 0
    asked = torch.randint(len(OBJECTS), (n,), generator=generator)
    drawn, row = source.draw(4 * n, generator), torch.full((n,), -1)
    while (row < 0).any():
        truth = drawn.visible
        alone = truth & ~truth.view(len(drawn), -1, 2).flip(-1).reshape(len(drawn), -1)
        free = torch.ones(len(drawn), dtype=torch.bool)
        row.fill_(-1)
        for i, (o, yes) in enumerate(zip(asked.tolist(), answers.tolist(), strict=True)):
            if split != "adversarial":
                fits = truth[:, o] if yes else ~(truth | drawn.named)[:, o]
                if split == "balanced":
                    fits = fits & ((drawn.context == o // 4) == (i % 4 < 2))
            else:
                fits = alone[:, o if yes else partner_of(o)] & (truth | ~drawn.named)[:, o]
            fits = (fits & free).nonzero()[:, 0]
            if not len(fits):
                break
            row[i], free[fits[0]] = fits[0], False
        else:
            continue
        drawn = source.draw(2 * len(drawn), generator)
    return questions(drawn.pick(row), asked, answers, patches, patch)


@torch.no_grad()
def answer(model: Any, probes: Probes, chunk: int = 128) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Margin ``logit(yes) - logit(no)`` after each question, and the probability of either word."""
    margins, masses = [], []
    device = next(model.parameters()).device
    for rows in torch.arange(len(probes)).split(chunk):
        inputs = {k: v.to(device) for k, v in probes.pick(rows).inputs.items()}
        logits = model(**inputs, use_cache=False).logits[:, -1].double().cpu()
        margins.append(logits[:, YES] - logits[:, NO])
        masses.append(logits.softmax(-1)[:, [YES, NO]].sum(-1))
    return torch.cat(margins), torch.cat(masses)


def pope(margins: Float[Tensor, "n"], answers: Bool[Tensor, "n"]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of yes, share of yes, and AUROC of the margin."""
    said = margins > 0
    right = (said & answers).sum().item()
    precision, recall = right / max(1, int(said.sum())), right / max(1, int(answers.sum()))
    return {
        "accuracy": (said == answers).double().mean().item(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "yes_rate": said.double().mean().item(),
        "auroc": auroc(margins, answers),
    }


def auroc(scores: Float[Tensor, "n"], positive: Bool[Tensor, "n"]) -> float:
    """Chance that a positive one has the higher score than another, ties counted half; NaN without both kinds."""
    above = (scores[positive][:, None] - scores[~positive]).sign().double()
    return ((above + 1) / 2).mean().item() if above.numel() else float("nan")


@torch.no_grad()
def describe(
    model: Any, scenes: Drawn, patches: int, *, most: int = 24, choose: Callable[[Tensor], Tensor] | None = None
) -> Int[Tensor, "n words"]:
    """Captions, word by word through the model's own cache, ``<eos>`` and what comes after it included.

    Args:
        model: called with ids and pictures.
        scenes: what is to be described.
        patches: visual tokens of a picture.
        most: words at most.
        choose: logits ``[n, words]`` -> the next word of each caption; None: the most probable one.
    """
    device = next(model.parameters()).device
    pick = choose or (lambda logits: logits.argmax(-1))
    inputs: dict[str, Any] = {k: v.to(device) for k, v in captions(scenes, patches).inputs.items()}
    words: list[Tensor] = []
    cache = None
    done = torch.zeros(len(scenes), dtype=torch.bool, device=device)
    while len(words) < most and not bool(done.all()):
        out = model(**inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        word = pick(out.logits[:, -1])
        words.append(torch.where(done, VOCABULARY.PAD, word))
        done |= word == VOCABULARY[EOS]
        inputs = {"input_ids": word[:, None]}
    return torch.stack(words, dim=1).cpu()


def chair(words: Int[Tensor, "n words"], scenes: Drawn) -> dict[str, float]:
    """What captions name against what pictures show (Rohrbach et al., arXiv 1809.02156).

    ``chair_i``: share of the objects named that are not there; ``chair_s``: share of captions with such a one;
    ``recall``, ``precision``, ``f1`` over all objects; ``exact``: captions that name just what is there; ``partner``:
    share of the false objects whose partner is there.
    """
    named, there = mentions(words), scenes.visible
    table, false = counts(words, scenes), named & ~there
    partner = there.view(len(there), -1, 2).flip(-1).reshape(len(there), -1)
    _, said, hits, shown = table.sum(0).tolist()
    precision, recall = hits / max(1, said), hits / max(1, shown)
    return {
        "chair_i": false_rate(table),
        "chair_s": false.any(1).double().mean().item(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "exact": (named == there).all(1).double().mean().item(),
        "partner": (false & partner).sum().item() / max(1, int(false.sum())),
    }


def counts(words: Int[Tensor, "n words"], scenes: Drawn) -> Int[Tensor, "n 4"]:
    """Of every caption: objects falsely named, named, rightly named, and shown."""
    named, there = mentions(words), scenes.visible
    return torch.stack([x.sum(1) for x in (named & ~there, named, named & there, there)], dim=1)


def false_rate(table: Int[Tensor, "n 4"]) -> float:
    """CHAIR_i of `counts`: the share of false objects among those named."""
    return table[:, 0].sum().item() / max(1, table[:, 1].sum().item())


def stop_curve(
    model: Any, scenes: Drawn, patches: int, biases: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
) -> list[tuple[float, float]]:
    """(recall, CHAIR_i) of captions that stop earlier: each bias is added to the logit of ``.``; sorted by recall.

    Most cures of hallucination say less. One that is worth its name lies below this curve of the plain model.
    """
    points = []
    for bias in biases:

        def choose(logits: Tensor, bias: float = bias) -> Tensor:
            changed = logits.clone()
            changed[:, VOCABULARY["."]] += bias
            return changed.argmax(-1)

        table = counts(describe(model, scenes, patches, choose=choose), scenes)
        points.append((table[:, 2].sum().item() / max(1, table[:, 3].sum().item()), false_rate(table)))
    return sorted(points)


def on_curve(curve: Sequence[tuple[float, float]], recall: float) -> float:
    """The curve's rate at a recall, by straight lines between its points; NaN outside of them."""
    recalls, rates = zip(*curve, strict=True)
    return float(np.interp(recall, recalls, rates, left=np.nan, right=np.nan))


def leak(probes: Probes) -> float:
    """How often an answer is guessed without the objects in the picture: the best of three guesses.

    By the name of the object asked for, by whether it belongs to the context that the background shows, or by both:
    the majority of the other half of the probes.
    """
    first = torch.arange(len(probes)) % 8 < 4  # keeps answers and contexts in both halves
    own = (probes.asked // 4 == probes.scenes.context).long()
    guesses = [_guessed(key, probes.answers, first) for key in (probes.asked, own, 2 * probes.asked + own)]
    return max(guesses)


def _guessed(key: Int[Tensor, "n"], answers: Bool[Tensor, "n"], first: Bool[Tensor, "n"]) -> float:
    right = 0
    for fit in (first, ~first):
        for value in key.unique().tolist():
            known, held = fit & (key == value), ~fit & (key == value)
            guess = answers[known].double().mean() > 0.5 if known.any() else True
            right += int((answers[held] == guess).sum())
    return right / len(answers)
