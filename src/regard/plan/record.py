"""One dense run of each calibration sequence, beside which every option of every head is tried at once.

For each head and option, over the queries that are no padding: the mass it keeps, ``exp(lse_option - lse_full)``,
exact; and its error after the output projection as a share of the layer's attention output at that query,
``|(z_option - z_full) W_h| / |sum_h z_h W_h|``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.patterns import Full, Pattern
from regard.patterns.routed import Route
from regard.plan.apply import inputs_of, label_of, refuse_call
from regard.plan.candidates import candidates
from regard.plan.cost import CostModel, Shape, shape_of
from regard.plan.groups import Group, Inputs
from regard.plan.observe import Evidence, observe
from regard.plan.options import DENSE, Option
from regard.watch.anatomy import Anatomy
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.seam import Seam

__all__ = ["LayerRecord", "Recording", "record"]

WORST = 0.01
"""Share of queries whose error is kept apart, the worst ones."""
LEAST_GAIN = 0.15
"""Share of dense attention's time that an option must save, when all heads of the layer have it."""
QUANTITIES = ("error", "square", "worst", "counted", "mass", "least_mass")


@dataclass(eq=False)
class LayerRecord:
    """What was found of one layer's heads; arrays are ``[heads, options]``, means over sequences, NaN where not tried.

    ``error``: mean over queries of the relative error; ``square``: of its square; ``worst``: of its square over the
    worst 1 % of queries; ``counted``: of its square over the queries whose outputs are judged; ``mass``: mean kept
    mass; ``least_mass``: over the worst 1 % of queries.
    """

    name: str
    shape: Shape
    options: list[Option]
    projected: str | None
    """The output projection's name; None: not found, and errors are those of the heads' own outputs."""
    roles: list[str]
    evidence: Evidence
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    sequences: int = 0

    def mean(self, quantity: str) -> np.ndarray:
        """``[heads, options]``."""
        return self.sums[quantity] / max(self.sequences, 1)

    @property
    def offered(self) -> np.ndarray:
        """Bool ``[heads, options]``: which were tried."""
        return np.isfinite(self.sums["mass"])


@dataclass(eq=False)
class Recording:
    """The handler of a dense run that tries options; `layers` in the order in which they attend."""

    model: nn.Module
    costs: CostModel
    how: Mapping[str, Any]
    """Arguments of `candidates`."""
    roles: Mapping[str, Sequence[str]]
    projections: Mapping[str, tuple[str, Tensor]]
    """By layer: the name and the weight ``[out, heads * v_dim]`` of its output projection."""
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    known: dict[Any, Option] = field(default_factory=dict)
    counted: Tensor | None = None
    """Bool ``[batch, length]``: the queries whose outputs are judged, of the sequence that runs; None: all."""
    extra: float = 0.0
    """Seconds in the layers' calls beside their dense attention: what a plain forward pass would not have taken."""
    _dense: float = 0.0

    def __call__(self, call: Call) -> Tensor | None:
        """Try every option of the layer, and give the dense output."""
        if call.kind != "self":
            return None
        name = label_of(call)
        start = time.perf_counter()
        try:
            refuse_call(call)
            return self._try(call, name)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        finally:
            self.extra += time.perf_counter() - start - self._dense

    def _try(self, call: Call, name: str) -> Tensor:
        inputs = inputs_of(call, own_mask(call))
        start = time.perf_counter()
        full, lse = _attend(inputs, inputs.place(Full()), inputs.q, inputs.k, inputs.v, inputs.bias)
        self._dense = time.perf_counter() - start
        if bool(lse.isnan().any()) or bool(full.isnan().any()):
            raise ValueError("its scores or outputs are NaN: q, k or v holds NaN, and no plan can be judged on them")
        if name not in self.layers:
            self.layers[name] = self._layer(call, inputs, name)
        layer = self.layers[name]
        if layer.shape[1] != inputs.q.shape[1]:
            raise ValueError(f"attends with {inputs.q.shape[1]} heads, with {layer.shape[1]} in the sequence before")
        self.costs.time(inputs, layer.options)
        if not layer.sequences:
            self._drop_slow(layer)
        layer.sequences += 1
        scale = self._scale(name, full, inputs)
        weight = self._per_head(name, inputs)
        valid = call.valid
        for n, option in enumerate(layer.options):
            heads = np.flatnonzero(layer.offered[:, n]).tolist()
            if not heads:
                continue
            found = self._figures(inputs, option, heads, full, lse, weight, scale, valid)
            for quantity, values in found.items():
                layer.sums[quantity][heads, n] += values
        return full.to(call.result_dtype)

    def _layer(self, call: Call, inputs: Inputs, name: str) -> LayerRecord:
        mask = inputs.mask
        evidence = observe(
            inputs.q, inputs.k, scale=inputs.scale, q_start=inputs.q_start, causal=call.causal, mask=mask
        )
        everyone, some, named = candidates(evidence, roles=self.roles.get(name), known=self.known, **self.how)
        options = list(everyone)
        offered = np.zeros((inputs.q.shape[1], 64), dtype=bool)
        offered[:, : len(everyone)] = True
        for head, more in some.items():
            for option in more:
                if option not in options:
                    options.append(option)
                offered[head, options.index(option)] = True
        nothing = np.where(offered[:, : len(options)], 0.0, np.nan)
        heads, v_dim = inputs.q.shape[1], inputs.v.shape[3]
        projected = None if self._projection(name, heads * v_dim) is None else self.projections[name][0]
        return LayerRecord(
            name,
            shape_of(inputs),
            options,
            projected,
            [role for role, _ in named],
            evidence,
            {quantity: nothing.copy() for quantity in QUANTITIES},
        )

    def _drop_slow(self, layer: LayerRecord) -> None:
        """Options that are hardly faster than dense attention are not tried: they can only lose."""
        heads = layer.shape[1]
        most = (1 - LEAST_GAIN) * self.costs.seconds(layer.shape, DENSE, heads)
        for n, option in enumerate(layer.options):
            if option.kind != "dense" and self.costs.seconds(layer.shape, option, heads) > most:
                for values in layer.sums.values():
                    values[:, n] = np.nan

    # -- figures

    def _per_head(self, name: str, inputs: Inputs) -> Tensor | None:
        """``[heads, v_dim, v_dim]``: S with ``|x W_h| = |x S_h|``, as narrow as the head."""
        heads, v_dim = inputs.q.shape[1], inputs.v.shape[3]
        weight = self._projection(name, heads * v_dim)
        if weight is None:
            return None
        blocks = weight.to(torch.float32).view(-1, heads, v_dim).permute(1, 2, 0)  # [heads, v_dim, out]
        values, vectors = torch.linalg.eigh(blocks @ blocks.transpose(1, 2))
        return vectors * values.clamp(min=0).sqrt()[:, None]

    def _projection(self, name: str, width: int) -> Tensor | None:
        found = self.projections.get(name)
        return None if found is None or found[1].shape[1] != width else found[1].detach()

    def _scale(self, name: str, full: Tensor, inputs: Inputs) -> Tensor:
        """The size of the layer's attention output at each query ``[batch, 1, q_len]``."""
        z = full.float().transpose(1, 2).flatten(2)
        weight = self._projection(name, z.shape[-1])
        z = z if weight is None else z @ weight.float().T
        size = z.norm(dim=-1)
        return size.clamp(min=1e-3 * float(size.mean()) + 1e-30)[:, None]

    def _figures(
        self,
        inputs: Inputs,
        option: Option,
        heads: list[int],
        full: Tensor,
        lse: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        valid: Tensor,
    ) -> dict[str, np.ndarray]:
        if option.kind == "dense":
            return {name: np.full(len(heads), float("mass" in name)) for name in QUANTITIES}
        group = Group(option, tuple(heads), len(heads) == inputs.q.shape[1])
        rows = valid.expand(len(full), -1)
        if option.kind == "nothing":
            change, mass = -full[:, heads], torch.zeros_like(lse[:, heads])
        else:
            q, k, v = inputs.of(group)
            how: Any = option.at(inputs.k.shape[2])
            if isinstance(how, Route):
                pattern: Pattern = how.fresh()(q, k, within=inputs.place(Full()), q_start=inputs.q_start)
            else:
                pattern = inputs.place(how)
            out, part = _attend(inputs, pattern, q, k, v, inputs.part(inputs.bias, group))
            change = out - full[:, heads]
            mass = (part - lse[:, heads]).exp().clamp(max=1.0)
        change = change.float()
        size = (change if weight is None else change @ weight[heads]).norm(dim=-1) / scale
        square = size.square()
        counted = self._counted(rows)
        bad = max(1, int(WORST * int(rows.sum())))
        flat, masses = (x.transpose(0, 1)[:, rows] for x in (square, mass))  # [heads, queries]
        found = {
            "error": flat.sqrt().mean(1),
            "square": flat.mean(1),
            "worst": flat.topk(bad, dim=1).values.mean(1),
            "counted": square.transpose(0, 1)[:, counted].mean(1),
            "mass": masses.mean(1),
            "least_mass": masses.topk(bad, dim=1, largest=False).values.mean(1),
        }
        return {name: x.double().cpu().numpy() for name, x in found.items()}

    def _counted(self, rows: Tensor) -> Tensor:
        if self.counted is None or self.counted.shape != rows.shape:
            return rows
        both = rows & self.counted.to(rows.device)
        return both if bool(both.any()) else rows


def _attend(
    inputs: Inputs, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = attend(q, k, v, pattern, q_start=inputs.q_start, bias=bias, scale=inputs.scale, return_lse=True)
    return out, lse


def projections(model: nn.Module, parts: Anatomy | None) -> dict[str, tuple[str, Tensor]]:
    """By attention layer: the name and weight ``[out, in]`` of the linear map that mixes its heads' outputs."""
    if parts is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for layer, name in zip(parts.attn, parts.out_proj, strict=True):
        module = modules.get(name or "")
        weight = getattr(module, "weight", None)
        if layer is None or name is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        # transformers' Conv1D keeps its weight the other way round
        turned = type(module).__name__ == "Conv1D"
        found[layer] = (name, weight.T if turned else weight)
    return found


def record(recording: Recording, inputs: Any, run: Any, counted: Tensor | None = None) -> Any:
    """Run the model once on these inputs with the recording open; gives the model's output."""
    recording.counted = counted
    with Seam(recording.model, recording, edits=True):
        return run(recording.model, inputs)
