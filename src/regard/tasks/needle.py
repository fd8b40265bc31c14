"""Needle: a code said once among filler, asked for at the end."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.bytetext import BOS, decode

#: A haystack of exactly so many bytes, and the places in it where a sentence may be put.
Filler = Callable[[random.Random, int], tuple[bytes, list[int]]]


def _words(text: str) -> list[str]:
    return text.split("|")


ADJECTIVES = _words(
    "old|new|red|pale|quiet|narrow|heavy|simple|bright|cold|early|distant|gentle|broken|clever|empty|small|"
    "proud|golden|slow|tired|honest|green|hidden|wide"
)
NOUNS = _words(
    "river|teacher|window|letter|garden|engine|sailor|mountain|market|violin|baker|forest|harbour|clock|"
    "student|bridge|kitchen|painter|station|farmer|island|lantern|village|doctor|library"
)
VERBS = _words(
    "watches|follows|finds|paints|leaves|repairs|remembers|visits|crosses|keeps|sells|carries|hears|opens|"
    "draws|builds|answers|counts|forgets|meets"
)
_TAILS = _words(
    "in the morning|before dinner|near the sea|without a word|every winter|for the last time|after the rain|"
    "with great care|on the way home|at noon|for a friend|in silence"
)
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwxz", "aeiou"


def sentences(rng: random.Random, room: int) -> tuple[bytes, list[int]]:
    """Filler sentences of `room` bytes, the first one cut at its left end; places are between sentences."""
    parts: list[str] = []
    total = 0
    while total < room:
        a, b = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
        c, d = rng.choice(NOUNS), rng.choice(NOUNS)
        parts.append(f"the {a} {c} {rng.choice(VERBS)} the {b} {d} {rng.choice(_TAILS)}. ")
        total += len(parts[-1])
    ends, at = [0], -(total - room)
    for part in parts:
        at += len(part)
        if at > 0:  # the cut may take more than the first sentence
            ends.append(at)
    return "".join(parts).encode()[total - room :], ends


def lines_of(text: bytes) -> Filler:
    """A haystack cut from a text at random; needles go between its lines."""

    def fill(rng: random.Random, room: int) -> tuple[bytes, list[int]]:
        if room > len(text):
            raise ValueError(f"text has {len(text)} bytes, the haystack needs {room}")
        start = rng.randrange(len(text) - room + 1)
        cut = text[start : start + room]
        return cut, [0, *(m.end() for m in re.finditer(rb"\n", cut))]

    return fill


@dataclass(frozen=True)
class Needle:
    """Filler, "the code of NAME is DDDDD. " at a random depth, and at the end the question; the digits are asked for.

    Other names with other codes (``distractors``) make it a look-up: the question's name decides. Names of the
    ``train`` and ``test`` split are disjoint (by a checksum of the name). Ids are bytes after BOS.

    Spans: ``needle`` (the sentence with the answer), ``value`` (its digits), ``question`` (from "what" to the space
    before the answer), ``answer`` (the digits asked for). Groups: ``needle``, ``distractors``, ``filler``,
    ``question``.

    Args:
        length: tokens of a sequence, BOS and the answer included; every sequence has exactly this length.
        digits: digits of a code.
        distractors: least and greatest number of other needles.
        depth: place of the needle in the haystack, 0 (start) to 1 (end); None draws it.
        questions: how many needles are asked for, one after another, the spans being those of the last; more than one
            makes training denser. At most as many as there are needles.
        split: "train" or "test": which names are drawn.
        filler: what the haystack is made of.
    """

    length: int = 256
    digits: int = 5
    distractors: tuple[int, int] = (1, 4)
    depth: float | None = None
    questions: int = 1
    split: str = "train"
    filler: Filler = sentences

    def __post_init__(self) -> None:
        lo, hi = self.distractors
        if not 0 <= lo <= hi:
            raise ValueError(f"distractors must be 0 <= least <= greatest, got {self.distractors}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be None or in [0, 1], got {self.depth}")
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {self.split!r}")
        if not 1 <= self.questions <= lo + 1:
            raise ValueError(f"questions must be in 1..{lo + 1} (the least number of needles), got {self.questions}")
        if self.digits < 1:
            raise ValueError(f"digits must be at least 1, got {self.digits}")
        if self.length < (least := least_length(hi, self.questions, self.digits)):
            raise ValueError(
                f"length must be at least {least} for {hi} distractors and {self.questions} questions, "
                f"got {self.length}"
            )

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        ids = torch.zeros(n, self.length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        spans = {k: torch.zeros(n, 2, dtype=torch.long) for k in ("needle", "value", "question", "answer")}
        groups = {k: torch.zeros(n, self.length, dtype=torch.bool) for k in ("needle", "distractors", "question")}
        questions = torch.zeros(n, 1, dtype=torch.long)
        for row, seed in enumerate(seeds):
            text, told, asked = self._compose(random.Random(seed))
            ids[row] = torch.tensor([BOS, *text])
            for start, end in asked:
                labels[row, start:end] = ids[row, start:end]
            for which, (start, end) in enumerate(told):
                groups["distractors" if which else "needle"][row, start:end] = True
            needle, answer = told[0], asked[-1]
            question = (1 + text.rindex(_QUESTION), answer[0])
            value = (needle[1] - len(". ") - self.digits, needle[1] - len(". "))
            groups["question"][row, slice(*question)] = True
            questions[row] = 1 + text.index(_QUESTION)
            for name, span in (("needle", needle), ("value", value), ("question", question), ("answer", answer)):
                spans[name][row] = torch.tensor(span)
        place = torch.arange(self.length)
        groups["filler"] = (place > 0) & (place < questions) & ~groups["needle"] & ~groups["distractors"]
        return Batch(ids, labels, spans, groups)

    def _compose(self, rng: random.Random) -> tuple[bytes, list[tuple[int, int]], list[tuple[int, int]]]:
        """One text with the places (BOS counted) of its needles, the one asked for last first, and of its answers."""
        names: list[str] = []
        for _ in range(1 + rng.randint(*self.distractors)):
            while (name := draw_name(rng, self.split)) in names:
                pass
            names.append(name)
        codes = ["".join(rng.choice("0123456789") for _ in range(self.digits)) for _ in names]
        told = [_told(n, c) for n, c in zip(names, codes, strict=True)]
        tail, answers = b"", []
        for which in [*rng.sample(range(1, len(names)), self.questions - 1), 0]:
            tail += (b". " if tail else b"") + _asked(names[which])
            answers.append((len(tail), len(tail) + self.digits))
            tail += codes[which].encode()
        room = self.length - 1 - len(tail) - sum(map(len, told))
        hay, places = self.filler(rng, room)
        depths = [rng.random() if self.depth is None else self.depth, *(rng.random() for _ in told[1:])]
        cuts = [_nearest(places, depth * room) for depth in depths]
        text, done, spans = b"", 0, [(0, 0)] * len(told)
        for which in sorted(rng.sample(range(len(told)), len(told)), key=cuts.__getitem__):
            text += hay[done : cuts[which]]
            done = cuts[which]
            spans[which] = (1 + len(text), 1 + len(text) + len(told[which]))
            text += told[which]
        text += hay[done:]
        start = 1 + len(text)
        return text + tail, spans, [(a + start, b + start) for a, b in answers]

    def solve(self, prompt: Tensor) -> list[int] | None:
        """The answer to a prompt ``[length]`` that ends before it, from the prompt alone; None where it is not said."""
        text = decode(prompt)
        asked = re.findall(r"what is the code of ([a-z]+)\?", text)
        if not asked:
            return None
        said = re.findall(rf"the code of {asked[-1]} is (\d{{{self.digits}}})\.", text)
        return list(said[0].encode()) if said else None

    def without_needle(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same sequences with the needle's sentence written over by filler: the answer cannot be known any more."""
        ids = batch.input_ids.clone()
        for row, (start, end) in enumerate(batch.spans["needle"].tolist()):
            rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
            ids[row, start:end] = torch.tensor(list(sentences(rng, end - start)[0]))
        groups = {**batch.groups, "filler": batch.groups["filler"] | batch.groups["needle"]}
        groups["needle"] = torch.zeros_like(groups["needle"])
        return Batch(ids, batch.labels, batch.spans, groups, batch.valid)


def least_length(distractors: int, questions: int = 1, digits: int = 5) -> int:
    """Tokens that hold BOS, the needles and the questions with the longest names, without any filler."""
    name = "x" * 7
    told = len(_told(name, "0" * digits)) * (distractors + 1)
    return 1 + told + (len(_asked(name)) + digits + len(". ")) * questions - len(". ")


def draw_name(rng: random.Random, split: str) -> str:
    """A pronounceable name of 5 or 7 letters; a tenth of all names, by checksum, is the test split."""
    while True:
        syllables = rng.choice((2, 3))
        name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))
        name += rng.choice(_CONSONANTS)
        if (zlib.crc32(name.encode()) % 10 == 0) == (split == "test"):
            return name


_QUESTION = b"what is the code of "


def _nearest(places: list[int], wanted: float) -> int:
    return min(places, key=lambda place: abs(place - wanted))


def _told(name: str, code: str) -> bytes:
    return f"the code of {name} is {code}. ".encode()


def _asked(name: str) -> bytes:
    return _QUESTION + f"{name}? the code of {name} is ".encode()
