"""RepeatedTokens: a random segment again and again, which only a model that looks back can predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch


@dataclass(frozen=True)
class RepeatedTokens:
    """BOS, then a random segment repeated to the end of the sequence (Olsson et al. 2022, induction heads).

    The segment's length is drawn from ``segment`` for every sequence and its tokens uniformly from ``tokens``; what is
    asked for (``labels``) are the tokens of the second and later periods. Spans: ``first`` and ``second`` period.

    Args:
        length: tokens of a sequence, BOS included.
        tokens: the ids to draw from; BOS must not be one of them.
        bos: id of the first token.
        segment: least and greatest length of the segment; both at most ``length - 2``, so that something repeats.
    """

    length: int = 65
    tokens: Sequence[int] = range(1, 64)
    bos: int = 0
    segment: tuple[int, int] = (12, 32)

    def __post_init__(self) -> None:
        lo, hi = self.segment
        if not 1 <= lo <= hi <= self.length - 2:
            raise ValueError(f"segment must be 1 <= least <= greatest <= length - 2 = {self.length - 2}, got {lo, hi}")
        if len(self.tokens) < 2 or self.bos in self.tokens:
            raise ValueError(f"tokens must hold at least two ids and not bos = {self.bos}, got {self.tokens}")

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        lo, hi = self.segment
        size = torch.randint(lo, hi + 1, (n, 1), generator=generator)
        drawn = torch.tensor(self.tokens)[torch.randint(len(self.tokens), (n, hi), generator=generator)]
        place = torch.arange(self.length - 1).expand(n, -1)
        ids = torch.cat([torch.full((n, 1), self.bos), drawn.gather(1, place % size)], dim=1)
        labels = ids.masked_fill(torch.arange(self.length) <= size, IGNORED)
        first = torch.cat([torch.ones_like(size), size + 1], dim=1)
        second = torch.cat([size + 1, (2 * size + 1).clamp(max=self.length)], dim=1)
        period = torch.arange(self.length)
        groups = {
            name: (period >= s[:, :1]) & (period < s[:, 1:]) for name, s in (("first", first), ("second", second))
        }
        return Batch(ids, labels, {"first": first, "second": second}, groups)

    def solve(self, prompt: Tensor) -> int | None:
        """The next token of a prompt ``[length]``, from the prompt alone: the one a whole period earlier.

        The period is the shortest under which the prompt is periodic; None while nothing has repeated yet.
        """
        body = prompt[1:]
        for size in range(self.segment[0], min(self.segment[1], len(body)) + 1):
            if torch.equal(body[size:], body[: len(body) - size]):
                return int(body[len(body) - size])
        return None
