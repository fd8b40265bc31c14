"""Two tasks for one model: who was given something, and which colour a listed object has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.words import Vocabulary

__all__ = ["ColouredObjects", "EveryColour", "IndirectObject", "vocabulary"]

NAMES, COLOURS, OBJECTS, PLACES = 24, 24, 24, 8
#: Longest sequence: a list of 20 objects, with what stands around it.
LONGEST = 80


def vocabulary() -> Vocabulary:
    """Names, colours, objects, places and a few words between them."""
    kinds = (("name", NAMES), ("colour", COLOURS), ("object", OBJECTS), ("place", PLACES))
    words = (f"{kind}{n}" for kind, count in kinds for n in range(count))
    return Vocabulary.of(words, ("and", "went", "to", ".", "gave", "it", ",", "?", ":", "so"))


def _several(n: int, kind: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different members of a kind a row."""
    return torch.rand(n, kind, generator=generator).argsort(1)[:, :count]


def _filled(ids: Tensor, lead: int, words: Vocabulary) -> Tensor:
    """With `lead` words of filler after the beginning, so that positions are not all the same."""
    begin = torch.full((len(ids), 1), words.BOS)
    return torch.cat([begin, torch.full((len(ids), lead), words["so"]), ids], dim=1)


@dataclass(frozen=True)
class IndirectObject:
    """``A and B went to P . B gave it to`` and A; A and B stand in either order (Wang et al., arXiv 2211.00593).

    Spans: ``io`` (A), ``s1`` and ``s2`` (B and its second mention), ``answer``. Labels ask for the answer alone.

    Args:
        lead: words of filler before; None draws their number for the batch, so that all positions are met.
    """

    lead: int | None = 0

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Shared with `ColouredObjects`."""
        return vocabulary()

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        names = _several(n, NAMES, 2, generator)
        swap = torch.rand(n, generator=generator) < 0.5
        return self.of(names[:, 0], names[:, 1], swap, _lead(self.lead, 12, generator), generator)

    def of(
        self,
        receiver: Int[Tensor, "n"],
        giver: Int[Tensor, "n"],
        swap: Tensor,
        lead: int,
        generator: torch.Generator,
    ) -> Batch:
        """The batch of these people; where `swap`, the giver is named first."""
        words, n = self.vocabulary, len(receiver)
        a, b = words["name0"] + receiver, words["name0"] + giver
        place = words["place0"] + torch.randint(PLACES, (n,), generator=generator)
        first, second = torch.where(swap, b, a), torch.where(swap, a, b)
        row: list[Tensor | str] = [first, "and", second, "went", "to", place, ".", b, "gave", "it", "to", a]
        ids = torch.stack([torch.full((n,), words[x]) if isinstance(x, str) else x for x in row], dim=1)
        start = 1 + lead
        where = torch.where(swap, 2, 0)[:, None] + torch.tensor([[start, start + 1]])
        other = torch.where(swap, 0, 2)[:, None] + torch.tensor([[start, start + 1]])
        spans = {"io": where, "s1": other, **_spans(n, start, {"s2": (7, 8), "answer": (11, 12)})}
        return _asked(_filled(ids, lead, words), spans)

    def solve(self, prompt: Int[Tensor, "length"]) -> int:
        """The name that was said once."""
        first = self.vocabulary["name0"]
        said = [i for i in prompt.tolist() if first <= i < first + NAMES]
        return next(i for i in said if said.count(i) == 1)

    def corrupted(self, batch: Batch) -> Batch:
        """The same sequences with the second mention of B made A: then B is who was given it."""
        return _exchanged(batch, "s2", "io", "s1")


@dataclass(frozen=True)
class ColouredObjects:
    """``c1 o1 , c2 o2 , ... ? o_q :`` and c_q, colours and objects all different.

    Spans: ``query`` (o_q), ``object`` and ``colour`` (its place in the list), ``other`` (the colour of another listed
    object) and ``answer``.

    Args:
        items: how many; a pair (least, most) draws one number for the batch.
        lead: as in `IndirectObject`.
    """

    items: int | tuple[int, int] = 3
    lead: int | None = 0

    def __post_init__(self) -> None:
        low, high = (self.items, self.items) if isinstance(self.items, int) else self.items
        if not 2 <= low <= high <= OBJECTS:
            raise ValueError(f"items must lie in 2..{OBJECTS}, got {self.items!r}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Shared with `IndirectObject`."""
        return vocabulary()

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator."""
        low, high = (self.items, self.items) if isinstance(self.items, int) else self.items
        count = int(torch.randint(low, high + 1, (), generator=generator))
        colours, objects = (_several(n, kind, count, generator) for kind in (COLOURS, OBJECTS))
        asked = _several(n, count, 2, generator)
        return self.of(colours, objects, asked, _lead(self.lead, 3 * count + 3, generator))

    def of(
        self,
        colours: Int[Tensor, "n items"],
        objects: Int[Tensor, "n items"],
        asked: Int[Tensor, "n 2"],
        lead: int,
    ) -> Batch:
        """The batch of these lists; ``asked`` is which item the question names, and another one."""
        words, (n, count) = self.vocabulary, colours.shape
        c, o = words["colour0"] + colours, words["object0"] + objects
        comma = torch.full_like(c, words[","])
        listed = torch.stack([c, o, comma], dim=-1).flatten(1)[:, :-1]
        pick = asked[:, :1]
        tail = [torch.full((n, 1), words["?"]), o.gather(1, pick), torch.full((n, 1), words[":"]), c.gather(1, pick)]
        ids = torch.cat([listed, *tail], dim=1)
        start = 1 + lead
        at = start + 3 * asked
        query = 3 * count
        spans = {
            "colour": torch.stack([at[:, 0], at[:, 0] + 1], 1),
            "object": torch.stack([at[:, 0] + 1, at[:, 0] + 2], 1),
            "other": torch.stack([at[:, 1], at[:, 1] + 1], 1),
            "other_object": torch.stack([at[:, 1] + 1, at[:, 1] + 2], 1),
            **_spans(n, start, {"query": (query, query + 1), "answer": (query + 2, query + 3)}),
        }
        return _asked(_filled(ids, lead, words), spans)

    def solve(self, prompt: Int[Tensor, "length"]) -> int:
        """The colour before the listed object that the question names."""
        ids = prompt.tolist()
        return ids[ids.index(ids[-2]) - 1]

    def corrupted(self, batch: Batch) -> Batch:
        """The same lists, with the question about another listed object."""
        return _exchanged(batch, "query", "other_object", None, answer="other")


@dataclass(frozen=True)
class EveryColour:
    """``c1 o1 , c2 o2 , ... ? o_a : c_a , o_b : c_b ...``, every listed object asked for once, in any order.

    A lesson before `ColouredObjects`: many questions a list. Without the ``sign`` the list is followed by
    ``o_a c_a o_b c_b ...``, so that the colour has to be found from the object itself.

    Args:
        items: as in `ColouredObjects`.
        sign: whether ``:`` stands between object and colour, and a comma after it.
    """

    items: int | tuple[int, int] = (4, 8)
    sign: bool = True

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Shared with `ColouredObjects`."""
        return vocabulary()

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences drawn with the generator; labels ask for every colour after the question mark."""
        words, (low, high) = self.vocabulary, (self.items, self.items) if isinstance(self.items, int) else self.items
        count = int(torch.randint(low, high + 1, (), generator=generator))
        c = words["colour0"] + _several(n, COLOURS, count, generator)
        o = words["object0"] + _several(n, OBJECTS, count, generator)
        comma, colon = torch.full_like(c, words[","]), torch.full_like(c, words[":"])
        listed = torch.stack([c, o, comma], dim=-1).flatten(1)[:, :-1]
        order = _several(n, count, count, generator)
        asked, told = o.gather(1, order), c.gather(1, order)
        row = [asked, colon, told, comma] if self.sign else [asked, told]
        questions = torch.stack(row, dim=-1).flatten(1)
        questions = questions[:, :-1] if self.sign else questions
        ids = _filled(torch.cat([listed, torch.full((n, 1), words["?"]), questions], dim=1), 0, words)
        labels = torch.full_like(ids, IGNORED)
        first, step = listed.shape[1] + 2 + (2 if self.sign else 1), len(row)
        labels[:, first::step] = ids[:, first::step]
        return Batch(ids, labels)

    def solve(self, prompt: Int[Tensor, "length"]) -> int:
        """The colour before the first mention of the object asked for last."""
        ids = prompt.tolist()
        asked = ids[-2] if self.sign else ids[-1]
        return ids[ids.index(asked) - 1]


def _lead(lead: int | None, length: int, generator: torch.Generator) -> int:
    if lead is not None:
        return lead
    return int(torch.randint(LONGEST - 1 - length + 1, (), generator=generator))


def _spans(n: int, start: int, spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([[start + a, start + b]]).expand(n, 2) for name, (a, b) in spans.items()}


def _asked(ids: Tensor, spans: dict[str, Tensor]) -> Batch:
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return Batch(ids, labels, spans)


def _exchanged(batch: Batch, at: str, source: str, answer_from: str | None, answer: str | None = None) -> Batch:
    """A copy in which the token of span `at` is that of `source`, and the answer that of the other span named."""
    ids = batch.input_ids.clone()
    place, new = (batch.spans[name][:, :1] for name in (at, source))
    told = batch.spans[answer or str(answer_from)][:, :1]
    ids.scatter_(1, place, batch.input_ids.gather(1, new))
    ids[:, -1:] = batch.input_ids.gather(1, told)
    labels = batch.labels.clone()
    labels[:, -1] = ids[:, -1]
    return Batch(ids, labels, batch.spans)
