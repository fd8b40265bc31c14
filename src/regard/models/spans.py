"""A span extractor: an encoder with arrow attention, and a head on the band of candidate spans (arXiv 2502.07286)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.layers.band import PlusAttention, band_valid, transpose_band
from regard.layers.logn import LogN
from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.models.decoder import Decoder
from regard.patterns import Arrow

__all__ = ["SpanExtractor", "SpanLayer"]

Attend = Callable[[PlusAttention, Tensor], Tensor]


class SpanLayer(nn.Module):
    """A BiSPA layer on a band of cells: embedding of the triangle, plus attention, norm, two 3 x 3 convolutions, norm.

    ``x = x + triangle; x = norm(x + plus(x)); x = norm(x + conv(gelu(conv(x))))``. Cells that are no pair of tokens
    count as zeros in the convolutions.

    Args:
        dim: of a cell, even.
        plus: False leaves the plus attention out.
        joined: see `PlusAttention`.
    """

    def __init__(self, dim: int, plus: bool = True, joined: str = "cell") -> None:
        super().__init__()
        self.triangle = nn.Embedding(2, dim)
        self.attention = PlusAttention(dim, joined=joined) if plus else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "batch n cells dim"],
        valid: Bool[Tensor, "#batch n cells"],
        attend: Attend | None = None,
    ) -> Float[Tensor, "batch n cells dim"]:
        """The cells after the layer; ``valid`` are the pairs of tokens, ``attend`` stands in for the plus attention."""
        cells = x.shape[2]
        x = x + self.triangle((torch.arange(cells, device=x.device) >= cells // 2).long())
        if self.attention is not None:
            x = x + (self.attention(x) if attend is None else attend(self.attention, x))
        x = self.norm1(x)
        return self.norm2(x + self._convolved(self.conv2, F.gelu(self._convolved(self.conv1, x, valid)), valid))

    @staticmethod
    def _convolved(convolution: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
        return convolution(x.masked_fill(~valid[..., None], 0).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SpanExtractor(nn.Module):
    """Logits for every candidate span: tokens i and j at most ``width`` apart, of each type.

    The encoder has ``layers`` layers of arrow attention (a window of ``width`` tokens on both sides, the first token
    global, its scores growing with the log of the length). Cell (i, j) starts as ``h_i^T U t_j + W [h_i; t_j]``, h and
    t two small networks on the encoder's output, and goes through two `SpanLayer`, with a residual around both.

    Args:
        vocab, types: token ids; types of spans.
        width: W; longer spans are lost.
        dim, layers, heads: of the encoder.
        ends: width of h and t.
        feature: of a cell, even.
        plus, joined: see `SpanLayer`.
        base: of `LogN`.
    """

    def __init__(
        self,
        vocab: int,
        types: int,
        width: int,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        ends: int = 100,
        feature: int = 32,
        plus: bool = True,
        joined: str = "cell",
        base: float | int = 512,
    ) -> None:
        super().__init__()

        def attention(_: int) -> nn.Module:
            return MultiHead(dim, heads, position=Rope(dim // heads), temper=LogN(base, queries=[(0, 1)]))

        self.width = width
        self.encoder = Decoder(vocab, dim, layers, heads, pattern=Arrow(width), attention=attention)
        self.first, self.last = (nn.Sequential(nn.Linear(dim, ends), nn.GELU()) for _ in range(2))
        self.bilinear = nn.Parameter(torch.randn(feature, ends + 1, ends + 1) / ends)
        self.linear1, self.linear2 = nn.Linear(ends, feature), nn.Linear(ends, feature, bias=False)
        self.layers = nn.ModuleList(SpanLayer(feature, plus, joined) for _ in range(2))
        self.out = nn.Linear(feature, types)

    def forward(self, ids: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n cells types"]:
        """Logits of the band's cells; -1e4 beside the square."""
        n, width = ids.shape[1], self.width
        x = self.encoder.hidden(ids)
        h, t = self.first(x), self.last(x)
        valid = band_valid(n, width, device=x.device)
        column = torch.arange(n, device=x.device)[:, None] + torch.arange(-width, width + 1, device=x.device)
        near = column.clamp(0, n - 1)
        one = torch.ones_like(h[..., :1])
        left = torch.einsum("bni,fij->bnfj", torch.cat([h, one], -1), self.bilinear)
        cells = torch.einsum("bnfj,bncj->bncf", left, torch.cat([t, one], -1)[:, near])
        cells = cells + self.linear1(h)[:, :, None] + self.linear2(t)[:, near]
        cells = cells.masked_fill(~valid[..., None], 0)
        y = cells
        for layer in cast(list[SpanLayer], self.layers):
            y = layer(y, valid)
        return self.out(y + cells).masked_fill(~valid[..., None], -1e4)

    @torch.no_grad()
    def extract(self, ids: Int[Tensor, "batch n"]) -> list[set[tuple[int, int, int]]]:
        """The spans (first, last, type) of each text whose two cells, (i, j) and (j, i), have a mean logit above 0."""
        logits = self(ids)
        mean = ((logits + transpose_band(logits)) / 2)[:, :, self.width :]
        found: list[set[tuple[int, int, int]]] = [set() for _ in range(len(ids))]
        for b, i, c, kind in (mean > 0).nonzero().tolist():
            if i + c < ids.shape[1]:
                found[b].add((i, i + c, kind))
        return found
