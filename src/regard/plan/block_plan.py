"""PAROAttention on a model (arXiv 2506.16054): an order for each head, and a block mask for each part of the sampling.

`record_orders` chooses the orders on some calibration inputs, `record_maps` finds the mean map of the inputs of one
part of the sampling, `routes_of` keeps its heaviest blocks as stored routes, and `StepRoutes` lets the model attend by
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.patterns import AxisOrder, Order, Routed
from regard.plan.apply import label_of, refuse_call
from regard.plan.reorder import Figures, axis_orders, block_mass, heaviest, order_figures, reordered
from regard.watch.call import Call
from regard.watch.probe import quiet, run
from regard.watch.seam import Seam, SeamError

__all__ = ["StepRoutes", "record_maps", "record_orders", "routes_of"]

Orders = Mapping[str, Sequence[Order]]


def record_orders(
    model: nn.Module,
    inputs: Sequence[Any],
    shape: Sequence[int],
    block: int | tuple[int, int] = 64,
    *,
    prefix: int = 0,
    suffix: int = 0,
    eps: float = 0.015,
    a: float = 0.5,
) -> dict[str, list[AxisOrder]]:
    """By self-attention layer: the order of each head, by the mean figures over the inputs (see `Figures.score`)."""
    orders = axis_orders(shape)
    parts: dict[str, list[Figures]] = {}

    def note(name: str, call: Call) -> None:
        how: dict[str, Any] = {"prefix": prefix, "suffix": suffix, **_scope(call)}
        parts.setdefault(name, []).append(order_figures(call.q, call.k, orders, block, eps=eps, **how))

    _watch(model, inputs, note)
    return {name: [orders[i] for i in Figures.mean(found).best(a).tolist()] for name, found in parts.items()}


def record_maps(
    model: nn.Module,
    inputs: Sequence[Any],
    orders: Orders,
    block: int | tuple[int, int] = 64,
    *,
    prefix: int = 0,
    suffix: int = 0,
) -> dict[str, Tensor]:
    """By layer: the mean map S of each head in its order over inputs and batch, ``[heads, q_blocks, kv_blocks]``."""
    sums: dict[str, list[Tensor]] = {}

    def note(name: str, call: Call) -> None:
        if name not in orders:
            return
        different = list(dict.fromkeys(orders[name]))
        maps = block_mass(call.q, call.k, different, block, prefix=prefix, suffix=suffix, **_scope(call))
        mean = [m.mean(0) for m in maps]
        mine = [mean[different.index(order)][h] for h, order in enumerate(orders[name])]
        sums.setdefault(name, []).append(torch.stack(mine))

    _watch(model, inputs, note)
    return {name: torch.stack(found).mean(0) for name, found in sums.items()}


def routes_of(
    maps: Mapping[str, Tensor],
    orders: Orders,
    density: float,
    block: int | tuple[int, int] = 64,
    *,
    prefix: int = 0,
    suffix: int = 0,
    at_least: int = 1,
) -> dict[str, Routed]:
    """By layer: the heaviest blocks of each head's map, ``density`` of them, as one stored route; see `heaviest`."""
    return {
        name: reordered(heaviest(mass.cpu(), density, at_least), orders[name], block, prefix=prefix, suffix=suffix)
        for name, mass in maps.items()
    }


class StepRoutes:
    """The model attends by stored routes, those of the part of the sampling that a step belongs to.

    ``with StepRoutes(model, groups, steps): sample(model, ...)``. Step s of ``steps`` has
    ``groups[s * len(groups) // steps]``; a sampling of more steps begins anew.

    Args:
        model: the model that the routes were made on; one forward a step.
        groups: of each part: by layer, a route (layers not named stay dense).
        steps: forwards of one sampling.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Mapping[str, Routed]], steps: int) -> None:
        if not groups or steps < len(groups):
            raise ValueError(f"groups must be from 1 to steps = {steps} parts, got {len(groups)}")
        self.model, self.groups, self.steps = model, list(groups), steps
        self.used: dict[str, int] = {}
        self._seam = Seam(model, self._answer, edits=True)

    def __enter__(self) -> StepRoutes:
        self.used = {}
        self._seam.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._seam.__exit__(kind, error, trace)
        idle = {name for group in self.groups for name in group} - set(self.used)
        if kind is None and idle and self._seam._ran:
            raise SeamError(f"{', '.join(sorted(idle))}: there is a route for it, and it made no attention call")

    def _answer(self, call: Call) -> Tensor | None:
        name, step = label_of(call), call.forward % self.steps
        routed = self.groups[step * len(self.groups) // self.steps].get(name)
        if routed is None or call.kind != "self":
            return None
        try:
            refuse_call(call)
            _plain(call)
            out = attend(call.q, call.k, call.v, routed.to(call.q.device), q_start=0, scale=call.scale)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        assert isinstance(out, Tensor)
        self.used[name] = self.used.get(name, 0) + 1
        return out.to(call.result_dtype)


def _watch(model: nn.Module, inputs: Sequence[Any], note: Any) -> None:
    """Run the model on the inputs and tell of every self-attention call."""
    if not inputs:
        raise ValueError("inputs must be at least one calibration input, got none")

    def handler(call: Call) -> None:
        if call.kind != "self":
            return
        name = label_of(call)
        try:
            refuse_call(call)
            _plain(call)
            note(name, call)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    with quiet(model), Seam(model, handler):
        for given in inputs:
            run(model, given)


def _plain(call: Call) -> None:
    if call.mask is not None or call.is_causal:
        raise ValueError("the call has a mask of its own, and blocks of an order are those of calls without one")


def _scope(call: Call) -> dict[str, Any]:
    return {"scale": call.scale, "q_start": 0}
