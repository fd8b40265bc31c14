"""Learning in context from pairs of vectors, and how much it matters where the right pair stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLACES = ("first", "middle", "last")


class Vectors(NamedTuple):
    """Sequences of vectors ``x [n, length, dim]`` and the label asked for ``[n]``."""

    x: Tensor
    label: Tensor


@dataclass(frozen=True)
class InContext:
    """Pairs (x, y), then a query x: name the label that its class has in the context (arXiv 2502.01951).

    A sequence is x_1 y_1 .. x_8 y_8 x_query, vectors all. Classes are Gaussian: ``x = (mu + noise eta) / sqrt(1 +
    noise^2)``, mu and eta of standard deviation ``std``; a class has one label, a label one vector. A sequence holds
    ``pairs / burst`` classes, each ``burst`` times, and asks for one of them. In `batch` the classes are those of the
    task, so a model may also learn them by heart; in `exchange` every sequence has classes of its own.

    Args:
        pairs: in a sequence.
        classes, labels: of the task; each class is given one of the labels.
        burst: copies of a class in a sequence; divides pairs.
        noise: within a class, as a share of the spread between classes.
        dim: of a vector.
        std: of every component of a mean; None: ``dim^-1/2``, vectors of length about 1. The authors' released code has
            ``1 / dim``.
        seed: of means, labels and label vectors.
    """

    pairs: int = 8
    classes: int = 2048
    labels: int = 32
    burst: int = 4
    noise: float = 0.75
    dim: int = 64
    std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.burst < 1 or self.pairs < 1 or self.pairs % self.burst:
            raise ValueError(f"burst must be at least 1 and divide pairs = {self.pairs}, got {self.burst}")
        if self.classes < self.present:
            raise ValueError(f"classes must be at least {self.present}, as a sequence holds, got {self.classes}")
        if self.labels < 2:
            raise ValueError(f"labels must be at least 2, got {self.labels}")
        if self.noise < 0 or (self.std is not None and not self.std > 0):
            raise ValueError(f"noise must be >= 0 and std above 0, got {self.noise} and {self.std}")

    @property
    def present(self) -> int:
        """Classes in a sequence."""
        return self.pairs // self.burst

    @property
    def length(self) -> int:
        """Vectors of a sequence."""
        return 2 * self.pairs + 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing a label."""
        return 1 / self.labels

    @property
    def spread(self) -> float:
        """Standard deviation of a component of a mean."""
        return self.dim**-0.5 if self.std is None else self.std

    @cached_property
    def _world(self) -> tuple[Tensor, Tensor, Tensor]:
        """Class means [classes, dim], class labels [classes], label vectors [labels, dim]."""
        generator = torch.Generator().manual_seed(self.seed)
        means = self._normal((self.classes, self.dim), generator)
        given = torch.randint(self.labels, (self.classes,), generator=generator)
        return means, given, self._normal((self.labels, self.dim), generator)

    @property
    def label_vectors(self) -> Float[Tensor, "labels dim"]:
        """The y of every label."""
        return self._world[2]

    def batch(self, n: int, generator: torch.Generator) -> Vectors:
        """n sequences of the task's classes; the query asks for a pair drawn uniformly."""
        means, given, _ = self._world
        chosen = _distinct(n, self.classes, self.present, generator)
        slot = _shuffled(torch.arange(self.present).repeat_interleave(self.burst).expand(n, -1), generator)
        asked = slot.gather(1, torch.randint(self.pairs, (n, 1), generator=generator))
        x = self._draw(means[chosen], slot, generator)
        query = self._draw(means[chosen], asked, generator)
        labels = given[chosen]
        return Vectors(self._compose(x, labels.gather(1, slot), query), labels.gather(1, asked)[:, 0])

    def exchange(self, n: int, a: str | int, b: str | int, generator: torch.Generator) -> tuple[Vectors, Vectors]:
        """The same n sequences twice: once with the right pair at a and the wrong one at b, once exchanged.

        Pairs a and b hold the very same x, of the class asked for; one has its label, the other the label of another
        class. Everything else, the query's noise too, is equal in both, and the further copies in the context say which
        label is right. Classes are new in every sequence.

        Args:
            n: sequences.
            a, b: places among the pairs: an index, "first", "middle" (``pairs / 2``) or "last".
            generator: of everything drawn.

        Raises:
            ValueError: a place outside the sequence, or both the same; fewer than two classes in a sequence.
        """
        a, b = self._place("a", a), self._place("b", b)
        if a == b:
            raise ValueError(f"a and b must differ, got {a} and {b}")
        if self.present < 2:
            raise ValueError(f"burst must leave two classes in {self.pairs} pairs, got {self.burst}")
        means = self._normal((n, self.present, self.dim), generator)
        labels = _distinct(n, self.labels, min(self.present, self.labels), generator)
        if self.present > self.labels:  # more classes than labels: the two at stake still have their own
            more = torch.randint(self.labels, (n, self.present - self.labels), generator=generator)
            labels = torch.cat([labels, more], 1)
        rest = torch.arange(self.present).repeat_interleave(self.burst).tolist()
        rest.remove(0)
        rest.remove(1)
        slot = torch.empty(n, self.pairs, dtype=torch.long)
        others = [p for p in range(self.pairs) if p not in (a, b)]
        slot[:, others] = _shuffled(torch.tensor(rest).expand(n, -1), generator)
        slot[:, a] = slot[:, b] = 0
        x = self._draw(means, slot, generator)
        x[:, b] = x[:, a]
        query = self._draw(means, torch.zeros(n, 1, dtype=torch.long), generator)
        found = []
        for wrong in (b, a):
            named = slot.clone()
            named[:, wrong] = 1
            found.append(Vectors(self._compose(x, labels.gather(1, named), query), labels[:, 0]))
        return found[0], found[1]

    def solve(self, x: Float[Tensor, "n length dim"]) -> Int[Tensor, "n"]:
        """The label whose x in the context agree most with the query: the largest sum of inner products."""
        vectors = self.label_vectors.to(x)
        named = (x[:, 1:-1:2, None] - vectors).square().sum(-1).argmin(-1)  # [n, pairs]
        agreement = (x[:, :-1:2] * x[:, -1:]).sum(-1)
        return torch.zeros(len(x), self.labels).to(x).scatter_add_(1, named, agreement).argmax(1)

    def _place(self, name: str, place: str | int) -> int:
        named = dict(zip(PLACES, (0, self.pairs // 2, self.pairs - 1), strict=True))
        at = named.get(place) if isinstance(place, str) else place
        if not isinstance(at, int) or not 0 <= at < self.pairs:
            raise ValueError(f"{name} must be an index in 0..{self.pairs - 1} or one of {PLACES}, got {place!r}")
        return at

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.spread * torch.randn(shape, generator=generator)

    def _draw(self, means: Tensor, slot: Tensor, generator: torch.Generator) -> Tensor:
        """An x for every slot: means [n, classes, dim], slot [n, m]."""
        mu = means.gather(1, slot[..., None].expand(-1, -1, self.dim))
        return (mu + self.noise * self._normal(tuple(mu.shape), generator)) / (1 + self.noise**2) ** 0.5

    def _compose(self, x: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        pairs = torch.stack([x, self.label_vectors[labels]], dim=2).flatten(1, 2)
        return torch.cat([pairs, query], dim=1)


def in_context_gap(
    predict: Callable[[Tensor], Tensor],
    task: InContext,
    a: str | int = "first",
    b: str | int = "middle",
    n: int = 1000,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n"]:
    """``[a right] - [b right]`` of every sequence of `InContext.exchange`: 1, 0 or -1; its mean is the gap.

    Positive where the model rather follows the pair at a. 0 for a model that cannot tell places apart.

    Args:
        predict: from x ``[n, length, dim]`` to labels ``[n]``.
        task, a, b, n, generator: see `InContext.exchange`; None: seed 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    first, second = task.exchange(n, a, b, generator)
    with torch.no_grad():
        right = [(predict(v.x).cpu() == v.label).double() for v in (first, second)]
    return right[0] - right[1]


def _distinct(n: int, among: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices below `among` for each of n rows."""
    return torch.rand(n, among, generator=generator).topk(count, dim=1).indices


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each row in an order of its own."""
    return values.gather(1, torch.rand(values.shape, generator=generator).argsort(1))
