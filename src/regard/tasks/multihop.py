"""Two chains of facts: the answer lies two hops away, in documents whose order is the experiment's to choose."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

BOS, ASK, FIRST_ENTITY = 0, 1, 2
CHAIN = 2  # facts in a chain


@dataclass(frozen=True)
class TwoChains:
    """Facts ``a b`` of two tokens, among them the chains a-b-c and a'-b'-c'; asked ``a``, the answer is ``c``.

    A sequence is BOS, the documents, ASK, a, c. Every other document is a lone fact of two further entities. Within a
    sequence all entities differ; b is the only one, with b', that is said twice. The second chain is what makes it a
    two-hop question: "the fact whose head was said before" fits two documents, of which one is right (`shortcut`).

    Gold documents are those of the first chain, in the order of the chain. ``order`` says where they stand:

    - ``"mixed"``: all documents in random order;
    - ``"forward"``, ``"backward"``: random places, the gold ones among them in the order of the chain or against it;
    - ``"forward_i"`` (i = 0, 1, ...): the last documents, in the order of the chain with i others in between.

    Groups: ``bos``, ``document_0`` .. (by place in the sequence), ``gold`` (both gold documents), ``question``.
    Spans: ``first``, ``second`` (the gold documents), ``answer``. From Masking in Multi-hop QA, arXiv 2505.11754.

    Args:
        entities: how many there are to draw from.
        docs: documents of a sequence, at least the 4 of the two chains.
        order: as above.
    """

    entities: int = 24
    docs: int = 6
    order: str = "mixed"

    def __post_init__(self) -> None:
        if not isinstance(self.docs, int) or self.docs < 2 * CHAIN:
            raise ValueError(f"docs must be at least 4, the facts of two chains, got {self.docs!r}")
        if self.entities < self.used:
            raise ValueError(f"entities must be at least {self.used} for {self.docs} documents, got {self.entities}")
        if self.order not in ("mixed", "forward", "backward") and not re.fullmatch(r"forward_\d+", self.order):
            raise ValueError(f"order must be 'mixed', 'forward', 'backward' or 'forward_i', got {self.order!r}")
        if self.gap is not None and self.gap > self.docs - CHAIN:
            raise ValueError(
                f"order {self.order!r} puts {self.gap} documents between the gold ones; "
                f"of {self.docs} only {self.docs - CHAIN} are others"
            )

    @property
    def used(self) -> int:
        """Entities of a sequence: three a chain, two a lone fact."""
        return 6 + 2 * (self.docs - 4)

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return FIRST_ENTITY + self.entities

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return 3 + 2 * self.docs

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + 1

    @property
    def chance(self) -> float:
        """Accuracy of naming any entity of the context."""
        return 1 / self.used

    @property
    def shortcut(self) -> float:
        """Accuracy of naming the end of either chain, which needs no question."""
        return 0.5

    @property
    def gap(self) -> int | None:
        """The i of ``forward_i``."""
        return int(self.order.removeprefix("forward_")) if self.order.startswith("forward_") else None

    def facts(self, n: int, generator: torch.Generator) -> Int[Tensor, "n docs 2"]:
        """Facts of n sequences: the first chain's two, the second chain's two, the lone ones."""
        drawn = torch.rand(n, self.entities, generator=generator).argsort(1)[:, : self.used] + FIRST_ENTITY
        chains = drawn[:, [0, 1, 1, 2, 3, 4, 4, 5]]
        return torch.cat([chains, drawn[:, 6:]], dim=1).reshape(n, self.docs, 2)

    def places(self, n: int, generator: torch.Generator) -> Int[Tensor, "n docs"]:
        """Which fact stands at each place, for n sequences in the task's order."""
        if self.gap is None:
            at = torch.rand(n, self.docs, generator=generator).argsort(1)
            if self.order == "mixed":
                return at
            gold = at < CHAIN
            chain = torch.arange(CHAIN) if self.order == "forward" else torch.arange(CHAIN).flip(0)
            return at.masked_scatter(gold, chain.repeat(n))
        others = torch.rand(n, self.docs - CHAIN, generator=generator).argsort(1) + CHAIN
        head = others.shape[1] - self.gap
        gold = torch.arange(CHAIN).expand(n, CHAIN)
        return torch.cat([others[:, :head], gold[:, :1], others[:, head:], gold[:, 1:]], dim=1)

    def compose(self, facts: Int[Tensor, "n docs 2"], places: Int[Tensor, "n docs"]) -> Batch:
        """Sequences of these facts in this order."""
        n = len(facts)
        told = facts.gather(1, places[..., None].expand(-1, -1, 2)).flatten(1)
        bos, ask = (torch.full((n, 1), token) for token in (BOS, ASK))
        ids = torch.cat([bos, told, ask, facts[:, 0, :1], facts[:, 1, 1:]], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        start = 1 + 2 * (places[..., None] == torch.arange(CHAIN)).long().argmax(1)  # [n, 2]
        spans = {name: torch.stack([start[:, i], start[:, i] + 2], 1) for i, name in enumerate(("first", "second"))}
        spans["answer"] = torch.tensor([self.prompt, self.length]).expand(n, 2)
        at = torch.arange(self.length).expand(n, -1)
        groups = {"bos": at == 0}
        groups |= {name: (at - 1) // 2 == i for i, name in enumerate(self.documents)}
        gold = [(at >= s[:, :1]) & (at < s[:, 1:]) for s in (spans["first"], spans["second"])]
        groups["gold"] = gold[0] | gold[1]
        groups["question"] = (at >= self.prompt - 2) & (at < self.prompt)
        return Batch(ids, labels, spans, groups)

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents' groups, by place."""
        return tuple(f"document_{i}" for i in range(self.docs))

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        return self.compose(self.facts(n, generator), self.places(n, generator))

    def solve(self, prompt: Tensor) -> int | None:
        """The answer to a prompt ``[length]`` that ends before it, from the prompt alone; None where it is not said."""
        *told, _, asked = prompt[1:].tolist()
        said = dict(zip(told[::2], told[1::2], strict=True))
        between = said.get(asked)
        return None if between is None else said.get(between)

    def without(self, batch: Batch, document: str, generator: torch.Generator) -> Batch:
        """The same sequences with a gold document ("first" or "second") in new entities: the answer is not told.

        Raises:
            ValueError: document is neither, or no two entities are left to write with.
        """
        if document not in ("first", "second"):
            raise ValueError(f"document must be 'first' or 'second', got {document!r}")
        ids = batch.input_ids.clone()
        if self.entities - self.used < 2:
            raise ValueError(f"entities must be at least {self.used + 2} to leave two unused, got {self.entities}")
        free = torch.rand(len(ids), self.vocab, generator=generator).scatter_(1, ids, -1.0)
        free[:, :FIRST_ENTITY] = -1.0
        new = free.topk(2, dim=1).indices
        place = batch.spans[document][:, :1] + torch.arange(2)
        return Batch(ids.scatter_(1, place, new), batch.labels, batch.spans, batch.groups, batch.valid)
