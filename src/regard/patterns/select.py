"""Which blocks a row of scores selects, and what blocks are represented by.

A select takes scores ``[..., columns]``, -inf for what is no candidate, and gives ``(index, count)``: int32 columns
``[..., width]``, ascending, -1 after the ``count[...]`` that are selected. Ties go to the lower index. No gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.patterns.order import Order

__all__ = ["Select", "above", "mass", "pool_blocks", "ratio", "three_way", "to_index", "topk"]

#: Numbers that a piece of work holds at a time: four megabytes of float32.
_CACHED = 1 << 20


class Select(ABC):
    """From scores to what is selected. A value: two with the same numbers are equal."""

    @abstractmethod
    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected; `scores` has no NaN and no gradient here."""

    def __call__(
        self, scores: Float[Tensor, "*rows columns"]
    ) -> tuple[Int[Tensor, "*rows width"], Int[Tensor, "*rows"]]:
        """``(index, count)``.

        Raises:
            ValueError: for NaN in the scores, naming the first.
        """
        return to_index(self.mask(checked(scores)))


def checked(scores: Tensor) -> Tensor:
    """Without gradient.

    Raises:
        ValueError: for NaN and +inf.
    """
    scores = scores.detach()
    if not scores.numel() or scores.amax() < torch.inf:  # false for NaN too
        return scores
    for what, wrong in (("NaN", scores.isnan()), ("+inf", scores == torch.inf)):
        if bool(wrong.any()):
            raise ValueError(
                f"scores must be numbers, or -inf for what is no candidate; got {what} at {wrong.nonzero()[0].tolist()}"
            )
    return scores


def to_index(mask: Bool[Tensor, "*rows columns"]) -> tuple[Int[Tensor, "*rows width"], Int[Tensor, "*rows"]]:
    """``(index, count)`` of what a mask selects."""
    count = mask.sum(-1, dtype=torch.int32)
    width = int(count.max()) if count.numel() else 0
    found = mask.reshape(-1).nonzero()[:, 0].remainder_(max(mask.shape[-1], 1)).to(torch.int32)
    if found.numel() == width * count.numel():  # as many in each row
        return found.view(*mask.shape[:-1], width), count
    index = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int32, device=mask.device)
    index[torch.arange(width, device=mask.device) < count[..., None]] = found
    return index, count


def pieces(rows: int, per_row: int) -> list[slice]:
    """Slices of ``rows`` rows of ``per_row`` numbers each that stay in a cache."""
    step = max(1, _CACHED // max(1, per_row))
    return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]


def join_rows(index: Sequence[Int[Tensor, "*rows _ _"]]) -> Int[Tensor, "*rows q_len width"]:
    """Indices of consecutive rows as one, -1 after those of rows that select fewer."""
    width = max(part.shape[-1] for part in index)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=-1) for part in index], -2)


def best(scores: Tensor, k: Tensor | int) -> Tensor:
    """The k highest candidates of each row (``k``: a number, or one for each row ``[..., 1]``); lower index first."""
    if not scores.numel():
        return scores != -torch.inf
    if isinstance(k, int):
        if k >= scores.shape[-1]:
            return scores != -torch.inf
        least = _kth_highest(scores, k)
        reached = scores >= least
        if bool((least == -torch.inf).any()):
            reached &= scores != -torch.inf
        if int(reached.sum(-1, dtype=torch.int32).max()) <= k:  # nothing is tied with the last
            return reached
        over = scores > least
        tied = reached & ~over
        return over | (tied & (tied.cumsum(-1) <= k - over.sum(-1, keepdim=True)))
    place = scores.sort(stable=True, dim=-1, descending=True).indices
    rank = torch.empty_like(place).scatter_(-1, place, torch.arange(scores.shape[-1], device=k.device).expand_as(place))
    return (rank < k) & (scores != -torch.inf)


def _kth_highest(scores: Tensor, k: int) -> Tensor:
    """``[..., 1]``: the k-th highest of each row, k below the number of columns."""
    n = scores.shape[-1]
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return torch.from_numpy(np.partition(scores.numpy(), n - k, axis=-1)[..., n - k : n - k + 1])  # 7 x as fast as topk


def _share(name: str, value: float | int, least: float | int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise ValueError(f"{name} must lie in [{least}, 1], got {value!r}")


@dataclass(frozen=True)
class topk(Select):
    """The k highest candidates, all where there are no more."""

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"k must be an integer >= 1, got {self.k!r}")

    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected."""
        return best(scores, self.k)


@dataclass(frozen=True)
class ratio(Select):
    """The ``max(1, floor(r n))`` highest of the n candidates of the row."""

    r: float | int

    def __post_init__(self) -> None:
        _share("r", self.r)

    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected."""
        return best(scores, _part(scores, self.r).clamp(min=1))


def _part(scores: Tensor, share: float | int) -> Tensor:
    """``floor(share n)`` for the n candidates of each row; a product within 1e-9 of an integer is that integer."""
    n = (scores != -torch.inf).sum(-1, keepdim=True)
    return (n.double() * share + 1e-9).floor().long()


@dataclass(frozen=True)
class mass(Select):
    """The fewest highest candidates whose softmax weights sum to more than p: the one that crosses p is selected too.

    ``#(cumsum of the sorted weights <= p) + 1`` of them, at least ``at_least``, as far as there are candidates. Scores
    are taken as they are: scale them before.
    """

    p: float | int
    at_least: int = 1

    def __post_init__(self) -> None:
        _share("p", self.p)
        if not isinstance(self.at_least, int) or isinstance(self.at_least, bool) or self.at_least < 1:
            raise ValueError(f"at_least must be an integer >= 1, got {self.at_least!r}")

    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected."""
        some = (scores != -torch.inf).any(-1, keepdim=True)
        weights = torch.where(some, scores, 0).softmax(-1)
        summed = weights.sort(stable=True, dim=-1, descending=True).values.cumsum(-1)
        k = ((summed <= self.p).sum(-1, keepdim=True) + 1).clamp(min=self.at_least)
        return best(scores, k)


@dataclass(frozen=True)
class above(Select):
    """Every candidate whose score is greater than t."""

    t: float | int

    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected."""
        return (scores > self.t) & (scores != -torch.inf)


@dataclass(frozen=True)
class three_way(Select):
    """Three classes of the n candidates of each row: critical, marginal, negligible (SLA, arXiv 2509.24006).

    Critical are the ``max(1, floor(kh n))`` highest, negligible the ``floor(kl n)`` lowest of the others, marginal what
    is between. As a select it gives the class ``part``: ``three_way(.05, .1)`` the critical ones,
    ``three_way(.05, .1).marginal`` and ``.negligible`` the others.
    """

    kh: float | int
    kl: float | int
    part: int = 1

    def __post_init__(self) -> None:
        _share("kh", self.kh)
        _share("kl", self.kl)
        if self.part not in (-1, 0, 1):
            raise ValueError(f"part must be 1 (critical), 0 (marginal) or -1 (negligible), got {self.part!r}")

    @property
    def marginal(self) -> three_way:
        """The select of the marginal ones."""
        return three_way(self.kh, self.kl, 0)

    @property
    def negligible(self) -> three_way:
        """The select of the negligible ones."""
        return three_way(self.kh, self.kl, -1)

    def classes(self, scores: Float[Tensor, "*rows columns"]) -> Int[Tensor, "*rows columns"]:
        """int8: 1 critical, 0 marginal, -1 negligible; -2 what is no candidate."""
        scores = checked(scores)
        n = (scores != -torch.inf).sum(-1, keepdim=True)
        high = _part(scores, self.kh).clamp(min=1)
        critical, rest = best(scores, high), best(scores, torch.maximum(n - _part(scores, self.kl), high))
        found = torch.where(critical, 1, torch.where(rest, 0, -1))
        return torch.where(scores == -torch.inf, -2, found).to(torch.int8)

    def mask(self, scores: Float[Tensor, "*rows columns"]) -> Bool[Tensor, "*rows columns"]:
        """What is selected."""
        return self.classes(scores) == self.part


def pool_blocks(
    x: Float[Tensor, "batch heads length dim"], size: int, *, order: Order | None = None
) -> Float[Tensor, "batch heads blocks dim"]:
    """The mean of each block of ``size`` tokens, over its real ones: the last block may be short, an order has padding.

    In float32 (float64 stays); a block without a token is zeros. ``order``: blocks of the tokens in this order.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")
    x = x if x.dtype == torch.float64 else x.float()
    real = torch.ones(x.shape[2], device=x.device, dtype=x.dtype)
    if order is not None:
        x, real = order.apply(x), (order.forward >= 0).to(x)
    short = -x.shape[2] % size
    if short:
        x, real = (torch.nn.functional.pad(t, (0, 0) * (t.ndim > 1) + (0, short)) for t in (x, real))
    sums = x.unflatten(2, (-1, size)).sum(3)
    return sums / real.view(-1, size).sum(1).clamp(min=1)[:, None]
