"""Multi-query associative recall: many pairs said once, some of their keys asked for again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["AssociativeRecall"]


@dataclass(frozen=True)
class AssociativeRecall:
    """``k1 v1 k2 v2 ... kn vn``, then filler in which ``queries`` of the keys come again, each with its value after it.

    The values of the second part are asked for (Zoology, arXiv 2312.04927). Ids ``0..keys-1`` are keys,
    ``keys..keys+values-1`` values, the ``filler`` ids after them filler. Keys of a sequence are distinct; values are
    uniform and independent, so chance is ``1 / values``; which pairs are asked for, in which order and where, is
    uniform. Groups: ``pairs`` (the first part) and ``asked`` (keys that come again). Spans: ``pair`` and ``answer`` of
    the last one asked for.

    Args:
        length: tokens of a sequence, at least ``2 pairs + 2 queries``.
        pairs: pairs said, at most ``keys``.
        queries: pairs asked for, at most ``pairs``.
        keys, values, filler: different ids of each kind.
    """

    length: int = 256
    pairs: int = 16
    queries: int = 8
    keys: int = 64
    values: int = 64
    filler: int = 16

    def __post_init__(self) -> None:
        for name in ("pairs", "queries", "filler"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.values < 2:
            raise ValueError(f"values must be at least 2, got {self.values}")
        if self.pairs > self.keys:
            raise ValueError(f"pairs must be at most keys = {self.keys}, got {self.pairs}")
        if self.queries > self.pairs:
            raise ValueError(f"queries must be at most pairs = {self.pairs}, got {self.queries}")
        if self.length < (least := 2 * self.pairs + 2 * self.queries):
            raise ValueError(f"length must be at least 2 pairs + 2 queries = {least}, got {self.length}")

    @property
    def vocab(self) -> int:
        """Ids in all."""
        return self.keys + self.values + self.filler

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        rows, said = torch.arange(n)[:, None], 2 * self.pairs
        key = torch.rand(n, self.keys, generator=generator).argsort(-1)[:, : self.pairs]
        value = torch.randint(self.values, (n, self.pairs), generator=generator) + self.keys
        which = torch.rand(n, self.pairs, generator=generator).argsort(-1)[:, : self.queries]
        # q places of pairs in a row of `room` tokens: q of the room - q slots, each later one pushed on by one.
        slots = self.length - said - self.queries
        chosen = torch.rand(n, slots, generator=generator).argsort(-1)[:, : self.queries].sort(-1).values
        at = said + chosen + torch.arange(self.queries)
        ids = torch.randint(self.keys + self.values, self.vocab, (n, self.length), generator=generator)
        ids[:, 0:said:2], ids[:, 1:said:2] = key, value
        ids[rows, at], ids[rows, at + 1] = key.gather(1, which), value.gather(1, which)
        labels = torch.full_like(ids, IGNORED)
        labels[rows, at + 1] = ids[rows, at + 1]
        asked = torch.zeros_like(ids, dtype=torch.bool)
        asked[rows, at] = True
        pairs = torch.zeros_like(asked)
        pairs[:, :said] = True
        spans = {
            "pair": 2 * which[:, -1:] + torch.tensor([0, 2]),
            "answer": at[:, -1:] + torch.tensor([1, 2]),
        }
        return Batch(ids, labels, spans, {"pairs": pairs, "asked": asked})

    def solve(self, prompt: Tensor) -> int | None:
        """The answer to a prompt ``[length]`` that ends with a key, from the prompt alone; None where it has none."""
        ids = prompt.tolist()
        if not ids or ids[-1] >= self.keys:
            return None
        said = {ids[i]: ids[i + 1] for i in reversed(range(len(ids) - 1)) if ids[i] < self.keys <= ids[i + 1]}
        return said.get(ids[-1])
