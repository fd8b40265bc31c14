"""Scores that fall in a straight line with distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.layers.position import Position

__all__ = ["Alibi"]


class Alibi(Position):
    """``bias_ij = -slope |i - j|``: the weight of a key decays by ``e^-slope`` for every token of distance.

    Attention with linear biases (Press et al., arXiv 2108.12409); with one head the decay mask of arXiv 2502.01951.

    Args:
        slopes: one a head, or one for all heads; each at least 0.
    """

    slopes: Tensor

    def __init__(self, slopes: float | int | Sequence[float | int]) -> None:
        super().__init__()
        values = torch.as_tensor(slopes, dtype=torch.float64).reshape(-1)
        if not len(values) or not bool((values >= 0).all()):
            raise ValueError(f"slopes must be one or more numbers >= 0, got {slopes!r}")
        self.register_buffer("slopes", values, persistent=False)

    @staticmethod
    def geometric(heads: int) -> Alibi:
        """The paper's slopes for a power of two of heads: ``2^(-8 h / heads)``, h = 1..heads."""
        if heads < 1 or heads & (heads - 1):
            raise ValueError(f"heads must be a power of two, got {heads}; give the slopes yourself for others")
        return Alibi([2 ** (-8 * h / heads) for h in range(1, heads + 1)])

    def bias(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        pos_q: Int[Tensor, "q_len"],
        pos_k: Int[Tensor, "kv_len"],
    ) -> Float[Tensor, "1 one_or_heads q_len kv_len"]:
        """``[1, heads or 1, q_len, kv_len]``, in the dtype that scores are summed in.

        Raises:
            ValueError: there are neither one slope nor as many as heads.
        """
        if len(self.slopes) not in (1, q.shape[1]):
            raise ValueError(f"slopes must be 1 or {q.shape[1]}, one a head, got {len(self.slopes)}")
        distance = (pos_q[:, None] - pos_k).abs().to(self.slopes.dtype)
        bias = -self.slopes[:, None, None] * distance
        return bias[None].to(torch.promote_types(q.dtype, torch.float32))

    def extra_repr(self) -> str:
        """The slopes."""
        return ", ".join(f"{s:g}" for s in self.slopes.tolist())
