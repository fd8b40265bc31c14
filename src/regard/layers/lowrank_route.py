"""A learned low-rank guess of the weights that says which keys each query needs (Sparsifiner, arXiv 2303.13755)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.patterns import Pattern, Queries, Route, Routed, Summary, candidates, topk
from regard.patterns.decided import both
from regard.patterns.pattern import resolve_q_start

__all__ = ["LowRankRoute"]


class LowRankRoute(nn.Module, Route):
    """``A = softmax(s (W_q q) (W_k k)^T E) U^T``, of rank r, guesses the weights; each query keeps its best keys.

    With N tokens, ``c = width`` and ``r = rank``: W_q and W_k are head_dim x c with a bias, E and U are N x r and
    shared by the heads, ``s = c^-1/2`` (the released code has ``heads^-1/2``). `predict` gives A as it is learned from
    dense weights, by `regard.train.objectives.weights_mse`. `select` cuts it short: of a query's r coefficients its
    ``coefficients`` largest, of |U| what is above ``threshold``, and of the result the ``ceil(share N)`` largest (ties
    to the earlier key). What is cut off has no gradient, so one distils with `predict` first. Queries of the ``prefix``
    meet every key, and get no guess. N is part of E and U, so a call has exactly N queries and keys, without a cache.

    Args:
        head_dim: of queries and keys.
        length: N, prefix included.
        prefix: tokens before the first patch (1: a class token).
        share: of the N keys that a query keeps.
        width: c; None: ``head_dim // 2``.
        rank: r; None: ``N // 6``.
        coefficients: kept of each query's; None: all.
        threshold: of |U|; 0 keeps all.
        within: what may meet at all; what may not is no candidate.
        generator: draws E and U; the projections are drawn as PyTorch does.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        head_dim: int,
        length: int,
        *,
        prefix: int = 1,
        share: float | int = 0.25,
        width: int | None = None,
        rank: int | None = None,
        coefficients: int | None = 8,
        threshold: float | int = 0.02,
        within: Pattern | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        width = max(head_dim // 2, 1) if width is None else width
        rank = max(length // 6, 1) if rank is None else rank
        least = {"head_dim": head_dim, "length": length, "width": width, "rank": rank, "coefficients": coefficients}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= prefix < length:
            raise ValueError(f"prefix must be in 0..{length - 1}, got {prefix}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if threshold < 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self.block, self.heads, self.within = (1, 1), "each", within
        self.length, self.prefix, self.keep = length, prefix, math.ceil(share * length - 1e-9)
        self.coefficients = rank if coefficients is None else min(coefficients, rank)
        self.threshold = float(threshold)
        self.q_proj, self.k_proj = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.mix, self.basis = (nn.Parameter(torch.empty(length, rank)) for _ in range(2))
        for weight in (self.mix, self.basis):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)

    # -- guessing

    def predict(
        self, q: Float[Tensor, "batch heads length head_dim"], k: Float[Tensor, "batch kv_heads length head_dim"]
    ) -> Float[Tensor, "batch heads rows length"]:
        """A of the queries after the prefix, ``rows = length - prefix``; differentiable, nothing cut off."""
        return self._coefficients(q, self.summarize(k)) @ self.basis.T.to(q.dtype)

    def _coefficients(self, q: Tensor, summary: Summary) -> Tensor:
        """``softmax(s (W_q q) (W_k k)^T E)``, [batch, heads, rows, rank]."""
        if q.shape[2] != self.length:
            raise ValueError(f"q must have the {self.length} tokens of the route, got {q.shape[2]}")
        mixed = summary["mixed"]  # [batch, kv_heads, width, rank]
        heads = q.shape[1]
        if heads % mixed.shape[1]:
            raise ValueError(f"k must have a divisor of the {heads} heads of q, got {mixed.shape[1]}")
        guess = self.q_proj(q[:, :, self.prefix :]) @ mixed.repeat_interleave(heads // mixed.shape[1], 1)
        return (guess * mixed.shape[2] ** -0.5).softmax(-1)

    # -- deciding

    @property
    def appends(self) -> bool:
        """False: the length is fixed."""
        return False

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``mixed``: ``(W_k k)^T E``, [batch, kv_heads, width, rank].

        Raises:
            ValueError: another length than the route's, so also keys that follow others.
        """
        if past is not None:
            raise ValueError(f"past must be None: the route is made for {self.length} tokens at once")
        if k.shape[2] != self.length:
            raise ValueError(f"k must have the {self.length} tokens of the route, got {k.shape[2]}")
        return Summary(k.shape[2], {"mixed": self.k_proj(k).mT @ self.mix.to(k.dtype)})

    @torch.no_grad()
    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """The best keys of each query, and every key of the prefix's queries."""
        coefficients = self._coefficients(q, summary)
        start, within = resolve_q_start(q.shape[2], summary.length, q_start), both(self.within, within)
        if start:
            raise ValueError(f"q_start must be 0 for a route of all {self.length} tokens, got {start}")
        most = coefficients.topk(self.coefficients, -1)
        coefficients = torch.zeros_like(coefficients).scatter_(-1, most.indices, most.values)
        basis = self.basis.abs().to(q.dtype)
        basis = torch.where(basis > self.threshold, basis, 0)
        guess = nn.functional.pad(coefficients @ basis.T, (0, 0, self.prefix, 0))
        may = candidates(within, self.length, self.length, 1, q_start=0, decisions=q.shape[1], device=q.device)
        may = may.expand(*guess.shape).clone()
        may[:, :, : self.prefix] = False  # `keep` has them
        index, count = topk(self.keep)(guess.masked_fill(~may, -torch.inf))
        return Routed.tokens(
            index, count, q_len=self.length, kv_len=self.length, q_start=0, within=within,
            keep=Queries(((0, self.prefix),)) if self.prefix else None, check=False,
            cost=self.cost(self.length, self.length, q.shape[3]),
        )  # fmt: skip

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """``N c (2 head_dim + 2 r) + coefficients N^2``: projections, low-rank products, the sparse one with U."""
        width, rank = self.q_proj.out_features, self.basis.shape[1]
        return (q_len + kv_len) * width * (head_dim + rank) + self.coefficients * q_len * kv_len

    def forward(self, q: Tensor, k: Tensor, *, within: Pattern | None = None, q_start: int | None = None) -> Routed:
        """``select(q, summarize(k))``."""
        return self.select(q, self.summarize(k), within=within, q_start=q_start)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"length={self.length}, prefix={self.prefix}, keep={self.keep}, rank={self.basis.shape[1]}"
