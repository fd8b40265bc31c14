"""What is said of scenes: captions that list the objects, and questions with yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.scenes import CONTEXTS, OBJECTS, Drawn
from regard.tasks.words import Vocabulary

__all__ = [
    "DESCRIBE",
    "VOCABULARY",
    "Probes",
    "caption",
    "caption_order",
    "captions",
    "mentions",
    "positions",
    "questions",
    "token_classes",
]

EOS, IMAGE = "<eos>", "<image>"
_WORDS = ("a", "with", "and", ",", ".", "describe", "the", "image", "is", "there", "?", "yes", "no")
VOCABULARY = Vocabulary.of((EOS, IMAGE), _WORDS, CONTEXTS, OBJECTS)
DESCRIBE = ("describe", "the", "image", ".")
FIRST_OBJECT = VOCABULARY[OBJECTS[0]]
YES, NO = VOCABULARY["yes"], VOCABULARY["no"]


@dataclass(frozen=True)
class Probes:
    """Prompts about pictures, all equally long.

    Attributes:
        tokens: prompts and what is asked for; groups "image", "text", "first" (the first token) and, of questions,
            "object" (patches that meet a pixel of the object asked for); spans "image", "prompt" and, of questions,
            "word" (the object's name).
        scenes: what the pictures show.
        asked: number of the object asked for; empty for captions.
        answers: whether yes is right.
    """

    tokens: Batch
    scenes: Drawn
    asked: Int[Tensor, "asked"]
    answers: Bool[Tensor, "asked"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.tokens.input_ids, "pixel_values": self.scenes.pixels}

    def pick(self, rows: Tensor) -> Probes:
        """Some of the probes, by number."""
        t = self.tokens
        assert t.valid is not None
        spans = {k: v[rows] for k, v in t.spans.items()}
        groups = {k: v[rows] for k, v in t.groups.items()}
        tokens = Batch(t.input_ids[rows], t.labels[rows], spans, groups, t.valid[rows])
        about = (self.asked[rows], self.answers[rows]) if len(self.asked) else (self.asked, self.answers)
        return Probes(tokens, self.scenes.pick(rows), *about)


def caption_order(context: int, objects: Sequence[int]) -> list[int]:
    """Objects as a caption lists them: those of the context first, leaders before partners, then guests."""
    return sorted(objects, key=lambda o: (o // 4 != context, o))


def caption(context: int, objects: Sequence[int]) -> list[str]:
    """The words of a caption: ``a kitchen with a cup , a saucer and a bus . <eos>``."""
    words = ["a", CONTEXTS[context], "with"]
    listed = caption_order(context, objects)
    for place, number in enumerate(listed):
        if place:
            words.append("and" if place == len(listed) - 1 else ",")
        words += ["a", OBJECTS[number]]
    return [*words, ".", EOS]


def captions(scenes: Drawn, patches: int) -> Probes:
    """Prompts for captions: ``<bos>``, the picture, ``describe the image .``"""
    ids = VOCABULARY.ids(DESCRIBE)
    n = len(scenes)
    rows = torch.tensor([[VOCABULARY.BOS] + patches * [VOCABULARY[IMAGE]] + ids]).repeat(n, 1)
    empty = torch.empty(0, dtype=torch.long)
    labels = torch.full_like(rows, IGNORED)
    tokens = Batch(rows, labels, _spans(n, patches, len(ids)), _groups(rows))
    return Probes(tokens, scenes, empty, empty.bool())


def question(number: int) -> list[str]:
    """The words of a question: ``is there a cup ?``"""
    return ["is", "there", "a", OBJECTS[number], "?"]


def questions(scenes: Drawn, asked: Int[Tensor, "n"], answers: Bool[Tensor, "n"], patches: int, patch: int) -> Probes:
    """One question about each scene: ``<bos>``, the picture, ``is there a cup ?``; the answer is no part of it."""
    n = len(scenes)
    head = torch.tensor([VOCABULARY.BOS] + patches * [VOCABULARY[IMAGE]]).repeat(n, 1)
    text = torch.tensor([VOCABULARY.ids(question(o)) for o in asked.tolist()])
    rows = torch.cat([head, text], dim=1)
    groups = _groups(rows)
    groups["object"] = torch.zeros_like(rows, dtype=torch.bool)
    groups["object"][:, 1 : 1 + patches] = scenes.held(patch)[torch.arange(n), asked]
    spans = _spans(n, patches, text.shape[1])
    word = 1 + patches + 3
    spans["word"] = torch.tensor([[word, word + 1]]).repeat(n, 1)
    return Probes(Batch(rows, torch.full_like(rows, IGNORED), spans, groups), scenes, asked, answers)


def _spans(n: int, patches: int, prompt: int) -> dict[str, Tensor]:
    start = 1 + patches
    return {
        "image": torch.tensor([[1, start]]).repeat(n, 1),
        "prompt": torch.tensor([[start, start + prompt]]).repeat(n, 1),
    }


def _groups(rows: Tensor) -> dict[str, Tensor]:
    image = rows == VOCABULARY[IMAGE]
    first = torch.zeros_like(image)
    first[:, 0] = True
    return {"image": image, "text": ~image, "first": first}


def mentions(ids: Int[Tensor, "n length"]) -> Bool[Tensor, "n objects"]:
    """Which objects the words name, up to the first ``<eos>``."""
    over = (ids == VOCABULARY[EOS]).cumsum(1) > 0
    numbers = torch.where(over, -1, ids - FIRST_OBJECT)
    return torch.stack([(numbers == o).any(1) for o in range(len(OBJECTS))], dim=1)


@dataclass(frozen=True)
class Lesson:
    """Part of a training step: rows of one length; the picture of row b is `picture[b]`, -1 for none."""

    input_ids: Int[Tensor, "rows length"]
    weights: Float[Tensor, "rows length"]
    picture: Int[Tensor, "rows"]


def caption_lesson(scenes: Drawn, patches: int, *, pictures: bool = True, weight: float = 1.0) -> Lesson:
    """Scenes with their captions, the words of a caption weighing `weight` together."""
    told = [
        caption(int(c), named.nonzero()[:, 0].tolist()) for c, named in zip(scenes.context, scenes.named, strict=True)
    ]
    head = [VOCABULARY.BOS] + (patches if pictures else 0) * [VOCABULARY[IMAGE]] + VOCABULARY.ids(DESCRIBE)
    return _lesson([(head, [(w, True) for w in VOCABULARY.ids(words)]) for words in told], pictures, weight)


def question_lesson(
    scenes: Drawn, patches: int, generator: torch.Generator, each: int = 4, *, balanced: bool = False
) -> Lesson:
    """Scenes with questions, half of them about what is named and half about what is not; answers weigh alike.

    With ``balanced`` they come in pairs, one of either answer, about objects of the scene's own context or of other
    ones: of both where that can be, so that what goes with a context says nothing about the answer.
    """
    head = [VOCABULARY.BOS] + patches * [VOCABULARY[IMAGE]]
    rows = []
    half = each // 2
    for context, named in zip(scenes.context, scenes.named, strict=True):
        if balanced:
            own = torch.arange(len(OBJECTS)) // 4 == context
            kinds = [k for k in (own, ~own) if (named & k).any() and (~named & k).any()] or [own | ~own]
            there = torch.cat([_one(named & kinds[i % len(kinds)], generator) for i in range(half)])
            not_ = torch.cat([_one(~named & kinds[i % len(kinds)], generator) for i in range(half)])
        else:
            there = torch.multinomial(named.float(), half, replacement=True, generator=generator)
            not_ = torch.multinomial((~named).float(), half, generator=generator)
        pairs = [(o, YES) for o in there.tolist()] + [(o, NO) for o in not_.tolist()]
        order = torch.randperm(each, generator=generator).tolist()
        tail = []
        for o, answer in (pairs[i] for i in order):
            tail += [(w, False) for w in VOCABULARY.ids(question(o))] + [(answer, True)]
        rows.append((head, tail))
    return _lesson(rows, True, 1.0)


def _one(of: Bool[Tensor, "objects"], generator: torch.Generator) -> Int[Tensor, "1"]:
    return torch.multinomial(of.float(), 1, generator=generator)


def _lesson(rows: list[tuple[list[int], list[tuple[int, bool]]]], pictures: bool, weight: float) -> Lesson:
    longest = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.full((len(rows), longest), VOCABULARY.PAD)
    weights = torch.zeros(len(rows), longest)
    for row, (head, tail) in enumerate(rows):
        asked = sum(counts for _, counts in tail)
        ids[row, : len(head) + len(tail)] = torch.tensor(head + [word for word, _ in tail])
        weights[row, len(head) : len(head) + len(tail)] = torch.tensor([weight * c / asked for _, c in tail])
    picture = torch.arange(len(rows)) if pictures else torch.full((len(rows),), -1)
    return Lesson(ids, weights, picture)


def token_classes(probes: Probes) -> dict[str, Bool[Tensor, "n length"]]:
    """The classes of tokens of causal tracing: a partition of the prompt of every question.

    "early visual": visual tokens before the first that holds the object asked for; "object visual": those that hold
    it; "late visual": the other ones; "early textual": text before the object's name, the first token included;
    "object textual": its name; "late textual": text after it but the last token, which is "last". Questions that end
    with ``cup ?`` have no late text, and no such class.

    Raises:
        ValueError: captions, which ask for no object, or an object that the picture does not show.
    """
    tokens = probes.tokens
    if "object" not in tokens.groups or "word" not in tokens.spans:
        raise ValueError("probes must be questions: captions ask for no object")
    image, object_ = tokens.groups["image"], tokens.groups["object"]
    if not bool(object_.any(1).all()):
        raise ValueError("probes must ask for objects that the pictures show; pick those that are to be answered yes")
    place = torch.arange(image.shape[1]).expand_as(image)
    first = object_.int().argmax(1, keepdim=True)
    start, end = tokens.spans["word"].T[:, :, None]
    last = place == image.shape[1] - 1
    named = (place >= start) & (place < end)
    found = {
        "early visual": image & (place < first),
        "object visual": object_,
        "late visual": image & (place > first) & ~object_,
        "early textual": ~image & (place < start),
        "object textual": named,
        "late textual": ~image & (place >= end) & ~last,
        "last": last,
    }
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def positions(mask: Bool[Tensor, "n length"]) -> tuple[tuple[int, ...], ...]:
    """A mask as positions for a `Site`, equally many a sample: the last one is repeated where a sample has fewer.

    Setting a token twice to the same value sets it once.

    Raises:
        ValueError: a sample without any.
    """
    if not bool(mask.any(1).all()):
        raise ValueError(f"mask: {int((~mask.any(1)).sum())} of {len(mask)} samples have no such token")
    rows = [row.nonzero()[:, 0].tolist() for row in mask]
    longest = max(len(row) for row in rows)
    return tuple(tuple(row + [row[-1]] * (longest - len(row))) for row in rows)
