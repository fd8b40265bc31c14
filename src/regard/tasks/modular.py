"""Sums modulo a number: of two numbers, split so that no sum is told by its mirror image, and of marked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

__all__ = ["ModAdd", "ModMarker"]

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ModAdd:
    """``a b = c`` with ``c = (a + b) mod p``: four tokens, the last of which is asked for.

    Ids ``0..p-1`` are the numbers, p is "=". A sum does not change when its terms trade places, so ``b + a`` in
    training tells ``a + b``: of ordered pairs split at random a share as large as training's is known by heart.
    Unordered pairs are split here, and both orders go where the pair goes. ``by="ordered"`` splits ordered pairs, for
    comparison with figures taken so.

    Args:
        p: modulus, at least 2.
        share: of the pairs, in training; both splits hold at least one pair.
        seed: of the split.
        by: what is split.
    """

    p: int = 23
    share: float = 0.6
    seed: int = 0
    by: Literal["unordered", "ordered"] = "unordered"

    def __post_init__(self) -> None:
        if self.p < 2:
            raise ValueError(f"p must be at least 2, got {self.p}")
        if self.by not in ("unordered", "ordered"):
            raise ValueError(f"by must be 'unordered' or 'ordered', got {self.by!r}")
        if not 0 < round(self.share * self._units) < self._units:
            raise ValueError(f"share must leave pairs in both splits of {self._units}, got {self.share}")

    @property
    def vocab(self) -> int:
        """Token ids in all."""
        return self.p + 1

    @property
    def _units(self) -> int:
        return self.p * (self.p + 1) // 2 if self.by == "unordered" else self.p**2

    def pairs(self, split: Split) -> Tensor:
        """Every ordered pair of a split, ``[pairs, 2]``."""
        _known(split)
        a, b = torch.meshgrid(torch.arange(self.p), torch.arange(self.p), indexing="ij")
        both = torch.stack([a.flatten(), b.flatten()], 1)
        low, high = both.min(1).values, both.max(1).values
        unit = high * (high + 1) // 2 + low if self.by == "unordered" else both[:, 0] * self.p + both[:, 1]
        order = torch.randperm(self._units, generator=torch.Generator().manual_seed(self.seed))
        trained = torch.zeros(self._units, dtype=torch.bool)
        trained[order[: round(self.share * self._units)]] = True
        return both[trained[unit] == (split == "train")]

    def whole(self, split: Split) -> Batch:
        """All of a split, each pair once."""
        return self._of(self.pairs(split))

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Batch:
        """n sequences of a split, drawn with repetition."""
        pairs = self.pairs(split)
        return self._of(pairs[torch.randint(len(pairs), (n,), generator=generator)])

    def solve(self, prompt: Tensor) -> int:
        """The answer to a prompt ``[3]``, from the prompt alone."""
        return int(prompt[:2].sum()) % self.p

    def _of(self, pairs: Tensor) -> Batch:
        equals = torch.full((len(pairs), 1), self.p)
        ids = torch.cat([pairs, equals, (pairs.sum(1, keepdim=True)) % self.p], 1)
        return _asked(ids, {})


@dataclass(frozen=True)
class ModMarker:
    """The sum of the marked values, modulo C: ``markers`` of the tokens are markers, each with a value after it.

    Ids ``0..modulus-1`` are the values, then come the marker, the question and ``fillers`` distractors. The question
    is the last of the ``length`` tokens shown; the answer comes after it. Two marked values never touch: between a
    value and the next marker stands at least one distractor. Places are uniform over the choices that fit, values
    uniform, so chance is ``1 / modulus``. Groups: ``markers``, ``values``.

    Distractors have ids of their own, so that one layer of attention can find the values; with ``decoys`` each is a
    value with probability one half, and only the token before tells a marked value from another.

    Args:
        modulus: C, at least 2.
        markers: marked values m, at least 1.
        length: tokens shown, question included.
        fillers: ids of distractors.
        decoys: whether distractors may look like values.
    """

    modulus: int = 5
    markers: int = 2
    length: int = 32
    fillers: int = 8
    decoys: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("modulus", self.modulus, 2),
            ("markers", self.markers, 1),
            ("fillers", self.fillers, 1),
            ("length", self.length, 3 * self.markers),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    @property
    def vocab(self) -> int:
        """Token ids in all."""
        return self.modulus + 2 + self.fillers

    @property
    def marker(self) -> int:
        """Id of the marker."""
        return self.modulus

    @property
    def question(self) -> int:
        """Id of the question."""
        return self.modulus + 1

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n sequences."""
        ids = torch.randint(self.modulus + 2, self.vocab, (n, self.length + 1), generator=generator)
        if self.decoys:
            value = torch.randint(self.modulus, ids.shape, generator=generator)
            ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, value, ids)
        # m of the places that are left when each marked value and the gap after it are folded into one, unfolded.
        free = self.length - 1 - 3 * self.markers + 1 + self.markers
        chosen = torch.rand(n, free, generator=generator).argsort(1)[:, : self.markers].sort(1).values
        at = chosen + 2 * torch.arange(self.markers)
        values = torch.randint(self.modulus, (n, self.markers), generator=generator)
        ids.scatter_(1, at, self.marker)
        ids.scatter_(1, at + 1, values)
        ids[:, -2], ids[:, -1] = self.question, values.sum(1) % self.modulus
        nothing = torch.zeros(n, self.length + 1, dtype=torch.bool)
        groups = {"markers": nothing.scatter(1, at, True), "values": nothing.scatter(1, at + 1, True)}
        return _asked(ids, groups)

    def solve(self, prompt: Tensor) -> int:
        """The answer to a prompt ``[length]``, from the prompt alone."""
        places = (prompt[:-1] == self.marker).nonzero().flatten()
        return int(prompt[places + 1].sum()) % self.modulus


def _asked(ids: Tensor, groups: dict[str, Tensor]) -> Batch:
    """A batch that asks for the last token."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    end = ids.shape[1]
    answer = torch.tensor([[end - 1, end]]).expand(len(ids), 2).contiguous()
    return Batch(ids, labels, {"answer": answer}, groups)


def _known(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
