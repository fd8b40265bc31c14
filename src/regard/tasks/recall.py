"""Recall of a token said earlier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["Passkey"]


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
