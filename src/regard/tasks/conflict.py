"""Conflict: facts that a model remembers, and a context that says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.words import Vocabulary

__all__ = ["KINDS", "Conflict"]

#: What the context is: it says another object than memory, the same, there is none, or it is about another subject.
KINDS = ("conflict", "agree", "none", "other")


@dataclass(frozen=True)
class Conflict:
    """``<bos> context : s is o . question : s ?`` and the object of s.

    Every subject has one object that is the same in all sequences: a model can remember it. The answer is what the
    context says of the subject, or else what is remembered. In a chat the user's turn stands between ``<user>`` and
    ``<assistant>``, and may end with ``[IND]``. Sequences without a context are shorter and padded on the right.

    Spans: ``answer``, ``context`` (empty where there is none). Groups: ``user``, the words of the user's turn without
    role words, ``[IND]`` and ``<bos>``.

    Args:
        shares: of `KINDS` in a batch, drawn for each sequence.
        chat: with role words.
        indicator: with ``[IND]``; only in a chat.
        subjects, objects: how many.
        seed: of the facts.
    """

    shares: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    chat: bool = False
    indicator: bool = False
    subjects: int = 200
    objects: int = 50
    seed: int = 1234

    def __post_init__(self) -> None:
        if len(self.shares) != len(KINDS) or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shares must be {len(KINDS)} numbers >= 0, not all 0, got {self.shares!r}")
        if self.indicator and not self.chat:
            raise ValueError("indicator=True stands at the end of a user's turn: it needs chat=True")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Subjects, objects, and the words between."""
        things = (f"{kind}{n}" for kind, count in (("s", self.subjects), ("o", self.objects)) for n in range(count))
        return Vocabulary.of(things, ("context", ":", "is", ".", "question", "?"), ("<user>", "<assistant>", "[IND]"))

    @cached_property
    def facts(self) -> Int[Tensor, "subjects"]:
        """The number of the object of every subject."""
        return torch.randint(self.objects, (self.subjects,), generator=torch.Generator().manual_seed(self.seed))

    def batch(self, n: int, generator: torch.Generator, subject: Int[Tensor, "n"] | None = None) -> Batch:
        """n sequences drawn with the generator; ``subject``: that of each question, drawn if None."""
        drawn = torch.randint(self.subjects, (n,), generator=generator)
        subject = drawn if subject is None else subject
        kind = torch.multinomial(
            torch.tensor(self.shares, dtype=torch.float64), n, replacement=True, generator=generator
        )
        known = self.facts[subject]
        shift = torch.randint(1, self.objects, (n,), generator=generator)
        somebody = (subject + torch.randint(1, self.subjects, (n,), generator=generator)) % self.subjects
        said_of = torch.where(kind == KINDS.index("other"), somebody, subject)
        agrees = kind == KINDS.index("agree")
        said = torch.where(agrees, known, (known + shift) % self.objects)
        answer = torch.where(kind == KINDS.index("conflict"), said, known)
        return self.of(subject, said_of, said, answer, kind != KINDS.index("none"))

    def of(
        self,
        subject: Int[Tensor, "n"],
        said_of: Int[Tensor, "n"],
        said: Int[Tensor, "n"],
        answer: Int[Tensor, "n"],
        told: Tensor,
    ) -> Batch:
        """The batch of these questions; where `told`, the context says that `said_of` is `said`."""
        words, n = self.vocabulary, len(subject)
        s, o, about = words["s0"] + subject, words["o0"] + said, words["s0"] + said_of
        context: list[Tensor | str] = ["context", ":", about, "is", o, "."]
        rest: list[Tensor | str] = ["question", ":", s, "?"]
        before: list[Tensor | str] = ["<user>"] if self.chat else []
        after: list[Tensor | str] = ["[IND]"] if self.indicator else []
        after += ["<assistant>"] if self.chat else []

        def filled(parts: list[Tensor | str]) -> Tensor:
            return torch.stack([torch.full((n,), words[x]) if isinstance(x, str) else x for x in parts], dim=1)

        whole = filled(["<bos>", *before, *context, *rest, *after, words["o0"] + answer])
        short = filled(["<bos>", *before, *rest, *after, words["o0"] + answer])
        short = torch.nn.functional.pad(short, (0, len(context)), value=words.PAD)
        ids = torch.where(told[:, None], whole, short)
        length = torch.where(told, whole.shape[1], whole.shape[1] - len(context))
        ids = ids[:, : int(length.max())] if n else ids
        at = torch.arange(ids.shape[1])
        labels = ids.masked_fill(at != length[:, None] - 1, IGNORED)
        start = 1 + len(before)
        end = length - 1 - len(after)
        until = torch.where(told, start + len(context), start)
        spans = {
            "answer": torch.stack([length - 1, length], dim=1),
            "context": torch.stack([torch.full_like(until, start), until], dim=1),
        }
        user = (at >= start) & (at < end[:, None])
        return Batch(ids, labels, spans, {"user": user}, at < length[:, None])

    def solve(self, prompt: Int[Tensor, "length"]) -> int:
        """The id of what the context says of the subject asked about, or else of what is remembered."""
        words = self.vocabulary
        said = words.text(prompt).split()
        subject = said[said.index("question") + 2]
        if "context" in said:
            start = said.index("context")
            if said[start + 2] == subject:
                return words[said[start + 4]]
        return words["o0"] + int(self.facts[int(subject[1:])])
