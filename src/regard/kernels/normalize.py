"""How a row of scores becomes a row of weights: softmax, or any function of each score.

A `Normalizer` is an immutable value and says its tier, which is what a kernel must be able to do for it:

- ``fused``: any attention kernel has it;
- ``tiles``: one pass over tiles with two sums a row, ``sum phi v`` and ``sum phi``;
- ``rows``: whole rows of scores at once, which the dense backend alone has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["PHI", "Elementwise", "Normalizer", "Softmax"]

Tier = Literal["fused", "tiles", "rows"]

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "elu1": lambda s: F.elu(s) + 1,
    "taylor2": lambda s: 1 + s + s * s / 2,
    "identity": lambda s: s,
}
_SIGNED = ("identity",)


class Normalizer(ABC):
    """Scores to weights. ``weights`` is the definition; kernels may get there in tiles."""

    tier: Tier

    @abstractmethod
    def weights(
        self,
        scores: Float[Tensor, "*rows kv_len"],
        allow: Bool[Tensor, "*rows kv_len"],
        n: Int[Tensor, "*rows 1"] | None = None,
    ) -> tuple[Float[Tensor, "*rows kv_len"], Float[Tensor, "*rows"] | None]:
        """Weights of whole rows and the log of what they were divided by (None where there is no such thing).

        ``allow``: the pairs that may meet, any other weight is 0. ``n``: how many keys the query may see, where it is
        not the number of True in the row of ``allow``. A row without weight: zeros and -inf.
        """

    def has_lse(self) -> bool:
        """Whether rows have a log-sum, by which attentions over disjoint keys merge."""
        return True


@dataclass(frozen=True)
class Softmax(Normalizer):
    """``P_j = exp(s_j - lse)``, ``lse = log sum_j exp(s_j)`` over the allowed keys."""

    tier = "fused"

    def weights(
        self,
        scores: Float[Tensor, "*rows kv_len"],
        allow: Bool[Tensor, "*rows kv_len"],
        n: Int[Tensor, "*rows 1"] | None = None,
    ) -> tuple[Float[Tensor, "*rows kv_len"], Float[Tensor, "*rows"] | None]:
        """Weights and lse; gradients are finite in rows without a key too."""
        scores = scores.masked_fill(~allow, -torch.inf)
        if scores.shape[-1] == 0:
            return scores, scores.new_full(scores.shape[:-1], -torch.inf)
        some = (scores.detach() != -torch.inf).any(-1, keepdim=True)
        scores = torch.where(some, scores, 0)  # a row of -inf has no gradient; it is replaced, and set back below
        lse = torch.logsumexp(scores, -1, keepdim=True)
        weights = torch.where(some, (scores - lse).exp(), 0)
        return weights, torch.where(some, lse, -torch.inf)[..., 0]


@dataclass(frozen=True)
class Elementwise(Normalizer):
    """``P_j = phi(s_j - shift)`` over the allowed keys, divided by the row's sum with ``l1``.

    Args:
        phi: "exp", "softplus", "sigmoid", "relu", "elu1" (``elu(s) + 1``), "taylor2" (``1 + s + s^2 / 2``) or
            "identity".
        shift: a number, or "log_n": the log of how many keys the query may see (pairs whose bias is -inf are not
            seen).
        l1: divide by the row's sum; a row whose sum is 0 gives zeros.

    The lse of a row is the log of its sum, so attentions over disjoint keys merge as those of the softmax do. There is
    none without ``l1`` (the outputs simply add) nor for "identity" (a sum may be negative).
    """

    phi: str
    shift: float | int | str = 0.0
    l1: bool = True
    tier = "tiles"

    def __post_init__(self) -> None:
        if self.phi not in PHI:
            raise ValueError(f"phi must be one of {', '.join(PHI)}, got {self.phi!r}")
        number = isinstance(self.shift, (int, float)) and not isinstance(self.shift, bool)
        if not (self.shift == "log_n" or (number and math.isfinite(float(self.shift)))):
            raise ValueError(f'shift must be a finite number or "log_n", got {self.shift!r}')

    def __call__(self, scores: Tensor, allow: Tensor, shift: Tensor | float) -> Tensor:
        """``phi(scores - shift)``, 0 where not allowed; gradients never meet what is not allowed."""
        return torch.where(allow, PHI[self.phi](torch.where(allow, scores - shift, 0)), 0)

    def shift_of(self, n: Tensor, dtype: torch.dtype) -> Tensor | float:
        """The shift of rows whose queries see ``n`` keys each."""
        return n.to(dtype).clamp(min=1).log() if self.shift == "log_n" else float(self.shift)

    def weights(
        self,
        scores: Float[Tensor, "*rows kv_len"],
        allow: Bool[Tensor, "*rows kv_len"],
        n: Int[Tensor, "*rows 1"] | None = None,
    ) -> tuple[Float[Tensor, "*rows kv_len"], Float[Tensor, "*rows"] | None]:
        """Weights and the log of the row's sum (None if there is none)."""
        allow = allow & (scores.detach() != -torch.inf)
        n = allow.sum(-1, keepdim=True) if n is None else n
        values = self(scores, allow, self.shift_of(n, scores.dtype))
        if not self.l1:
            return values, None
        total = values.sum(-1, keepdim=True)
        there = total.detach() != 0
        safe = torch.where(there, total, 1)
        weights = torch.where(there, values / safe, 0)
        if not self.has_lse():
            return weights, None
        return weights, torch.where(there, safe.log(), -torch.inf)[..., 0]

    def has_lse(self) -> bool:
        """Only with ``l1`` and a phi that is never negative."""
        return self.l1 and self.phi not in _SIGNED
