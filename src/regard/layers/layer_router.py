"""A router for each layer that decides, per input, between full and sparse attention (Flux Attention, 2604.07394)."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.kernels.combine import gate
from regard.kernels.rotary import unrotate
from regard.patterns import Full, Pattern, Route, Routed, Sinks, Summary, Window
from regard.patterns.decided import both
from regard.patterns.pattern import resolve_q_start

__all__ = ["LayerRouter", "temperature"]

FULL, SPARSE = 0, 1


class LayerRouter(nn.Module, Route):
    """One decision a sample for all heads of a layer: every key, or the ``sparse`` pattern (sinks and a window).

    The feature is the mean, over heads and over the first and the last ``pooled`` tokens of context and question, of
    the queries before rotation (a token that lies in both stretches counts twice). An MLP
    ``d -> 8d -> 2d -> 4d -> d -> 2`` with SiLU gives the logits (full, sparse); it starts at full, its last weights 0
    and its bias ``(4.5, 0)``.

    Inference: ``argmax`` of the logits, no noise, decided from the prompt; attached by `regard.attend_with` it is
    decided once a sequence and kept while decoding, so a layer that was found sparse needs sinks and window alone from
    then on. Training: `sample` draws a hard gate with a soft gradient, and `mixed` is attention under it; see
    `regard.steer.layer_gates` for whole models.

    Args:
        head_dim: d, of the queries.
        sparse: the other choice; None: 128 sinks and a window of 1,024 keys.
        pooled: tokens at each end.
        inv_freq: radians a position of the model's rotation (`regard.kernels.rotary`), which is undone for the feature;
            None: queries come without one.
        interleaved: how that rotation pairs dimensions.
        within: what may meet at all.

    Raises:
        ValueError: a number below 1, more frequencies than pairs, or what is no pattern.
    """

    inv_freq: Tensor | None

    def __init__(
        self,
        head_dim: int,
        sparse: Pattern | None = None,
        *,
        pooled: int = 100,
        inv_freq: Float[Tensor, "pairs"] | None = None,
        interleaved: bool = False,
        within: Pattern | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"head_dim": head_dim, "pooled": pooled}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        sparse = Sinks(128) | Window(1024, 0) if sparse is None else sparse
        if not isinstance(sparse, Pattern) or sparse.heads is not None or sparse.samples is not None:
            raise ValueError(f"sparse must be a Pattern alike for all heads and samples, got {sparse!r}")
        if inv_freq is not None and 2 * len(inv_freq) > head_dim:
            raise ValueError(f"inv_freq must be at most head_dim / 2 = {head_dim // 2} numbers, got {len(inv_freq)}")
        self.block, self.heads, self.within = (1, 1), "all", within
        self.patterns, self.pooled, self.interleaved = (Full(), sparse), pooled, interleaved
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        d = head_dim
        self.encoder = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
        last = nn.Linear(d, 2)
        self.decide = nn.Sequential(nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), last)
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([4.5, 0.0]))
        self._keeps = False
        self._kept: Tensor | None = None

    # -- the decision

    def features(
        self, q: Float[Tensor, "batch heads q_len {self.head_dim}"], asked: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch {self.head_dim}"]:
        """The pooled queries of each sample.

        Args:
            q: of tokens from position 0 on, rotated where ``inv_freq`` says so.
            asked: how many tokens context and question have in each sample; what follows is the answer and is never
                pooled. None: all.

        Raises:
            ValueError: asked not in 1..q_len.
        """
        length = q.shape[2]
        end = torch.full((len(q),), length, device=q.device) if asked is None else asked.to(q.device)
        if len(q) and not 1 <= int(end.min()) <= int(end.max()) <= length:
            raise ValueError(f"asked must be in 1..{length}, got {int(end.min())}..{int(end.max())}")
        at = torch.arange(length, device=q.device)
        if self.inv_freq is not None:
            q = unrotate(q, at, self.inv_freq, interleaved=self.interleaved)
        inside = at < end[:, None]
        counts = (inside & (at < self.pooled)).to(q) + (inside & (at >= end[:, None] - self.pooled)).to(q)
        return torch.einsum("bhnd,bn->bd", q, counts / counts.sum(1, keepdim=True)) / q.shape[1]

    def logits(
        self, q: Float[Tensor, "batch heads q_len {self.head_dim}"], asked: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch 2"]:
        """Of full and of sparse."""
        weight: Any = self.decide[0].weight
        return self.decide(self.encoder(self.features(q, asked).to(weight.dtype)))

    def sample(
        self, logits: Float[Tensor, "batch 2"], tau: float | int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch"]:
        """``z``: 1 full, 0 sparse. ``softmax((logits + Gumbel) / tau)``, hard forward, the gradient of the soft one.

        Raises:
            ValueError: tau is not above 0.
        """
        if not tau > 0:
            raise ValueError(f"tau must be above 0, got {tau}")
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device if generator is None else None)
        gumbel = -torch.log(-torch.log(uniform.to(logits).clamp(1e-20, 1 - 1e-7)))
        soft = ((logits + gumbel) / tau).softmax(-1)[:, FULL]
        return (soft > 0.5).to(soft) + (soft - soft.detach())

    def mixed(
        self,
        z: Float[Tensor, "batch"],
        q: Float[Tensor, "batch heads q_len {self.head_dim}"],
        k: Float[Tensor, "batch kv_heads kv_len {self.head_dim}"],
        v: Float[Tensor, "batch kv_heads kv_len v_dim"],
        *,
        within: Pattern | None = None,
        **how: Any,
    ) -> Float[Tensor, "batch heads q_len v_dim"]:
        """``z full + (1 - z) sparse``, both computed: what training differentiates. ``how`` goes to `attend`."""
        within = both(self.within, within)
        outs = [cast(Tensor, attend(q, k, v, both(within, pattern), **how)) for pattern in self.patterns]
        share = z[:, None, None]
        return gate(outs, [share, 1 - share])

    # -- as a route

    def fresh(self) -> LayerRouter:
        """With the same weights, and a memory for the decision of one sequence."""
        twin = copy.copy(self)
        twin._keeps, twin._kept = True, None
        return twin

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """Nothing but the length: keys decide nothing."""
        return Summary(k.shape[2] + (0 if past is None else past.length), {})

    @torch.no_grad()
    def select(
        self,
        q: Float[Tensor, "batch heads q_len {self.head_dim}"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """`Routed.choose` of full and sparse.

        Raises:
            ValueError: for queries that do not start the sequence, where nothing was decided from its prompt.
        """
        start = resolve_q_start(q.shape[2], summary.length, q_start)
        which = self._kept if self._keeps and start > 0 else None
        if which is None:
            if start > 0:
                raise ValueError(
                    f"q_start must be 0 where a layer is decided, from the prompt, got {start}; `fresh()` keeps a "
                    "decision for the tokens that follow, as `regard.attend_with` does"
                )
            which = self.logits(q).argmax(-1)[:, None]
            self._kept = which if self._keeps else None
        return Routed.choose(
            self.patterns, which, q_len=q.shape[2], kv_len=summary.length, q_start=start,
            within=both(self.within, within), heads=q.shape[1], cost=self.cost(q.shape[2], summary.length, q.shape[3]),
        )  # fmt: skip

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """Pooling: ``2 pooled head_dim``. The MLP, ``35 head_dim^2``, is once a sequence for all heads; it is counted
        for each."""
        return 2 * self.pooled * head_dim + sum(
            m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear)
        )

    def forward(self, q: Tensor, k: Tensor, *, within: Pattern | None = None, q_start: int | None = None) -> Routed:
        """``select(q, summarize(k))``."""
        return self.select(q, self.summarize(k), within=within, q_start=q_start)

    @property
    def head_dim(self) -> int:
        """Of the queries."""
        first: Any = self.encoder[0]
        return first.in_features

    def extra_repr(self) -> str:
        """Choice and pooling."""
        return f"sparse={self.patterns[SPARSE]}, pooled={self.pooled}"


def temperature(
    step: int, steps: int, start: float | int = 1.5, end: float | int = 1.0, share: float | int = 0.6
) -> float:
    """tau of a step: from ``start`` to ``end`` by half a cosine over the first ``share`` of the steps, then ``end``."""
    if steps < 1 or not 0 < share <= 1:
        raise ValueError(f"steps must be at least 1 and share in (0, 1], got {steps} and {share}")
    done = min(step / (share * steps), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
