"""Copying: a long random stretch, said again whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["Copying"]


@dataclass(frozen=True)
class Copying:
    """A random stretch, a token that asks for it, and the stretch again; every token of the copy is asked for.

    Ids ``0..tokens-1`` are uniform and independent, so chance is ``1 / tokens``; ``tokens`` itself is the question.
    Spans: ``first`` (the stretch), ``answer`` (its copy). The row that predicts token p of the copy stands at distance
    ``stretch`` after the token that follows the one it copies, at every p.

    Args:
        length: tokens of a sequence, odd, at least 3: ``2 stretch + 1``.
        tokens: different ids of the stretch.
    """

    length: int = 257
    tokens: int = 64

    def __post_init__(self) -> None:
        if self.length < 3 or self.length % 2 == 0:
            raise ValueError(f"length must be odd and at least 3 (2 stretch + 1), got {self.length}")
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}")

    @property
    def stretch(self) -> int:
        """Tokens to copy."""
        return self.length // 2

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        drawn = torch.randint(self.tokens, (n, self.stretch), generator=generator)
        ids = torch.cat([drawn, torch.full((n, 1), self.tokens), drawn], dim=1)
        labels = ids.masked_fill(torch.arange(self.length) <= self.stretch, IGNORED)
        spans = {
            "first": torch.tensor([[0, self.stretch]]).repeat(n, 1),
            "answer": torch.tensor([[self.stretch + 1, self.length]]).repeat(n, 1),
        }
        return Batch(ids, labels, spans)

    def solve(self, prompt: Tensor) -> int | None:
        """What follows of a prompt ``[length]``, from the prompt alone; None before the question and after the copy."""
        asked = (prompt == self.tokens).nonzero().flatten()
        if not len(asked):
            return None
        done = len(prompt) - int(asked[0]) - 1
        return int(prompt[done]) if done < int(asked[0]) else None
