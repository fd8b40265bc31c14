"""ContextMaps: which of a few fixed maps is meant, to be read from examples in the context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.words import Vocabulary

__all__ = ["ContextMaps"]

#: The two templates: what stands between x and y, and after y.
TEMPLATES = (("->", ";"), (":", "/"))
OPTIONS = 4


@dataclass(frozen=True)
class ContextMaps:
    """``<bos> (x -> y ;) * shots x ->`` and y, where y = f(x) and f is one of a few fixed permutations of the symbols.

    The examples say which map is meant: without any, the best guess is one in ``maps`` (less where maps agree). With
    ``options`` the sequence begins with ``one of o1 o2 o3 o4 .``, the right answer among them in a random place. Every
    y is asked for; ``spans["answer"]`` is the last one.

    Args:
        shots: examples before the question.
        template: 0 or 1, which signs are used; None draws one a sequence.
        options: whether options are listed; None: in half of the sequences, drawn for the batch as a whole.
        symbols, maps: how many.
        among: only the first so many maps are drawn (lessons begin with few); None: all.
        seed: of the maps.
    """

    shots: int = 5
    template: int | None = None
    options: bool | None = None
    symbols: int = 32
    maps: int = 8
    among: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.shots < self.symbols:
            raise ValueError(f"shots must be in 0..{self.symbols - 1}, got {self.shots}")
        if self.template not in (None, 0, 1):
            raise ValueError(f"template must be 0, 1 or None, got {self.template!r}")
        if self.among is not None and not 1 <= self.among <= self.maps:
            raise ValueError(f"among must be in 1..{self.maps} or None, got {self.among}")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The symbols, then the signs."""
        signs = (sign for template in TEMPLATES for sign in template)
        return Vocabulary.of((f"s{n}" for n in range(self.symbols)), signs, ("one-of", "."))

    @cached_property
    def table(self) -> Int[Tensor, "maps symbols"]:
        """``f(x)`` of every map."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack([torch.randperm(self.symbols, generator=generator) for _ in range(self.maps)])

    def batch(
        self,
        n: int,
        generator: torch.Generator,
        which: Int[Tensor, "n"] | None = None,
        inputs: Int[Tensor, "some"] | None = None,
    ) -> Batch:
        """n sequences drawn with the generator.

        Args:
            n: how many.
            generator: of everything drawn.
            which: the map of each sequence; None: drawn.
            inputs: the symbols that x may be, at least ``shots + 1`` different ones; None: all.
        """
        words, count = self.vocabulary, self.shots + 1
        drawn = torch.randint(self.among or self.maps, (n,), generator=generator)
        which = drawn if which is None else which
        x = torch.rand(n, self.symbols if inputs is None else len(inputs), generator=generator).argsort(1)[:, :count]
        if inputs is not None:
            if len(inputs) < count:
                raise ValueError(f"inputs must hold at least {count} symbols, got {len(inputs)}")
            x = inputs[x]
        y = self.table[which].gather(1, x)
        template = torch.randint(2, (n,), generator=generator)
        template = template if self.template is None else torch.full_like(template, self.template)
        signs = torch.tensor([words.ids(pair) for pair in TEMPLATES])[template]
        first = words["s0"]
        arrow, stop = (signs[:, i : i + 1].expand(-1, count) for i in (0, 1))
        body = torch.stack([x + first, arrow, y + first, stop], dim=-1).flatten(1)[:, :-1]
        asked = torch.zeros_like(body, dtype=torch.bool)
        asked[:, 2::4] = True
        begin = torch.full((n, 1), words.BOS)
        with_options = bool(torch.rand((), generator=generator) < 0.5) if self.options is None else self.options
        if with_options:
            others = torch.rand(n, self.symbols, generator=generator).scatter(1, y[:, -1:], 2.0).argsort(1)
            chosen = torch.cat([y[:, -1:], others[:, : OPTIONS - 1]], dim=1)
            place = torch.rand(n, OPTIONS, generator=generator).argsort(1)
            listed = chosen.gather(1, place) + first
            begin = torch.cat(
                [begin, torch.full((n, 1), words["one-of"]), listed, torch.full((n, 1), words["."])], dim=1
            )
        ids = torch.cat([begin, body], dim=1)
        asked = torch.cat([torch.zeros_like(begin, dtype=torch.bool), asked], dim=1)
        length = ids.shape[1]
        spans = {"answer": torch.tensor([[length - 1, length]]).expand(n, 2)}
        if with_options:
            spans["options"] = torch.tensor([[2, 2 + OPTIONS]]).expand(n, 2)
        return Batch(ids, ids.masked_fill(~asked, IGNORED), spans)

    def solve(self, prompt: Int[Tensor, "length"]) -> set[int]:
        """The ids that may follow a prompt: f(x) for every map that agrees with the examples, among the options."""
        words, first = self.vocabulary, self.vocabulary["s0"]
        ids = prompt.tolist()[1:]
        allowed = set(range(first, first + self.symbols))
        if ids[0] == words["one-of"]:
            allowed = set(ids[1 : 1 + OPTIONS])
            ids = ids[2 + OPTIONS :]
        pairs = [(ids[i] - first, ids[i + 2] - first) for i in range(0, len(ids) - 2, 4)]
        fitting = [f for f in self.table.tolist() if all(f[x] == y for x, y in pairs)]
        return {first + f[ids[-2] - first] for f in fitting} & allowed
