"""One layer's attention under a plan: the heads that share an option in one call, dense ones through SDPA itself.

Keys and values are spread to the query heads of a call: copying them costs less than a kernel call for each kv head
(on a CPU at 8,192 tokens, 8 query heads on 4 kv heads, a window of 64: 28 ms against 30 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.attend import attend
from regard.patterns import Causal, Full, Pattern, per_sample
from regard.patterns.routed import Route
from regard.plan.options import Option, ScaledWindow

__all__ = ["Group", "Inputs", "Routed", "grouped", "run_groups", "run_into"]


@dataclass(frozen=True, eq=False)
class Group:
    """Heads of a layer that have the same option."""

    option: Option
    heads: tuple[int, ...]
    everyone: bool
    """These are all heads of the layer, in order."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one attention call computes on, whatever made it."""

    q: Tensor  # [batch, heads, q_len, head_dim]
    k: Tensor  # [batch, kv_heads, kv_len, head_dim]
    v: Tensor  # [batch, kv_heads, kv_len, v_dim]
    scale: float
    q_start: int
    mask: Tensor | None  # of the dense call, broadcasts to [batch, heads, q_len, kv_len]
    is_causal: bool  # of the dense call, counted from 0 on both axes
    place: Callable[[Pattern], Pattern]  # a pattern inside what the model allows in this call
    bias: Tensor | None = None  # what `place` cannot say, added to the scores
    lengths: tuple[int, ...] = ()  # tokens of each sample, where padding sets them apart

    def of(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the group's heads, keys spread to them."""
        q, k, v = self.q, self.k, self.v
        repeat = q.shape[1] // k.shape[1]
        if group.everyone:
            return q, _spread(k, repeat), _spread(v, repeat)
        heads = torch.tensor(group.heads, device=q.device)
        shared = heads // repeat
        return q.index_select(1, heads), k.index_select(1, shared), v.index_select(1, shared)

    def pattern(self, option: Option) -> Pattern:
        """The option's pattern, inside what the model allows; what scales does so by each sample's own tokens.

        Raises:
            ValueError: for an option that is no pattern.
        """
        if not isinstance(option.how, (Pattern, ScaledWindow)):
            raise ValueError(f"option {option.name!r} is no pattern")
        if isinstance(option.how, ScaledWindow) and len(self.lengths) > 1:
            return self.place(per_sample([option.how.at(n) for n in self.lengths]))
        return self.place(option.how.at(self.k.shape[2]) if isinstance(option.how, ScaledWindow) else option.how)

    def part(self, x: Tensor | None, group: Group) -> Tensor | None:
        """A mask or bias of the group's heads."""
        if x is None or x.shape[1] == 1 or group.everyone:
            return x
        return x[:, list(group.heads)]


def _spread(x: Tensor, repeat: int) -> Tensor:
    return x if repeat == 1 else x.repeat_interleave(repeat, 1)


def grouped(options: Sequence[Option]) -> tuple[Group, ...]:
    """The heads of a layer by option (the very object), in the order in which these first come."""
    members: dict[int, list[int]] = {}
    for head, option in enumerate(options):
        members.setdefault(id(option), []).append(head)
    return tuple(Group(options[h[0]], tuple(h), len(h) == len(options)) for h in members.values())


Routed = Callable[[Group, Route, Tensor, Tensor, Tensor], Tensor]
"""Answers a group's route: (group, route, q, k, v of its heads) -> ``[batch, its heads, q_len, v_dim]``."""


def run_groups(call: Inputs, groups: Sequence[Group], routed: Routed | None = None) -> Tensor:
    """``[batch, heads, q_len, v_dim]``; heads that are given nothing are zeros.

    Args:
        call: the inputs.
        groups: of `grouped`; together all heads.
        routed: answers routes, where some of their keys are known already; None: they are asked anew.
    """
    if len(groups) == 1 and groups[0].everyone:
        return _run(call, groups[0], routed)
    batch, heads, q_len, _ = call.q.shape
    out = call.q.new_empty(batch, heads, q_len, call.v.shape[3])
    for group in groups:
        run_into(out, call, group, routed)
    return out


def run_into(out: Tensor, call: Inputs, group: Group, routed: Routed | None = None) -> None:
    """Write one group's heads into the layer's output."""
    at = torch.tensor(group.heads, device=out.device)
    out.index_copy_(1, at, _run(call, group, routed))


def _run(call: Inputs, group: Group, routed: Routed | None) -> Tensor:
    how = group.option.how
    if group.option.kind == "nothing":
        return call.q.new_zeros(call.q.shape[0], len(group.heads), call.q.shape[2], call.v.shape[3])
    q, k, v = call.of(group)
    if how is None:
        mask = call.part(call.mask, group)
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, call.is_causal and mask is None, scale=call.scale)
    if isinstance(how, Route):
        if routed is not None:
            return routed(group, how, q, k, v)
        pattern: Pattern = how.fresh()(q, k, within=call.place(Full()), q_start=call.q_start)
    else:
        pattern = call.pattern(group.option)
    bias = call.part(call.bias, group)
    if q.shape[2] == 1 and pattern.samples is None and bias is None and not isinstance(how, Route):
        return _one_query(q, k, v, pattern, call.q_start, call.scale)
    found = attend(q, k, v, pattern, q_start=call.q_start, bias=bias, scale=call.scale)
    assert isinstance(found, Tensor)
    return found


def _one_query(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, q_start: int, scale: float) -> Tensor:
    """A step of decoding: the keys that the query may see, gathered, and one call of SDPA on them."""
    kv_len = k.shape[2]
    if pattern in (Causal(), Full()) and q_start >= kv_len - 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    seen = pattern.allows(torch.tensor([q_start], device=q.device), torch.arange(kv_len, device=q.device))
    keys = seen.expand(kv_len).nonzero().flatten()
    if len(keys) == kv_len:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if not len(keys):
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return F.scaled_dot_product_attention(q, k.index_select(2, keys), v.index_select(2, keys), scale=scale)
