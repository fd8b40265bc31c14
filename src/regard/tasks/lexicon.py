"""Lexicon: sentences of a small probabilistic grammar over words with frequencies of Zipf."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.batch import Batch
from regard.tasks.words import Vocabulary

__all__ = ["Lexicon"]

#: Kinds of words: how many, whether they are function words, and whether they stand for something alive.
KINDS = {
    "det": (8, True, False),
    "prep": (12, True, False),
    "conj": (6, True, False),
    "stop": (2, True, False),
    "adj": (72, False, False),
    "animate": (100, False, True),
    "thing": (100, False, False),
    "verb-animate": (60, False, False),
    "verb-thing": (40, False, False),
}

#: The grammar as a chain over states: (kind it writes, [(next state, probability)]). Verbs go with their subject.
GRAMMAR: dict[str, tuple[str, tuple[tuple[str, float], ...]]] = {
    "det1": ("det", (("adj-a", 0.25), ("adj-t", 0.15), ("subject-a", 0.36), ("subject-t", 0.24))),
    "adj-a": ("adj", (("subject-a", 1.0),)),
    "adj-t": ("adj", (("subject-t", 1.0),)),
    "subject-a": ("animate", (("verb-a", 1.0),)),
    "subject-t": ("thing", (("verb-t", 1.0),)),
    "verb-a": ("verb-animate", (("det2", 0.7), ("prep", 0.2), ("stop", 0.1))),
    "verb-t": ("verb-thing", (("det2", 0.4), ("prep", 0.4), ("stop", 0.2))),
    "det2": ("det", (("adj2", 0.3), ("object-a", 0.3), ("object-t", 0.4))),
    "adj2": ("adj", (("object-a", 0.4), ("object-t", 0.6))),
    "object-a": ("animate", (("prep", 0.2), ("conj", 0.2), ("stop", 0.6))),
    "object-t": ("thing", (("prep", 0.2), ("conj", 0.2), ("stop", 0.6))),
    "prep": ("prep", (("det2", 1.0),)),
    "conj": ("conj", (("det1", 1.0),)),
    "stop": ("stop", (("det1", 1.0),)),
}


@dataclass(frozen=True)
class Lexicon:
    """``<bos>`` and sentences, one after the other, of 400 words.

    States follow each other by `GRAMMAR` and each writes a word of its kind; the n-th word of a kind has probability
    proportional to ``1 / n``. A function word, a content word and whether a noun is animate can be read off the kind.

    Args:
        length: tokens, the first one included.
    """

    length: int = 48

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words, kind by kind."""
        return Vocabulary.of(f"{kind}{n}" for kind, (count, _, _) in KINDS.items() for n in range(count))

    @cached_property
    def kind(self) -> Int[Tensor, "vocab"]:
        """The number of each id's kind; -1 for the first two."""
        return torch.cat([torch.tensor([-1, -1]), *(torch.full((n,), i) for i, (n, _, _) in enumerate(KINDS.values()))])

    @property
    def function(self) -> Bool[Tensor, "vocab"]:
        """Whether an id is a function word."""
        return torch.tensor([False, *(f for _, f, _ in KINDS.values())])[self.kind.clamp(min=-1) + 1]

    @property
    def animate(self) -> Bool[Tensor, "vocab"]:
        """Whether an id is an animate noun."""
        return torch.tensor([False, *(a for _, _, a in KINDS.values())])[self.kind.clamp(min=-1) + 1]

    @cached_property
    def within(self) -> Float[Tensor, "vocab"]:
        """p(word | its kind); 0 for the first two ids."""
        parts = [torch.zeros(2, dtype=torch.float64)]
        for count, _, _ in KINDS.values():
            weight = 1 / torch.arange(1, count + 1, dtype=torch.float64)
            parts.append(weight / weight.sum())
        return torch.cat(parts)

    @cached_property
    def _chain(self) -> tuple[Tensor, Tensor, Tensor]:
        """p(state | state) [n, n], p(first state) [n], and the kind that each state writes [n]."""
        states, kinds = list(GRAMMAR), list(KINDS)
        step = torch.zeros(len(states), len(states), dtype=torch.float64)
        for i, (_, following) in enumerate(GRAMMAR.values()):
            for name, p in following:
                step[i, states.index(name)] = p
        first = torch.zeros(len(states), dtype=torch.float64)
        first[states.index("det1")] = 1
        return step, first, torch.tensor([kinds.index(kind) for kind, _ in GRAMMAR.values()])

    @cached_property
    def frequency(self) -> Float[Tensor, "vocab"]:
        """The share of each word in endless text, from the chain's stationary distribution; 0 for the first two ids."""
        step, _, writes = self._chain
        n = len(step)
        # pi (step - 1) = 0 and sum pi = 1.
        system = torch.cat([(step - torch.eye(n, dtype=step.dtype)).T, torch.ones(1, n, dtype=step.dtype)])
        state = torch.linalg.lstsq(system, torch.eye(n + 1, dtype=step.dtype)[:, -1:], driver="gelsd").solution[:, 0]
        of_kind = torch.zeros(len(KINDS), dtype=state.dtype).index_add_(0, writes, state)
        return torch.where(self.kind >= 0, of_kind[self.kind], 0) * self.within

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n stretches of text drawn with the generator."""
        step, first, writes = self._chain
        table = torch.stack([self.within * (self.kind == k) for k in range(len(KINDS))]).float()
        state = first.argmax().expand(n)
        words = []
        for _ in range(self.length - 1):
            words.append(torch.multinomial(table[writes[state]], 1, generator=generator))
            state = torch.multinomial(step[state].float(), 1, generator=generator)[:, 0]
        ids = torch.cat([torch.full((n, 1), self.vocabulary.BOS), *words], dim=1)
        return Batch(ids, ids)

    def log_likelihood(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n"]:
        """log p(words) in nats, over all ways through the grammar (forward algorithm); -inf for what it never says."""
        step, first, writes = self._chain
        alpha = first.expand(len(ids), -1)
        total = torch.zeros(len(ids), dtype=torch.float64)
        for word in ids[:, 1:].unbind(1):
            seen = alpha * (writes[None] == self.kind[word][:, None]) * self.within[word][:, None]
            p = seen.sum(1, keepdim=True)
            total += p.log()[:, 0]
            alpha = (seen / torch.where(p > 0, p, 1)) @ step
        return total
