"""NumberTasks: one number, a task asked about it, and maybe somebody's claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.words import Vocabulary

__all__ = ["NumberTasks"]

_PRIMES = {n for n in range(2, 100) if all(n % d for d in range(2, n))}

#: What each task says of a number.
TASKS: dict[str, Callable[[int], str]] = {
    "copy": str,
    "parity": lambda n: "odd" if n % 2 else "even",
    "at-least-50": lambda n: "yes" if n >= 50 else "no",
    "mod-3": lambda n: f"r{n % 3}",
    "prime": lambda n: "is-prime" if n in _PRIMES else "is-composite",
}
_LABELS = ("odd", "even", "yes", "no", "r0", "r1", "r2", "is-prime", "is-composite")


@dataclass(frozen=True)
class NumberTasks:
    """``<bos> n TASK`` and the label, n in 0..99; with a claim ``<bos> n TASK claim c`` and the label.

    A claim c is a label of the task, drawn at random. In training the answer after a claim is the right one in 60 % of
    sequences and c in the others. Spans: ``number`` and ``answer``.

    Args:
        task: one of "copy", "parity", "at-least-50", "mod-3", "prime"; None draws one a sequence.
        claim: whether a claim is made.
        right: share of sequences with a claim whose answer is the right one; the others echo the claim.
    """

    task: str | None = None
    claim: bool = False
    right: float = 0.6

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, or None, got {self.task!r}")
        if not 0 <= self.right <= 1:
            raise ValueError(f"right must be in [0, 1], got {self.right}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Numbers, tasks, labels and ``claim``."""
        return Vocabulary.of((str(n) for n in range(100)), TASKS, _LABELS, ("claim",))

    @cached_property
    def answers(self) -> Int[Tensor, "tasks 100"]:
        """The id of the right answer of every task for every number."""
        return torch.tensor([[self.vocabulary[says(n)] for n in range(100)] for says in TASKS.values()])

    def batch(self, n: int, generator: torch.Generator, numbers: Int[Tensor, "n"] | None = None) -> Batch:
        """n sequences drawn with the generator; ``numbers``: those of each, drawn if None."""
        words = self.vocabulary
        drawn = torch.randint(100, (n,), generator=generator)
        numbers = drawn if numbers is None else numbers
        task = torch.randint(len(TASKS), (n,), generator=generator)
        if self.task is not None:
            task = torch.full_like(task, list(TASKS).index(self.task))
        answer = self.answers[task, numbers]
        parts = [torch.full((n,), words.BOS), words["0"] + numbers, words["copy"] + task]
        if self.claim:
            claimed = self.answers[task, torch.randint(100, (n,), generator=generator)]
            honest = torch.rand(n, generator=generator) < self.right
            answer = torch.where(honest, answer, claimed)
            parts += [torch.full((n,), words["claim"]), claimed]
        ids = torch.stack([*parts, answer], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = answer
        last = ids.shape[1] - 1
        spans = {"number": (1, 2), "answer": (last, last + 1)}
        return Batch(ids, labels, {name: torch.tensor([span]).expand(n, 2) for name, span in spans.items()})

    def solve(self, prompt: Int[Tensor, "length"]) -> int:
        """The right answer of a prompt, whatever is claimed."""
        words = self.vocabulary
        return int(self.answers[int(prompt[2]) - words["copy"], int(prompt[1]) - words["0"]])
