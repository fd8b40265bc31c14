"""A decoder without MLPs: the smallest model that learns to copy what came after an earlier occurrence."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.patterns import Causal

__all__ = ["AttentionOnly"]


class AttentionBlock(nn.Module):
    """``x + attention(norm(x))``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attention = MultiHead(dim, heads, position=Rope(dim // heads), pattern=Causal())

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """The block."""
        return x + self.attention(self.norm1(x))


class AttentionOnly(nn.Module):
    """Token ids to logits: embedding, causal attention with rotary positions in each block, norm, a linear head.

    Weights are drawn with the global generator.
    """

    def __init__(self, vocab: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(AttentionBlock(dim, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, 1e-6)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Logits of every position."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
