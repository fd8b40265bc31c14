"""Tasks that ask where a token stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["ArgmaxPosition"]


@dataclass(frozen=True)
class ArgmaxPosition:
    """Uniform tokens; the answer is the index of the first of the largest.

    A model that pools over tokens and sees no order can do no better than name one index: every index is as likely to
    be the first maximum, and index 0 is it whenever it holds the maximum. See `ceiling`.

    Args:
        length: tokens of a sequence; also the number of answers.
        vocab: token ids ``0..vocab-1``, compared as numbers.
    """

    length: int = 16
    vocab: int = 32

    def __post_init__(self) -> None:
        for name, value in (("length", self.length), ("vocab", self.vocab)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")

    def draw(self, n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n length"], Int[Tensor, "n"]]:
        """n sequences and their answers."""
        ids = torch.randint(self.vocab, (n, self.length), generator=generator)
        return ids, self.solve(ids)

    def solve(self, ids: Int[Tensor, "n length"]) -> Int[Tensor, "n"]:
        """The answers."""
        order = torch.arange(self.length, 0, -1, device=ids.device)
        return (ids * (self.length + 1) + order).argmax(1)  # the first of equals wins

    @property
    def ceiling(self) -> float:
        """Accuracy that no permutation-invariant model exceeds: ``sum_{v=1..V} (1/V) (v/V)^(L-1)``, exact.

        Given the multiset of tokens all orders are alike, so naming index 0 is best (ties make it likelier to be the
        first maximum than any other index); it is right iff ``x_0`` is the maximum.
        """
        return sum((v / self.vocab) ** (self.length - 1) for v in range(1, self.vocab + 1)) / self.vocab
