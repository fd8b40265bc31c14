"""A call of a foreign model answered by a route: in each sample's own tokens, inside the model's own mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.kernels.attend import attend
from regard.patterns import Columns, Full, Pattern
from regard.patterns.routed import Route
from regard.watch.call import Call
from regard.watch.own_mask import OwnMask
from regard.watch.summaries import Summaries

__all__ = ["Stretch", "Unmasked", "attend_route", "stretches"]


@dataclass(frozen=True)
class Stretch:
    """Samples of a call whose tokens stand at the same places: positions count from the first of their keys."""

    samples: slice
    rows: slice
    keys: slice
    q_start: int
    within: Pattern | None
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Unmasked(Pattern):
    """The pairs that an additive mask ``[batch|1, heads|1, q_len|1, kv_len|1]`` does not set to -inf."""

    mask: Tensor
    q_start: int

    @property
    def heads(self) -> int | None:
        """Those of the mask."""
        return None if self.mask.shape[1] == 1 else self.mask.shape[1]

    @property
    def samples(self) -> int | None:
        """Those of the mask."""
        return None if self.mask.shape[0] == 1 else self.mask.shape[0]

    def allows(
        self,
        q_idx: Int[Tensor, "..."],
        kv_idx: Int[Tensor, "..."],
        head: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Bool[Tensor, "..."]:
        """``mask > -inf``; False beyond it."""
        m, device = self.mask, q_idx.device
        q, there = q_idx - self.q_start, torch.ones((), dtype=torch.bool, device=device)
        at = []
        for n, (idx, name) in enumerate(((batch, "batch"), (head, "head"), (q, ""), (kv_idx, ""))):
            if m.shape[n] == 1 and n < 2:
                at.append(torch.zeros((), dtype=torch.long, device=device))
                continue
            if idx is None:
                raise ValueError(f"{name} must be given: this mask tells {m.shape[n]} apart")
            there = there & (idx >= 0) & ((idx < m.shape[n]) | (m.shape[n] == 1))
            at.append(idx.clamp(0, m.shape[n] - 1).long())
        return (m.to(device)[tuple(at)] != -torch.inf) & there


def stretches(call: Call, own: OwnMask, keep: bool) -> Iterator[Stretch]:
    """One for all samples where their tokens stand alike, else one for each; none for a sample without tokens."""
    cross = call.kind == "cross"
    q_start, q_len = call.positions.first if cross else call.q_start, call.q.shape[2]
    bias = own.bias if keep or own.valued else None
    for n, ((start, stop), columns) in enumerate(zip(own.spans, own.columns, strict=True)):
        samples = slice(None) if len(own.spans) == 1 else slice(n, n + 1)
        first = max(start, 0)
        lo, hi = (0, q_len) if cross else (max(q_start, first) - q_start, min(q_start + q_len, stop) - q_start)
        if lo >= hi or first >= stop:
            continue
        rows, keys = slice(lo, hi), slice(first, stop)
        at = q_start if cross else q_start + lo - first
        part = None
        if bias is not None:
            part = bias[samples] if bias.shape[0] > 1 else bias
            part = part[:, :, rows] if bias.shape[2] > 1 else part
            part = part[..., keys] if bias.shape[3] > 1 else part
        within: Pattern | None = None
        if keep and own.shape is None and part is not None:
            within = Unmasked(part, at)
        elif keep and own.shape is not None and not isinstance(own.shape, Full):
            within = own.shape
        if columns is not None:
            seen = Columns(tuple((a - first, b - first) for a, b in columns.intervals))
            within = seen if within is None else within & seen
        yield Stretch(samples, rows, keys, at, within, part)


def attend_route(
    call: Call, route: Route, own: OwnMask, summaries: Summaries, *, keep: bool = True, backend: str = "auto"
) -> Tensor:
    """The call under what the route decides; queries that are padding get zeros."""
    dtype = call.result_dtype
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    out = None
    for n, part in enumerate(stretches(call, own, keep)):
        mine, keys, values = q[part.samples, :, part.rows], k[part.samples, :, part.keys], v[part.samples, :, part.keys]
        whole = keys.shape == call.k.shape and k is call.k
        queries = 0 if call.kind == "cross" else mine.shape[2]
        own_route, summary = summaries.of((call.layer, call.index, n), route, keys, call, queries, whole)
        routed = own_route.select(mine, summary, within=part.within, q_start=part.q_start)
        found = attend(
            mine, keys, values, routed, q_start=part.q_start, bias=part.bias, scale=call.scale, backend=backend
        )
        assert isinstance(found, Tensor)
        if found.shape[:3] == q.shape[:3]:
            return found
        if out is None:
            out = q.new_zeros(*q.shape[:3], v.shape[3])
        out[part.samples, :, part.rows] = found
    return q.new_zeros(*q.shape[:3], v.shape[3]) if out is None else out
