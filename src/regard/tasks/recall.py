"""Recall of a token said earlier: one among filler, or the one that goes with a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["KeyedPasskey", "Passkey"]


@dataclass(frozen=True)
class Passkey:
    """One digit somewhere in filler, asked for by the last token; the answer comes after the ``length`` tokens shown.

    Ids ``0..digits-1`` are the digits, ``vocab - 1`` is the question and the ids between are filler. Digit, place and
    filler are uniform, so chance is ``1 / digits``. A sequence has ``length + 1`` tokens, the last of which is the
    answer; the row that predicts it is that of the question, and the digit is ``distance`` tokens before it. Spans:
    ``key`` (the digit), ``answer``.

    Args:
        length: tokens before the answer, question included.
        vocab: ids in all, at least ``digits + 2``.
        digits: different digits.
    """

    length: int = 64
    vocab: int = 16
    digits: int = 10

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2 (a digit and the question), got {self.length}")
        if self.digits < 2:
            raise ValueError(f"digits must be at least 2, got {self.digits}")
        if self.vocab < self.digits + 2:
            raise ValueError(f"vocab must be at least digits + 2 = {self.digits + 2}, got {self.vocab}")

    def batch(self, n: int, generator: torch.Generator, distance: int | None = None) -> Batch:
        """n sequences; ``distance`` fixes how many tokens the digit stands before the question, None draws it.

        Raises:
            ValueError: distance is not in ``1..length-1``.
        """
        if distance is not None and not 1 <= distance < self.length:
            raise ValueError(f"distance must be in 1..{self.length - 1}, got {distance}")
        ids = torch.randint(self.digits, self.vocab - 1, (n, self.length + 1), generator=generator)
        digit = torch.randint(self.digits, (n,), generator=generator)
        place = torch.randint(self.length - 1, (n,), generator=generator)
        if distance is not None:
            place = torch.full_like(place, self.length - 1 - distance)
        ids[torch.arange(n), place] = digit
        ids[:, -2], ids[:, -1] = self.vocab - 1, digit
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = digit
        answer = torch.tensor([[self.length, self.length + 1]]).expand(n, 2).contiguous()
        return Batch(ids, labels, {"key": torch.stack([place, place + 1], 1), "answer": answer})

    def distance(self, batch: Batch) -> Tensor:
        """How many tokens before the question each digit stands, ``[batch]``."""
        return self.length - 1 - batch.spans["key"][:, 0]

    def solve(self, prompt: Tensor) -> int | None:
        """The answer to a prompt ``[length]``, from the prompt alone; None where no digit is in it."""
        digits = prompt[prompt < self.digits]
        return int(digits[0]) if len(digits) else None


@dataclass(frozen=True)
class KeyedPasskey:
    """Pairs (key, value) somewhere in noise, each one token; the last token asks for a key, the answer is its value.

    Ids: ``0..values-1`` answers; then ``keys`` questions; then ``keys * values`` pairs, that of (key, value) being
    ``values + keys + key * values + value``; then ``noise`` ids of noise. The pairs of a sequence have distinct keys;
    keys, values, places, noise and which key is asked for are uniform, so chance is ``1 / values``, and naming the
    value of any pair gives `floor`. One attention layer can answer. A sequence has ``length + 1`` tokens, the last of
    which is the answer. Spans: ``pair`` (the one asked for), ``answer``; groups: ``pairs`` (all of them).

    Args:
        length: tokens before the answer, question included.
        keys, values, noise: how many of each.
        pairs: shown in a sequence, at most ``keys``.
    """

    length: int = 64
    keys: int = 8
    values: int = 8
    noise: int = 64
    pairs: int = 4

    def __post_init__(self) -> None:
        for name in ("keys", "noise", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.values < 2:
            raise ValueError(f"values must be at least 2, got {self.values}")
        if self.pairs > self.keys:
            raise ValueError(f"pairs must be at most keys = {self.keys}, their keys being distinct, got {self.pairs}")
        if self.length < self.pairs + 1:
            raise ValueError(f"length must be at least pairs + 1 = {self.pairs + 1}, got {self.length}")

    @property
    def vocab(self) -> int:
        """Ids in all."""
        return self.values + self.keys + self.keys * self.values + self.noise

    @property
    def floor(self) -> float:
        """Share right of one who names the value of any pair shown: right on his own pair, or by chance."""
        return (1 + (self.pairs - 1) / self.values) / self.pairs

    def batch(self, n: int, generator: torch.Generator, distance: int | None = None) -> Batch:
        """n sequences; ``distance`` fixes how many tokens the pair asked for stands before the question, None draws it.

        Raises:
            ValueError: distance is not in ``1..length-1``.
        """
        if distance is not None and not 1 <= distance < self.length:
            raise ValueError(f"distance must be in 1..{self.length - 1}, got {distance}")
        first = self.values + self.keys
        ids = torch.randint(first + self.keys * self.values, self.vocab, (n, self.length + 1), generator=generator)
        key = torch.rand(n, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        value = torch.randint(self.values, (n, self.pairs), generator=generator)
        rank = torch.rand(n, self.length - 1, generator=generator)
        if distance is not None:
            rank[:, self.length - 1 - distance] = -1.0  # drawn first, so the pair asked for stands there
        places = rank.argsort(1)[:, : self.pairs]
        ids.scatter_(1, places, first + key * self.values + value)
        ids[:, -2], ids[:, -1] = self.values + key[:, 0], value[:, 0]  # the keys are in random order: ask for the first
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        answer = torch.tensor([[self.length, self.length + 1]]).expand(n, 2).contiguous()
        spans = {"pair": torch.stack([places[:, 0], places[:, 0] + 1], 1), "answer": answer}
        shown = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, places, True)
        return Batch(ids, labels, spans, {"pairs": shown})

    def distance(self, batch: Batch) -> Tensor:
        """How many tokens before the question the pair asked for stands, ``[batch]``."""
        return self.length - 1 - batch.spans["pair"][:, 0]

    def solve(self, prompt: Tensor) -> int | None:
        """The answer to a prompt ``[length]``, from the prompt alone; None where no pair has the key."""
        first = self.values + self.keys
        token = prompt[(prompt >= first) & (prompt < first + self.keys * self.values)] - first
        value = (token % self.values)[token // self.values == prompt[-1] - self.values]
        return int(value[0]) if len(value) else None
