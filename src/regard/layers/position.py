"""Positions in attention: what rotates queries and keys, or adds to scores."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.rotary import inverse_frequencies, rotate

__all__ = ["Position", "Rope"]


class Position(nn.Module):
    """Base of the position plugs of `MultiHead`; the identity.

    ``rotate`` sees queries and keys with their positions before the scores, ``bias`` gives what is added to the scaled
    scores (None: nothing).
    """

    def rotate(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        k: Float[Tensor, "batch kv_heads kv_len head_dim"],
        pos_q: Int[Tensor, "q_len"],
        pos_k: Int[Tensor, "kv_len"],
    ) -> tuple[Float[Tensor, "batch heads q_len head_dim"], Float[Tensor, "batch kv_heads kv_len head_dim"]]:
        """Queries and keys, rotated."""
        return q, k

    def bias(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        pos_q: Int[Tensor, "q_len"],
        pos_k: Int[Tensor, "kv_len"],
    ) -> Float[Tensor, "..."] | None:
        """What is added to the scores, broadcastable to ``[batch, heads, q_len, kv_len]``."""
        return None


class Rope(Position):
    """Rotary position embedding (arXiv 2104.09864), pairing dimension i with i + head_dim / 2 as Llama does.

    Pair i of a vector at position p turns by the angle ``p * theta^(-2i / head_dim)``, so that scores depend on
    distances alone. Angles are computed in float32, or float64 for float64 vectors.

    Args:
        head_dim: even.
        theta: base of the wavelengths, the longest being about ``2 pi theta``.

    Raises:
        ValueError: head_dim is odd or below 2, or theta is not above 0.
    """

    def __init__(self, head_dim: int, theta: float | int = 10_000.0) -> None:
        super().__init__()
        inverse_frequencies(head_dim, theta, device="meta")  # what does not fit is refused here
        self.head_dim, self.theta = head_dim, float(theta)

    def rotate(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        k: Float[Tensor, "batch kv_heads kv_len head_dim"],
        pos_q: Int[Tensor, "q_len"],
        pos_k: Int[Tensor, "kv_len"],
    ) -> tuple[Float[Tensor, "batch heads q_len head_dim"], Float[Tensor, "batch kv_heads kv_len head_dim"]]:
        """Each vector turned by its position.

        Raises:
            ValueError: q or k has another head_dim than the one this was made for.
        """
        for name, x in (("q", q), ("k", k)):
            if x.shape[-1] != self.head_dim:
                raise ValueError(f"{name} has head_dim {x.shape[-1]}, this Rope was made for {self.head_dim}")
        return self._turn(q, pos_q), self._turn(k, pos_k)

    @property
    def inv_freq(self) -> Float[Tensor, "pairs"]:
        """Radians a position of every pair, float32; `regard.kernels.rotary.rotate` turns by them."""
        return inverse_frequencies(self.head_dim, self.theta)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotate(x, positions, inverse_frequencies(self.head_dim, self.theta, dtype=dtype, device=x.device))

    def extra_repr(self) -> str:
        """Head dimension and base."""
        return f"{self.head_dim}, theta={self.theta:g}"
