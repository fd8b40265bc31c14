"""RoleDocuments: words whose register depends on how large a body speaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.tasks.batch import Batch
from regard.tasks.words import Vocabulary

__all__ = ["RoleDocuments"]


@dataclass(frozen=True)
class RoleDocuments:
    """``<bos> role`` and words; the role has a level g in 1..5 and a topic of its own.

    A word is of register s with probability proportional to ``exp(-(s - g)^2 / 2)``; within a register it is one of the
    topic's own words with probability ``topical``, else any. Roles are named ``role0`` ..., fifteen a level, and one
    more, ``nobody``, that draws a level for every document, so that documents without a known role exist.

    Args:
        words: a document's words.
        registers: levels and registers.
        roles: a level.
        each: words in a register.
        topic: words of each register that a topic prefers.
        topical: how often it is one of these.
        seed: of the topics.
    """

    words: int = 24
    registers: int = 5
    roles: int = 15
    each: int = 40
    topic: int = 4
    topical: float = 0.3
    seed: int = 4321

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Roles, ``nobody``, and the words of each register."""
        roles = (f"role{n}" for n in range(self.registers * self.roles))
        words = (f"r{s + 1}w{n}" for s in range(self.registers) for n in range(self.each))
        return Vocabulary.of(roles, ("nobody",), words)

    @property
    def n_roles(self) -> int:
        """Roles that have a level."""
        return self.registers * self.roles

    def level(self, role: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """1 to 5, from the role's number."""
        return role // self.roles + 1

    @cached_property
    def of_register(self) -> Float[Tensor, "levels registers"]:
        """p(register | level)."""
        s = torch.arange(self.registers, dtype=torch.float64)
        weight = torch.exp(-((s[None] - s[:, None]) ** 2) / 2)
        return weight / weight.sum(1, keepdim=True)

    @cached_property
    def of_topic(self) -> Float[Tensor, "topics registers each"]:
        """p(word | register, topic); the last topic is that of ``nobody``, which prefers nothing."""
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.full((self.n_roles + 1, self.registers, self.each), 1 / self.each, dtype=torch.float64)
        own = torch.rand(self.n_roles, self.registers, self.each, generator=generator).argsort(-1) < self.topic
        table[:-1] = (1 - self.topical) * table[:-1] + self.topical * own / self.topic
        return table

    def word_probabilities(self, role: Int[Tensor, "n"], level: Int[Tensor, "n"]) -> Float[Tensor, "n words"]:
        """p(word | role, level) over all words of all registers, [n, registers * each]."""
        return (self.of_register[level - 1][..., None] * self.of_topic[role]).flatten(1)

    def batch(self, n: int, generator: torch.Generator, role: Int[Tensor, "n"] | None = None) -> Batch:
        """n documents; ``role``: the number of each one's role (``n_roles`` is ``nobody``), drawn if None."""
        drawn = torch.randint(self.n_roles + 1, (n,), generator=generator)
        role = drawn if role is None else role
        level = self._levels(role, generator)
        p = self.word_probabilities(role, level).float()
        words = torch.multinomial(p, self.words, replacement=True, generator=generator)
        v = self.vocabulary
        ids = torch.cat([torch.full((n, 1), v.BOS), (v["role0"] + role)[:, None], v["r1w0"] + words], dim=1)
        return Batch(ids, ids, {"words": torch.tensor([[2, 2 + self.words]]).expand(n, 2)})

    def _levels(self, role: Tensor, generator: torch.Generator) -> Tensor:
        free = torch.randint(1, self.registers + 1, role.shape, generator=generator)
        return torch.where(role == self.n_roles, free, self.level(role))

    def log_likelihood(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n"]:
        """log p(words | role token), nats a document; over the levels where the role is ``nobody``."""
        v = self.vocabulary
        role, words = ids[:, 1] - v["role0"], ids[:, 2:] - v["r1w0"]
        found = []
        for level in range(1, self.registers + 1):
            p = self.word_probabilities(role, torch.full_like(role, level))
            found.append(p.gather(1, words).log().sum(1))
        every = torch.stack(found, dim=1)
        own = every.gather(1, (self.level(role).clamp(max=self.registers) - 1)[:, None])[:, 0]
        nobody = every.logsumexp(1) - torch.tensor(float(self.registers)).log()
        return torch.where(role == self.n_roles, nobody, own)

    def judge(self, words: Int[Tensor, "n words"]) -> Float[Tensor, "n"]:
        """The exact posterior mean of the level from the words alone (ids), all roles and ``nobody`` equally likely.

        Words that are none of a register's are left out.
        """
        levels = torch.arange(1, self.registers + 1, dtype=torch.float64)
        return self._with_level(words).softmax(1) @ levels

    def log_marginal(self, words: Int[Tensor, "n words"]) -> Float[Tensor, "n"]:
        """log p(words), nats a row: what the generator says at all, all roles and ``nobody`` equally likely.

        Raises:
            ValueError: a word that is none of a register's.
        """
        at = words - self.vocabulary["r1w0"]
        if bool(((at < 0) | (at >= self.registers * self.each)).any()):
            raise ValueError("words must be ids of the registers' words")
        return self._with_level(words).logsumexp(1)

    def _with_level(self, words: Tensor) -> Tensor:
        """log p(words, level), [n, levels]; words that are none of a register's are left out."""
        first = self.vocabulary["r1w0"]
        at = words - first
        there = (at >= 0) & (at < self.registers * self.each)
        at = at.clamp(0, self.registers * self.each - 1)
        by_level = []
        for level in range(1, self.registers + 1):
            roles = torch.cat(
                [torch.arange((level - 1) * self.roles, level * self.roles), torch.tensor([self.n_roles])]
            )
            p = self.word_probabilities(roles, torch.full_like(roles, level)).log()
            prior = torch.full((len(roles),), 1 / (self.n_roles + 1), dtype=torch.float64)
            prior[-1] /= self.registers
            by_level.append(((p.T[at] * there[..., None]).sum(1) + prior.log()).logsumexp(1))
        return torch.stack(by_level, 1)
