"""Inside `F.multi_head_attention_forward`: the attention it hides, with and without the weights it returns."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.watch.refuse import SeamError

Catch = Callable[[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], Tensor]


class Relay:
    """Stands in for `F.scaled_dot_product_attention` and hands calls to seams, the innermost first."""

    def __init__(self, bottom: Callable[..., Tensor], plain: Callable[..., Tensor]):
        self.bottom, self.plain = bottom, plain
        self.catches: list[Catch] = []
        self.thread = threading.get_ident()
        self.busy = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention: through the seams, then `bottom`."""
        # other threads, and handlers that compute attention themselves, get the plain function
        if self.busy or threading.get_ident() != self.thread:
            return self.plain(*args, **kwargs)
        self.busy = True
        try:
            return self._down(0)(*args, **kwargs)
        finally:
            self.busy = False

    def _down(self, level: int) -> Callable[..., Tensor]:
        if level == len(self.catches):
            return self.bottom
        return lambda *args, **kwargs: self.catches[level](self._down(level + 1), args, kwargs)

    @staticmethod
    @contextmanager
    def of(catch: Catch, bottom: Callable[..., Tensor] | None = None) -> Iterator[None]:
        """While open, attention called through `torch.nn.functional` comes to `catch`."""
        before = F.scaled_dot_product_attention
        if isinstance(before, Relay) and before.thread == threading.get_ident() and not before.busy:
            before.catches.append(catch)  # an inner seam stands already
            try:
                yield
            finally:
                before.catches.pop()
            return
        relay = Relay(bottom or before, before.plain if isinstance(before, Relay) else before)
        relay.catches.append(catch)
        F.scaled_dot_product_attention = relay
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before


class WeightedAttention:
    """The arithmetic `F.multi_head_attention_forward` does when weights are wanted, bit for bit; keeps the weights."""

    def __init__(self, layer: str):
        self.layer = layer
        self.runs: list[tuple[Tensor, Tensor]] = []
        self.result: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over `[batch, heads, length, width]`, with the arguments of the fused function."""
        batch, heads, q_len, width = q.shape
        factor = math.sqrt(1.0 / float(width)) if scale is None or scale == width**-0.5 else scale
        flat_q, flat_k, flat_v = (x.reshape(batch * heads, *x.shape[2:]) for x in (q * factor, k, v))
        if is_causal:
            allowed = torch.ones(q_len, k.shape[2], dtype=torch.bool, device=q.device).tril()
            attn_mask = torch.zeros(1, 1, *allowed.shape, dtype=q.dtype, device=q.device).masked_fill(
                ~allowed, -math.inf
            )
        if attn_mask is None:
            scores = torch.bmm(flat_q, flat_k.transpose(-2, -1))
        else:
            mask = attn_mask
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
            if mask.shape[0] * mask.shape[1] > 1:
                mask = mask.expand(batch, heads, *mask.shape[2:])
            scores = torch.baddbmm(mask.reshape(-1, *mask.shape[2:]), flat_q, flat_k.transpose(-2, -1))
        weights = F.softmax(scores, dim=-1)
        if dropout_p > 0.0:
            weights = F.dropout(weights, p=dropout_p)
        out = torch.bmm(weights, flat_v).view(batch, heads, q_len, v.shape[-1])
        self.runs.append((out, weights.view(batch, heads, q_len, -1)))
        return out

    def watched(self, catch: Catch) -> Catch:
        """`catch`, noting what it finally gave."""

        def noting(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            self.result = catch(function, args, kwargs)
            return self.result

        return noting

    def weights_for(self, average: bool, batched: bool) -> Tensor:
        """The weights that belong to what was given back, as `F.multi_head_attention_forward` shapes them.

        They are those of the run whose output was given, or of the only run (its output was changed afterwards).
        """
        own = [weights for out, weights in self.runs if out is self.result]
        if not own and len(self.runs) == 1:
            own = [self.runs[0][1]]
        if not own:
            raise SeamError(
                f"layer {self.layer!r} also returns its weights (need_weights=True, the default), and the handler's "
                f"answer comes from {len(self.runs)} runs of the call, so no weights belong to it; call "
                "nn.MultiheadAttention with need_weights=False"
            )
        weights = own[-1].mean(dim=1) if average else own[-1]
        return weights if batched else weights.squeeze(0)
