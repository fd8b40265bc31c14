"""Spans between markers: a long text in which the pairs that belong together must be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Span = tuple[int, int, int]  # first token, last token, type


class Spans(NamedTuple):
    """Texts ``ids [n, length]`` and, for each, its spans (first, last, type), both ends included."""

    ids: Tensor
    spans: list[set[Span]]


@dataclass(frozen=True)
class MarkedSpans:
    """Filler with entities in it: an opening marker of a type, up to 98 tokens of filler, a closing marker of the type.

    Entities do not overlap, but several of one type stand near each other, so an opening and a closing marker of one
    type are no entity unless no other stands between: a pair cannot be judged alone. Stray closing markers, which close
    nothing, follow some entities. Long texts for span extraction, after arXiv 2502.07286.

    Args:
        length: tokens of a text.
        types: of entities.
        shortest, longest: least and greatest tokens of an entity, markers included.
        every: one entity for so many tokens, about (places that overlap are left out).
        stray: probability that a stray closing marker of the entity's type follows an entity.
        filler: filler tokens to draw from.
    """

    length: int = 256
    types: int = 3
    shortest: int = 2
    longest: int = 100
    every: int = 32
    stray: float = 0.3
    filler: int = 32

    def __post_init__(self) -> None:
        if not 2 <= self.shortest <= self.longest <= self.length:
            raise ValueError(
                f"shortest and longest must be 2 <= shortest <= longest <= length = {self.length}, "
                f"got {self.shortest} and {self.longest}"
            )
        for name, value in (("types", self.types), ("every", self.every), ("filler", self.filler)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.stray <= 1:
            raise ValueError(f"stray must be in [0, 1], got {self.stray}")

    @property
    def vocab(self) -> int:
        """Number of token ids: filler, opening markers, closing markers, and the first token of every text."""
        return self.filler + 2 * self.types + 1

    @property
    def first(self) -> int:
        """Id of a text's first token."""
        return self.vocab - 1

    def batch(self, n: int, generator: torch.Generator) -> Spans:
        """n texts drawn with the generator."""
        ids = torch.randint(self.filler, (n, self.length), generator=generator)
        ids[:, 0] = self.first
        count = max(1, self.length // self.every)

        def drawn(high: int) -> list[list[int]]:
            return torch.randint(high, (n, count), generator=generator).tolist()

        # Lengths even on a log scale, so that short ones are no rarity.
        ratio = (self.longest + 1) / self.shortest
        sizes = (self.shortest * ratio ** torch.rand(n, count, generator=generator)).long().clamp(max=self.longest)
        starts, kinds = drawn(self.length), drawn(self.types)
        strays = (torch.rand(n, count, generator=generator) < self.stray).tolist()
        found: list[set[Span]] = []
        for row in range(n):
            taken = torch.zeros(self.length, dtype=torch.bool)
            taken[0] = True
            spans: set[Span] = set()
            for start, size, kind, stray in zip(starts[row], sizes[row].tolist(), kinds[row], strays[row], strict=True):
                end = start + size + stray
                if end > self.length or bool(taken[start:end].any()):
                    continue
                taken[start:end] = True
                ids[row, start] = self.filler + kind
                ids[row, start + size - 1 : end] = self.filler + self.types + kind
                spans.add((start, start + size - 1, kind))
            found.append(spans)
        return Spans(ids, found)

    def solve(self, text: Int[Tensor, "length"]) -> set[Span]:
        """The spans of a text, from its tokens: an opening marker and the next closing one of its type."""
        found, opened = set(), dict[int, int]()
        for at, token in enumerate(text.tolist()):
            kind = token - self.filler
            if 0 <= kind < self.types:
                opened[kind] = at
            elif self.types <= kind < 2 * self.types and kind - self.types in opened:
                found.add((opened.pop(kind - self.types), at, kind - self.types))
        return found

    def naive(self, text: Int[Tensor, "length"]) -> set[Span]:
        """Every opening marker with every later closing one of its type at most ``longest`` tokens away.

        What a judge of single pairs cannot do better than: the floor.
        """
        tokens = text.tolist()
        opens = [(i, t - self.filler) for i, t in enumerate(tokens) if 0 <= t - self.filler < self.types]
        closes = [(j, t - self.filler - self.types) for j, t in enumerate(tokens) if t < self.first]
        return {(i, j, kind) for i, kind in opens for j, k in closes if k == kind and 0 < j - i < self.longest}

    def labels(self, spans: list[set[Span]]) -> Bool[Tensor, "n length length types"]:
        """Spans as pairs, at (first, last) and at (last, first)."""
        out = torch.zeros(len(spans), self.length, self.length, self.types, dtype=torch.bool)
        for row, some in enumerate(spans):
            for i, j, kind in some:
                out[row, i, j, kind] = out[row, j, i, kind] = True
        return out


def span_f1(found: list[set[Span]], told: list[set[Span]]) -> tuple[float, float, float]:
    """(F1, precision, recall) of exact spans with their types, counted over all texts; 0 where nothing is right."""
    right = sum(len(a & b) for a, b in zip(found, told, strict=True))
    precision = right / max(1, sum(map(len, found)))
    recall = right / max(1, sum(map(len, told)))
    return (2 * precision * recall / (precision + recall) if right else 0.0), precision, recall
