"""A pool of documents to choose from: some need recall, the others are filler that is as hard to predict."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["MarkovFiller", "matched"]


@dataclass(frozen=True)
class MarkovFiller:
    """Documents of a first-order Markov chain: what comes depends on the last token alone, so recall is no help.

    The chain is the same in every document, ``P(y | x) = softmax(A_xy / t)`` with A standard normal (by ``seed``);
    its temperature t is drawn for each document, log-uniformly, so that the documents differ in how hard they are.

    Args:
        length: tokens of a document.
        tokens: ids ``0..tokens-1``.
        temperature: least and greatest t.
        seed: of A.
    """

    length: int = 128
    tokens: int = 144
    temperature: tuple[float, float] = (0.15, 3.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.tokens < 2:
            raise ValueError(f"length must be at least 1 and tokens at least 2, got {self.length} and {self.tokens}")
        if not 0 < self.temperature[0] <= self.temperature[1]:
            raise ValueError(f"temperature must be 0 < least <= greatest, got {self.temperature}")

    @cached_property
    def scores(self) -> Float[Tensor, "tokens tokens"]:
        """A."""
        return torch.randn(self.tokens, self.tokens, generator=torch.Generator().manual_seed(self.seed))

    def batch(self, n: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """n documents drawn with the generator; their first tokens are uniform."""
        low, high = (torch.tensor(t).log() for t in self.temperature)
        t = (low + (high - low) * torch.rand(n, 1, generator=generator)).exp()
        tokens = [torch.randint(self.tokens, (n,), generator=generator)]
        for _ in range(self.length - 1):
            share = (self.scores[tokens[-1]] / t).softmax(-1)
            tokens.append(torch.multinomial(share, 1, generator=generator)[:, 0])
        return torch.stack(tokens, 1)


def matched(
    wanted: Float[Tensor, "n"], offered: Float[Tensor, "m"], each: int = 1, *, widest: float = float("inf")
) -> Int[Tensor, "n each"]:
    """For every wanted value the `each` nearest offered ones that are not yet taken, in a round for each.

    Within a round values are served from the rarest: those whose nearest offer is furthest first.

    Args:
        wanted, offered: for instance losses of two kinds of documents, to compare only what is equally hard.
        each: how many of the offered go with one.
        widest: greatest distance that is accepted.

    Returns:
        Indices into ``offered``, no two alike.

    Raises:
        ValueError: fewer offers than are needed, or none within ``widest``.
    """
    if len(offered) < len(wanted) * each:
        raise ValueError(f"offered must hold at least {len(wanted) * each} values, got {len(offered)}")
    values, places = (x.tolist() for x in offered.double().sort())
    found = torch.zeros(len(wanted), each, dtype=torch.long)
    asked = wanted.double().tolist()

    def nearest(value: float) -> int:
        at = bisect(values, value)
        return min((i for i in (at - 1, at) if 0 <= i < len(values)), key=lambda i: abs(values[i] - value))

    for turn in range(each):
        gaps = [abs(values[nearest(value)] - value) for value in asked]
        for row in sorted(range(len(asked)), key=lambda i: -gaps[i]):
            best = nearest(asked[row])
            if not abs(values[best] - asked[row]) <= widest:
                raise ValueError(
                    f"offered has no value left within {widest} of {asked[row]:.4g}; the nearest is {values[best]:.4g}"
                )
            found[row, turn] = places.pop(best)
            del values[best]
    return found
