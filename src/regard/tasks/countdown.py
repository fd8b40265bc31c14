"""Countdown with three numbers: reach the target with each number once, by two equations, the second with the first's
result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, permutations
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["Countdown"]

Split = Literal["train", "test"]
OPERATIONS = "+-*"


@dataclass(frozen=True)
class Countdown:
    """``BOS a b c -> t :`` asks for ``x o y = r ; u p v = t END`` with {x, y} and the third number used once each.

    u and v are r and the number that is left, in either order. Ids 0..limit are numbers; the signs follow. Every number
    in an equation is one of them, so results lie in 0..limit. Draws are uniform over the questions of a split (three
    numbers and a target that can be reached), then over the right answers of each, with the numbers in random order; a
    draw over answers would favour plain sums, which have many. Unordered triples of numbers are split, so no question
    in "test" has numbers that training saw together.

    Args:
        most: the largest number given, at least 2; the smallest is 1.
        limit: the largest result.
        held_out: share of the triples in "test".
        seed: of the split.
    """

    most: int = 20
    limit: int = 99
    held_out: float = 0.2
    seed: int = 0

    prompt = 7
    """Tokens of the question."""
    answer = 12
    """Tokens of the answer."""

    def __post_init__(self) -> None:
        if not 2 <= self.most <= self.limit:
            raise ValueError(f"most must be in 2..limit = {self.limit}, got {self.most}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {self.held_out}")

    @property
    def vocab(self) -> int:
        """Token ids in all."""
        return self.limit + 10

    def sign(self, name: str) -> int:
        """Id of a sign: one of ``+ - * = ; END BOS -> :``."""
        return self.limit + 1 + ("+", "-", "*", "=", ";", "END", "BOS", "->", ":").index(name)

    @cached_property
    def _triples(self) -> dict[tuple[int, ...], bool]:
        """Every unordered triple, and whether it is held out."""
        triples = list(combinations_with_replacement(range(1, self.most + 1), 3))
        order = torch.randperm(len(triples), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held = set(order[: max(1, round(self.held_out * len(triples)))])
        return {triple: i in held for i, triple in enumerate(triples)}

    @cached_property
    def _answers(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Right answers of each split as (x, o, y, r, u, p, v, t), o and p in 0..2, those to one question together;
        the first row of every question, and how many it has."""
        n = torch.arange(1, self.most + 1)
        x, y, z, o, p, turned = (
            g.flatten()
            for g in torch.meshgrid(n, n, n, torch.arange(3), torch.arange(3), torch.arange(2), indexing="ij")
        )
        r = _result(x, o, y)
        u, v = torch.where(turned == 0, r, z), torch.where(turned == 0, z, r)
        t = _result(u, p, v)
        fits = (r >= 0) & (r <= self.limit) & (t >= 0) & (t <= self.limit)
        rows = torch.stack([x, o, y, r, u, p, v, t], 1)
        ordered = torch.stack([x, y, z], 1).sort(1).values
        held = torch.zeros(self.most + 1, self.most + 1, self.most + 1, dtype=torch.bool)
        for triple, out in self._triples.items():
            held[triple] = out
        test = held[ordered[:, 0], ordered[:, 1], ordered[:, 2]]
        return {"train": _by_question(rows[fits & ~test]), "test": _by_question(rows[fits & test])}

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Batch:
        """n questions with one right answer each, which is what is asked for; spans ``prompt``, ``answer``."""
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
        answers, first, count = self._answers[split]
        question = torch.randint(len(first), (n,), generator=generator)
        which = (torch.rand(n, generator=generator) * count[question]).long()
        x, o, y, r, u, p, v, t = answers[first[question] + which].T
        numbers = torch.stack([x, y, torch.where(u == r, v, u)], 1)
        a, b, c = numbers.gather(1, torch.rand(n, 3, generator=generator).argsort(1)).T

        def all_(name: str) -> Tensor:
            return torch.full_like(x, self.sign(name))

        plus = self.sign("+")
        asked = [all_("BOS"), a, b, c, all_("->"), t, all_(":")]
        reply = [x, o + plus, y, all_("="), r, all_(";"), u, p + plus, v, all_("="), t, all_("END")]
        ids = torch.stack(asked + reply, 1)
        labels = ids.clone()
        labels[:, : self.prompt] = IGNORED
        ends = {"prompt": (0, self.prompt), "answer": (self.prompt, self.prompt + self.answer)}
        return Batch(ids, labels, {name: torch.tensor([end] * n).view(n, 2) for name, end in ends.items()})

    def right(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch"]:
        """Whether questions ``[batch, 19]`` are answered: form, arithmetic, numbers and target."""
        if ids.shape[1] != self.prompt + self.answer:
            raise ValueError(f"ids must have {self.prompt + self.answer} columns, got {ids.shape[1]}")
        given, target = ids[:, 1:4], ids[:, 5]
        x, o, y, e1, r, semi, u, p, v, e2, t, end = ids[:, self.prompt :].T
        plus = self.sign("+")
        form = (e1 == self.sign("=")) & (e2 == self.sign("=")) & (semi == self.sign(";")) & (end == self.sign("END"))
        for sign in (o, p):
            form &= (sign >= plus) & (sign < plus + 3)
        for number in (x, y, r, u, v, t):
            form &= number <= self.limit
        truth = (_result(x, o - plus, y) == r) & (_result(u, p - plus, v) == t) & (t == target)
        used = torch.zeros_like(truth)
        want = given.sort(1).values
        for mine, other in ((u, v), (v, u)):
            used |= (mine == r) & (torch.stack([x, y, other], 1).sort(1).values == want).all(1)
        return form & truth & used

    def solve(self, prompt: Int[Tensor, "7"]) -> Int[Tensor, "12"] | None:
        """A right answer to a question, from the question alone; None: there is none."""
        numbers, target, plus = prompt[1:4].tolist(), int(prompt[5]), self.sign("+")
        signs = {name: self.sign(name) for name in ("=", ";", "END")}
        for x, y, z in permutations(numbers):
            for o in range(3):
                r = int(_result(torch.tensor(x), torch.tensor(o), torch.tensor(y)))
                if not 0 <= r <= self.limit:
                    continue
                for p in range(3):
                    for u, v in ((r, z), (z, r)):
                        if int(_result(torch.tensor(u), torch.tensor(p), torch.tensor(v))) == target:
                            first = [x, o + plus, y, signs["="], r, signs[";"]]
                            return torch.tensor([*first, u, p + plus, v, signs["="], target, signs["END"]])
        return None


def _by_question(rows: Int[Tensor, "rows 8"]) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows.unique(dim=0)  # equal numbers give the same answer twice
    x, _, y, r, u, _, v, t = rows.T
    numbers = torch.stack([x, y, torch.where(u == r, v, u)], 1).sort(1).values
    _, question = torch.cat([numbers, t[:, None]], 1).unique(dim=0, return_inverse=True)
    order = question.argsort(stable=True)
    count = question.bincount()
    return rows[order], count.cumsum(0) - count, count


def _result(a: Tensor, operation: Tensor, b: Tensor) -> Tensor:
    return torch.where(operation == 0, a + b, torch.where(operation == 1, a - b, a * b))
