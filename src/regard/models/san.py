"""A self-attention network: one head a layer and nothing between the layers, to see what depth does to positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.layers.multihead import MultiHead
from regard.layers.position import Position
from regard.patterns import Causal, Pattern

__all__ = ["SAN"]

CAUSAL = Causal()


class SAN(nn.Module):
    """``x <- A(x) x W_v`` a layer, then a ReLU network on the last vector (arXiv 2502.01951).

    ``A = softmax(x W_q (x W_k)^T / sqrt(dim) + bias)`` under a pattern, no output projection, no norm, no MLP between
    layers; no residual unless asked for, as residual connections break the monotone drift the paper proves.

    Args:
        dim: of the vectors, and of the single head.
        outputs: labels.
        depth: attention layers.
        pattern: of every layer; None: every pair.
        position: makes the position plug of the layers (`Alibi`, `Rope`); None: none.
        residual: ``x <- x + A x W_v``.
        mlp: ReLU layers before the last linear one.
        backend: of `attend`; sequences of the paper's 17 vectors are fastest on the dense one.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        depth: int,
        *,
        pattern: Pattern | None = CAUSAL,
        position: Callable[[], Position] | None = None,
        residual: bool = False,
        mlp: int = 3,
        backend: str = "reference",
    ) -> None:
        super().__init__()
        for name, value, least in (("outputs", outputs, 1), ("depth", depth, 1), ("mlp", mlp, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.pattern, self.residual = pattern, residual
        self.layers = nn.ModuleList(
            MultiHead(dim, 1, pattern=pattern, position=None if position is None else position(), backend=backend)
            for _ in range(depth)
        )
        for layer in self.layers:
            layer.o_proj = cast(nn.Linear, nn.Identity())
        hidden = [part for _ in range(mlp) for part in (nn.Linear(dim, dim), nn.ReLU())]
        self.head = nn.Sequential(*hidden, nn.Linear(dim, outputs))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch outputs"]:
        """Logits, from the last vector."""
        for layer in self.layers:
            update = layer(x)
            x = x + update if self.residual else update
        return self.head(x[:, -1])

    @torch.no_grad()
    def rollout(
        self, x: Float[Tensor, "batch length dim"], residual: float | int = 0.0
    ) -> Float[Tensor, "depth batch length length"]:
        """``P_t = A_t .. A_0``: the share of input j in vector i after t + 1 layers, a product of t + 1 matrices.

        The product is carried along as the values of each layer's attention.

        Args:
            x: as for the network.
            residual: ``P <- residual P + (1 - residual) A P``, in [0, 1].
        """
        if not 0 <= residual <= 1:
            raise ValueError(f"residual must be in [0, 1], got {residual}")
        batch, length = x.shape[:2]
        at = torch.arange(length, device=x.device)
        share = torch.eye(length, dtype=x.dtype, device=x.device).expand(batch, 1, length, length)
        found = []
        for layer in cast(list[MultiHead], self.layers):
            q, k = layer.q_proj(x)[:, None], layer.k_proj(x)[:, None]
            bias = None
            if layer.position is not None:
                q, k = layer.position.rotate(q, k, at, at)
                bias = layer.position.bias(q, at, at)
            moved = cast(Tensor, attend(q, k, share, self.pattern, q_start=0, bias=bias, backend=layer.backend))
            share = residual * share + (1 - residual) * moved
            found.append(share[:, 0])
            update = layer(x)
            x = x + update if self.residual else update
        return torch.stack(found)
