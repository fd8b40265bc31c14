"""Arith3: sums and differences of three numbers, each number and each result one token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.words import Vocabulary

__all__ = ["Arith3"]


@dataclass(frozen=True)
class Arith3:
    """``<bos> A op B op C =`` and the result, ``A, B, C`` in ``0..most``, ``op`` + or -.

    Every fifth triple (A, B, C) is held out, whatever its signs: the ``test`` split. Spans: ``operands`` (A to C) and
    ``answer``.

    Args:
        split: "train" or "test".
        most: the largest operand.
    """

    split: str = "train"
    most: int = 23

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {self.split!r}")
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """``+ - =`` and every number that can stand or come out."""
        return Vocabulary.of(("+", "-", "="), (str(n) for n in range(-2 * self.most, 3 * self.most + 1)))

    def held_out(self, triples: Int[Tensor, "n 3"]) -> Tensor:
        """Whether each triple is of the test split."""
        a, b, c = triples.unbind(-1)
        return (a * 7 + b * 3 + c) % 5 == 0

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sums drawn with the generator."""
        found: list[Tensor] = []
        while sum(map(len, found)) < n:  # a fifth or four fifths of the draws are of the split
            triples = torch.randint(self.most + 1, (6 * n + 8, 3), generator=generator)
            found.append(triples[self.held_out(triples) == (self.split == "test")])
        triples = torch.cat(found)[:n]
        signs = 1 - 2 * torch.randint(2, (n, 2), generator=generator)
        return self.of(triples, signs)

    def of(self, triples: Int[Tensor, "n 3"], signs: Int[Tensor, "n 2"]) -> Batch:
        """The batch of these triples under these signs (+1 or -1)."""
        words = self.vocabulary
        zero, plus = words["0"], words["+"]
        result = triples[:, 0] + (signs * triples[:, 1:]).sum(1)
        ids = torch.empty(len(triples), 8, dtype=torch.long)
        ids[:, 0], ids[:, 6], ids[:, 7] = words.BOS, words["="], zero + result
        ids[:, 1::2][:, :3] = zero + triples
        ids[:, 2:6:2] = torch.where(signs > 0, plus, words["-"])
        labels = torch.full_like(ids, IGNORED)
        labels[:, 7] = ids[:, 7]
        spans = {
            name: torch.tensor([span]).expand(len(ids), 2) for name, span in (("operands", (1, 6)), ("answer", (7, 8)))
        }
        return Batch(ids, labels, spans)

    def solve(self, prompt: Int[Tensor, "7"]) -> int:
        """The id of the result of a prompt ``[7]`` that ends in ``=``."""
        words = self.vocabulary
        said = [words.words[i] for i in prompt.tolist()]
        total = int(said[1])
        for op, number in ((said[2], said[3]), (said[4], said[5])):
            total += int(number) if op == "+" else -int(number)
        return words[str(total)]
