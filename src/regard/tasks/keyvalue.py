"""KeyValueRetrieval: a JSON object of random keys and sentences, a few look-ups shown, and one asked for."""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.bytetext import BOS, decode
from regard.tasks.needle import ADJECTIVES, NOUNS, VERBS

__all__ = ["KeyValueRetrieval"]

_KEY = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class KeyValueRetrieval:
    """A JSON object, look-ups in it as an example, and the key of another entry (after arXiv 2505.07293).

    ``{"KEY": "VALUE", ...}`` and then a line ``what is KEY? "KEY": "VALUE"`` for each shot and for the entry asked
    for. Keys are random letters and digits, values sentences of at most 30 bytes (the paper's of at most 30 tokens);
    all of a sequence are distinct. Entries fill the length; the value of the last one, which is never asked for, is as
    long as it must be. The answer is the value's bytes, at the end of the sequence. Ids are bytes after BOS.

    Spans: ``needle`` (the entry), ``value`` (its sentence), ``question`` (the last line without the answer),
    ``answer``. Groups: ``needle``, ``distractors`` (the other entries), ``shots``, ``question``.

    Args:
        length: tokens of a sequence, BOS and the answer included; every sequence has exactly this length.
        shots: look-ups shown.
        key: characters of a key.
    """

    length: int = 1024
    shots: int = 3
    key: int = 32

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots must be at least 0, got {self.shots}")
        if self.key < 4:
            raise ValueError(f"key must be at least 4 characters, got {self.key}")
        # Values of the greatest length in every entry that must be there: the shots', the one asked for, the last.
        least = 1 + len("{}\n") + (self.shots + 2) * self._entry(30) + (self.shots + 1) * self._line(30)
        if self.length < least:
            raise ValueError(
                f"length must be at least {least} for {self.shots} shots of keys of {self.key}, got {self.length}"
            )

    def _entry(self, value: int) -> int:
        return self.key + value + len('"": "", ')

    def _line(self, value: int) -> int:
        return 2 * self.key + value + len('what is ? "": ""\n')

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        ids = torch.zeros(n, self.length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        spans = {k: torch.zeros(n, 2, dtype=torch.long) for k in ("needle", "value", "question", "answer")}
        groups = {k: torch.zeros_like(ids, dtype=torch.bool) for k in ("needle", "distractors", "shots", "question")}
        for row, seed in enumerate(seeds):
            text, entries, (needle, value, question, shots) = self._compose(random.Random(seed))
            ids[row] = torch.tensor([BOS, *text.encode()])
            labels[row, question[1] :] = ids[row, question[1] :]
            for start, end in entries:
                groups["needle" if (start, end) == needle else "distractors"][row, start:end] = True
            groups["shots"][row, slice(*shots)] = True
            groups["question"][row, slice(*question)] = True
            told = {"needle": needle, "value": value, "question": question, "answer": (question[1], self.length)}
            for name, span in told.items():
                spans[name][row] = torch.tensor(span)
        return Batch(ids, labels, spans, groups)

    def _compose(self, rng: random.Random) -> tuple[str, list[tuple[int, int]], tuple[tuple[int, int], ...]]:
        """One text; the places (BOS counted) of its entries; of the one asked for, its value, the question, shots."""
        keys: list[str] = []
        values: list[str] = []

        def draw() -> None:
            while (k := "".join(rng.choices(_KEY, k=self.key))) in keys:
                pass
            while (v := f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)}") in values:
                pass
            keys.append(k)
            values.append(v)  # at most 30 bytes, with the longest words

        for _ in range(self.shots + 1):
            draw()
        lines = [f'what is {k}? "{k}": "{v}"\n' for k, v in zip(keys[:-1], values[:-1], strict=True)]
        question = f'what is {keys[-1]}? "{keys[-1]}": "'
        tail = "".join(lines) + question + values[-1]
        room = self.length - 1 - len("{}\n") - len(tail) - sum(self._entry(len(v)) for v in values)
        while room > 2 * self._entry(30):
            draw()
            room -= self._entry(len(values[-1]))
        draw()  # the last entry has no comma after it, and takes what is left
        values[-1] = _stretched(values[-1], room - self._entry(0) + len(", "), rng)
        asked, order = self.shots, [*rng.sample(range(len(keys) - 1), len(keys) - 1), len(keys) - 1]
        text, entries, needle = "{", [], (0, 0)
        for which in order:
            text += ", " if len(text) > 1 else ""
            start = 1 + len(text)
            text += f'"{keys[which]}": "{values[which]}"'
            entries.append((start, 1 + len(text)))
            needle = entries[-1] if which == asked else needle
        text += "}\n"
        shots = (1 + len(text), 1 + len(text) + len("".join(lines)))
        value = (needle[1] - 1 - len(values[asked]), needle[1] - 1)
        return text + tail, entries, (needle, value, (shots[1], shots[1] + len(question)), shots)

    def solve(self, prompt: Tensor) -> list[int] | None:
        """The answer to a prompt ``[length]`` that ends before it, from the prompt alone; None where it is not said."""
        head, _, tail = decode(prompt).partition("}\n")
        asked = re.findall(r'what is ([a-z0-9]+)\? "\1": "$', tail)
        said = dict(re.findall(r'"([a-z0-9]+)": "([^"]*)"', head))
        return list(said[asked[0]].encode()) if asked and asked[0] in said else None


def _stretched(value: str, size: int, rng: random.Random) -> str:
    """The sentence with more words, cut to `size` characters."""
    while len(value) < size:
        value += f" and the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return value[:size]
