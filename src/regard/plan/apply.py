"""A plan at work: the seam's calls of its layers, answered group by group."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regard.patterns.routed import Route
from regard.plan.groups import Group, Inputs, Routed, grouped, run_groups
from regard.plan.options import Option, bound_part
from regard.watch.call import Call
from regard.watch.own_mask import OwnMask, own_mask
from regard.watch.route_call import attend_route
from regard.watch.seam import Seam, SeamError
from regard.watch.summaries import Summaries

__all__ = ["Applied", "inputs_of", "label_of", "refuse_call"]


def label_of(call: Call) -> str:
    """The layer's name; with its number where a module attends more than once in a forward."""
    return f"{call.layer}#{call.index}" if call.index else call.layer


def refuse_call(call: Call) -> None:
    """Refuse calls in which a pattern has no place.

    Raises:
        ValueError: for dropout, folded batches, and keys whose positions are not known.
    """
    if call.dropout:
        raise ValueError(
            f"the call drops out {call.dropout:g} of its weights; call model.eval(), or set attention dropout to 0"
        )
    if call.folded:
        raise ValueError("the model folds windows or axes into the batch, so a pattern over its tokens has no place")
    if not call.positions_known:
        raise ValueError("nothing says where the keys stand (evicted from a cache, pooled), so a pattern has no place")
    if call.positions.first > call.q_start and not bool((call.kv_pos.diff() == 1).all()):
        raise ValueError("the cache holds keys that do not follow one another, and a pattern needs them to")


def inputs_of(call: Call, own: OwnMask | None = None) -> Inputs:
    """The call's tensors, with its own mask (read, where it is not given) as a pattern around any other."""
    own = own_mask(call) if own is None else own
    dtype = call.result_dtype
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    return Inputs(
        q=call.q.to(dtype),
        k=call.k.to(dtype),
        v=call.v.to(dtype),
        scale=call.scale,
        q_start=call.q_start,
        mask=mask if not call.is_causal or mask is None else mask_with_causal(mask, call),
        is_causal=call.is_causal,
        place=lambda pattern: own.around(pattern, True),
        bias=own.bias,
        lengths=tuple(max(0, stop - start) for start, stop in own.spans) if len(own.spans) > 1 else (),
    )


def mask_with_causal(mask: Tensor, call: Call) -> Tensor:
    """A mask that also forbids what the call's causality does; both axes count from 0, as in the kernel."""
    corner = torch.ones(call.q.shape[2], call.k.shape[2], dtype=torch.bool, device=mask.device).tril()
    return mask & corner if mask.dtype == torch.bool else mask.masked_fill(~corner, -torch.inf)


class Applied:
    """The context that `Plan.applied` gives: the model attends as the plan says while it is open.

    Attributes:
        used: calls answered, by layer.
        seconds: time inside these calls, all that the plan costs included (reading masks, deciding, copying heads).
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[Option]], lengths: Mapping[str, int]):
        self.model, self.lengths = model, dict(lengths)
        self._groups = {name: grouped(options) for name, options in layers.items()}
        self._heads = {name: len(options) for name, options in layers.items()}
        self._seam = Seam(model, self._answer, edits=True)
        self.summaries = Summaries()
        self._looking: RemovableHandle | None = None
        self.used: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Applied:
        self.used, self.seconds = {}, {}
        self.summaries.clear()
        self._seam.__enter__()
        self._looking = self.model.register_forward_pre_hook(lambda *_: self.summaries.look())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._looking is not None:
            self._looking.remove()
        self.summaries.forget()
        self._seam.__exit__(kind, error, trace)
        idle = [name for name in self._groups if name not in self.used]
        if kind is None and idle and self._seam._ran:
            raise SeamError(f"{', '.join(idle)}: the plan has it, and the model ran and made no such attention call")

    def _answer(self, call: Call) -> Tensor | None:
        name = label_of(call)
        groups = self._groups.get(name)
        if groups is None or call.kind != "self":
            return None
        start = _now(call.q)
        if call.q.shape[1] != self._heads[name]:
            raise ValueError(
                f"layer {name!r} attends with {call.q.shape[1]} heads, the plan gives something to {self._heads[name]}"
            )
        try:
            refuse_call(call)
            self._check_length(call, name, groups)
            if all(group.option.kind == "dense" for group in groups):
                out = call.run()
            else:
                own = own_mask(call)
                out = run_groups(inputs_of(call, own), groups, self._routed(call, name, own))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        self.used[name] = self.used.get(name, 0) + 1
        self.seconds[name] = self.seconds.get(name, 0.0) + _now(call.q) - start
        return out

    def _check_length(self, call: Call, name: str, groups: Sequence[Group]) -> None:
        """Refuse a plan that holds positions of another length."""
        length = call.positions.total
        if length == self.lengths.get(name):
            return
        for group in groups:
            if group.option.length == "bound":
                raise ValueError(
                    f"option {group.option.name!r} of heads {list(group.heads)} holds positions of "
                    f"{self.lengths.get(name)} tokens ({bound_part(group.option.how)!r}), and this call has {length}; "
                    "plan anew at this length"
                )

    def _routed(self, call: Call, name: str, own: OwnMask) -> Routed:
        """Answers routes as `attend_with` does: while a cache grows, summaries of its keys are appended to."""

        def answer(group: Group, route: Route, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mine = replace(call, q=q, k=k, v=v, layer=f"{name} {group.heads}")
            bias = own.bias
            if bias is not None and bias.shape[1] > 1:
                bias = bias[:, list(group.heads)]
            return attend_route(mine, route, replace(own, bias=bias), self.summaries)

        return answer


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
