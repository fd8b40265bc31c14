"""A frozen model whose layers are gated between full and sparse attention, while its routers learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.layers.layer_router import FULL, LayerRouter
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.seam import Seam

__all__ = ["LayerGates"]


class LayerGates:
    """``with LayerGates(model, routers, tau=1.2) as gates: loss = f(model(ids)) + budget(gates.sparse, task)``.

    Each named layer attends by ``z full + (1 - z) sparse``, z drawn anew in every call of a layer by its
    `LayerRouter.sample`; gradients reach the routers, and the model too where its parameters ask for one. The model's
    own causality stays in force. For inference give the routers to `regard.attend_with`, which runs one of the two.

    Args:
        model: the module that is called.
        routers: by the names of attention modules.
        tau: temperature of the gates; None: no noise, each layer takes what its router prefers.
        asked: tokens of context and question in each sample; what follows is never pooled. None: all.
        generator: of the noise, on the CPU; None: the global one.

    Raises:
        LookupError: on opening, for a layer that the model does not have.
        ValueError: while running, for a call that has a cache or padding.
    """

    def __init__(
        self,
        model: nn.Module,
        routers: Mapping[str, LayerRouter],
        *,
        tau: float | None = 1.0,
        asked: Int[Tensor, "batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.routers, self.tau, self.asked, self.generator = dict(routers), tau, asked, generator
        self.gates: dict[str, Tensor] = {}
        self._names = {name for name, _ in model.named_modules()}
        self._seam = Seam(model, self._answer, edits=True)

    @property
    def sparse(self) -> Float[Tensor, "batch"]:
        """The share of sparse layers of each sample in the last forward; what a budget is on."""
        if not self.gates:
            raise ValueError("no layer was gated; run the model first")
        return 1 - torch.stack(list(self.gates.values())).mean(0)

    def __enter__(self) -> LayerGates:
        for name in self.routers:
            if name not in self._names:
                raise LookupError(f"layer {name!r}: the model has no such module")
        self.gates = {}
        self._seam.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._seam.__exit__(kind, error, trace)

    def _answer(self, call: Call) -> Tensor | None:
        router = self.routers.get(call.layer)
        if router is None:
            return None
        own, length = own_mask(call), call.k.shape[2]
        whole = all(span == (0, length) for span in own.spans) and not any(own.columns)
        if call.q.shape[2] != length or not whole or own.shape is None or own.bias is not None:
            raise ValueError(
                f"layer {call.layer!r}: gates take whole sequences, without cached keys, padding or added scores; "
                "batch sequences of one length"
            )
        logits = router.logits(call.q, self.asked)
        if self.tau is None:
            z = (logits.argmax(-1) == FULL).to(logits)
        else:
            z = router.sample(logits, self.tau, self.generator)
        self.gates[call.layer] = z
        return router.mixed(z, call.q, call.k, call.v, within=own.shape, q_start=0, scale=call.scale)
