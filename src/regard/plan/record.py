"""One dense run of a calibration sequence, beside which every option of every head is tried at once.

For each head and option, over the queries that are no padding: the mass it keeps, ``exp(lse_option - lse_full)``,
exact; its error after the output projection as a share of the layer's attention output at that query,
``|(z_option - z_full) W_h| / |sum_h z_h W_h|``; and its effect, ``sum_i |g_i . (z_option - z_full)_i|`` with g the
gradient of the judge's probe at the head's outputs. A retrieval head matters for a few queries: a mean of errors hides
it, the worst errors show it, and the effect says what it is worth. One backward pass serves all heads and options.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from regard.plan.judge import Judge
from regard.plan.observe import Evidence, observe
from regard.plan.options import DENSE, Option
from regard.watch.anatomy import Anatomy
from regard.watch.call import Call
from regard.watch.own_mask import own_mask
from regard.watch.probe import run
from regard.watch.seam import Seam

__all__ = ["LayerRecord", "Recording", "projections"]

WORST = 0.01
"""Share of queries whose error is kept apart, the worst ones."""
LEAST_GAIN = 0.15
"""Share of dense attention's time that an option must save to be tried."""
QUANTITIES = ("error", "worst", "asked", "mass", "least_mass", "effect")


@dataclass(eq=False)
class LayerRecord:
    """What was found of one layer's heads; arrays are ``[heads, options]``, sums over sequences, NaN where not tried.

    ``error``: mean over queries of the relative error; ``worst``: its mean over the worst 1 % of queries; ``asked``:
    mean of its square over the queries that the judge asks for, 0 where it asks for all; ``mass``: mean kept mass;
    ``least_mass``: over the worst 1 % of queries; ``effect``: in the judge's unit.
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
class _Kept:
    """A layer's dense call until the gradients are there."""

    inputs: Inputs
    full: Tensor
    lse: Tensor
    valid: Tensor
    layer: LayerRecord


@dataclass(eq=False)
class Recording:
    """Dense runs that try options; `layers` in the order in which they attend."""

    model: nn.Module
    costs: CostModel
    how: Mapping[str, Any]
    """Arguments of `candidates`."""
    roles: Mapping[str, Sequence[str]]
    projections: Mapping[str, tuple[str, Tensor]]
    """By layer: the name and the weight ``[out, heads * v_dim]`` of its output projection."""
    judge: Judge
    gradients: bool = True
    """Look for effects; without them (or a judge without a probe) an effect is the square of the error."""
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    known: dict[Any, Option] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _kept: list[_Kept] = field(default_factory=list)

    def run(self, given: Any, inputs: Any) -> Any:
        """Record one sequence: the model is run on ``given``, the judge reads ``inputs``. Gives the model's output."""
        self._kept = []
        with torch.set_grad_enabled(self.gradients):
            with Seam(self.model, self, edits=True):
                output = run(self.model, given)
            effects = self._gradients(output, inputs) if self.gradients else None
        asked = self.judge.asked(inputs) if isinstance(inputs, Mapping) else None
        with torch.no_grad():
            for n, kept in enumerate(self._kept):
                self._figures_of(kept, None if effects is None else effects[n], asked)
        self._kept = []
        return _without_graph(output)

    def _gradients(self, output: Any, inputs: Any) -> Sequence[Tensor] | None:
        probe = self.judge.probe(output, inputs, self.generator)
        if probe is None or not probe.requires_grad:
            return None
        found = torch.autograd.grad(probe, [kept.full for kept in self._kept], allow_unused=True)
        return [torch.zeros_like(k.full) if g is None else g for k, g in zip(self._kept, found, strict=True)]

    def __call__(self, call: Call) -> Tensor | None:
        """The dense output of a layer; what its options are tried on is kept."""
        if call.kind != "self":
            return None
        name = label_of(call)
        try:
            refuse_call(call)
            return self._keep(call, name)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def _keep(self, call: Call, name: str) -> Tensor:
        inputs = inputs_of(call, own_mask(call))
        start = time.perf_counter()
        full, lse = _attend(inputs, inputs.place(Full()), inputs.q, inputs.k, inputs.v, inputs.bias)
        seconds = time.perf_counter() - start
        if bool(lse.isnan().any()) or bool(full.isnan().any()):
            raise ValueError("its scores or outputs are NaN: q, k or v holds NaN, and no plan can be judged on them")
        plain = _detached(inputs)
        if name not in self.layers:
            with torch.no_grad():
                self.layers[name] = self._layer(call, plain, name)
        layer = self.layers[name]
        if layer.shape != shape_of(inputs):
            raise ValueError(
                f"its shape (batch, heads, kv_heads, q_len, kv_len, head_dim, v_dim) is {shape_of(inputs)}, in the "
                f"sequence before it was {layer.shape}; calibration sequences must be of one length"
            )
        self.costs.note(layer.shape, DENSE, layer.shape[1], seconds)
        if self.gradients and not full.requires_grad:
            full.requires_grad_()  # nothing before this layer has parameters that ask for gradients
        self._kept.append(_Kept(plain, full, lse.detach(), call.valid, layer))
        return full.to(call.result_dtype)

    def _layer(self, call: Call, inputs: Inputs, name: str) -> LayerRecord:
        evidence = observe(
            inputs.q, inputs.k, scale=inputs.scale, q_start=inputs.q_start, causal=call.causal, mask=inputs.mask
        )
        everyone, some, named = candidates(evidence, roles=self.roles.get(name), known=self.known, **self.how)
        options = list(everyone)
        for more in some.values():
            options += [option for option in more if option not in options]
        heads, v_dim = inputs.q.shape[1], inputs.v.shape[3]
        offered = np.zeros((heads, len(options)))
        offered[:, len(everyone) :] = np.nan
        for head, more in some.items():
            offered[head, [options.index(option) for option in more]] = 0.0
        projected = None if self._projection(name, heads * v_dim) is None else self.projections[name][0]
        sums = {quantity: offered.copy() for quantity in QUANTITIES}
        roles = [role for role, _ in named]
        return LayerRecord(name, shape_of(inputs), options, projected, roles, evidence, sums)

    # -- figures

    def _figures_of(self, kept: _Kept, gradient: Tensor | None, asked: Tensor | None) -> None:
        """Try the options of one layer."""
        layer, inputs = kept.layer, kept.inputs
        full = kept.full.detach()
        self.costs.time(inputs, layer.options)
        scale, weight = self._scale(layer.name, full), self._per_head(layer.name, inputs)
        rows = kept.valid.expand(len(full), -1)
        for n, option in enumerate(layer.options):
            if self._slow(layer, option):
                for values in layer.sums.values():
                    values[:, n] = np.nan
            heads = np.flatnonzero(layer.offered[:, n]).tolist()
            if not heads:
                continue
            if option.kind == "dense":
                layer.sums["mass"][heads, n] += 1.0
                layer.sums["least_mass"][heads, n] += 1.0
                continue
            change, mass = self._change(layer, inputs, option, heads, full, kept.lse)
            size = (change if weight is None else change @ weight[heads]).norm(dim=-1) / scale
            found = _over_queries(size, mass, rows)
            if asked is not None and asked.shape == rows.shape:
                few = (asked.to(rows.device) & rows)[:, None]
                found["asked"] = (size.square() * few).sum((0, 2)) / few.sum().clamp(min=1)
            if gradient is None:
                found["effect"] = size.square().transpose(0, 1)[:, rows].mean(1)
            else:
                effect = (gradient[:, heads].float() * change).sum(-1).double().abs() ** self.judge.power
                found["effect"] = effect.sum((0, 2))
            for quantity, each in found.items():
                layer.sums[quantity][heads, n] += each.double().cpu().numpy()
        layer.sequences += 1

    def _slow(self, layer: LayerRecord, option: Option) -> bool:
        """Whether all heads together would hardly be faster than dense: such an option can only lose."""
        if option.kind == "dense":
            return False
        heads = layer.shape[1]
        known = self.costs.times.get((layer.shape, option.name), {})
        return max(known, default=1) > 1 and self.costs.seconds(layer.shape, option, heads) > (
            1 - LEAST_GAIN
        ) * self.costs.seconds(layer.shape, DENSE, heads)

    def _change(
        self, layer: LayerRecord, inputs: Inputs, option: Option, heads: list[int], full: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the option changes in the heads' outputs, float32, and the mass it keeps; its time is noted."""
        group = Group(option, tuple(heads), len(heads) == inputs.q.shape[1])
        if option.kind == "nothing":
            return -full[:, heads].float(), torch.zeros_like(lse[:, heads])
        at = torch.tensor(heads, device=full.device)
        for again in (True, False):
            start = time.perf_counter()
            q, k, v = inputs.of(group)
            how = option.how
            if isinstance(how, Route):
                pattern: Pattern = how.fresh()(q, k, within=inputs.place(Full()), q_start=inputs.q_start)
            else:
                pattern = inputs.pattern(option)
            out, part = _attend(inputs, pattern, q, k, v, inputs.part(inputs.bias, group))
            torch.empty_like(full).index_copy_(1, at, out)  # as a group of some heads is written
            seconds = time.perf_counter() - start
            if not (again and layer.shape not in self._warm.setdefault(option.name, set())):
                break
            self._warm[option.name].add(layer.shape)  # blocks were laid out
        self.costs.note(layer.shape, option, len(heads), seconds)
        return (out - full[:, heads]).float(), (part - lse[:, heads]).exp().clamp(max=1.0)

    _warm: dict[str, set[Shape]] = field(default_factory=dict)

    def _per_head(self, name: str, inputs: Inputs) -> Tensor | None:
        """``[heads, v_dim, v_dim]``: S with ``|x W_h| = |x S_h|``, as narrow as the head."""
        heads, v_dim = inputs.q.shape[1], inputs.v.shape[3]
        weight = self._projection(name, heads * v_dim)
        if weight is None:
            return None
        blocks = weight.to(torch.float32).reshape(-1, heads, v_dim).permute(1, 2, 0)  # [heads, v_dim, out]
        values, vectors = torch.linalg.eigh(blocks @ blocks.transpose(1, 2))
        return vectors * values.clamp(min=0).sqrt()[:, None]

    def _projection(self, name: str, width: int) -> Tensor | None:
        found = self.projections.get(name)
        return None if found is None or found[1].shape[1] != width else found[1].detach()

    def _scale(self, name: str, full: Tensor) -> Tensor:
        """The size of the layer's attention output at each query ``[batch, 1, q_len]``."""
        z = full.float().transpose(1, 2).flatten(2)
        weight = self._projection(name, z.shape[-1])
        z = z if weight is None else z @ weight.float().T
        size = z.norm(dim=-1)
        return size.clamp(min=1e-3 * float(size.mean()) + 1e-30)[:, None]


def _over_queries(size: Tensor, mass: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Means over the real queries and over the worst of them, ``[heads]``."""
    bad = max(1, int(WORST * int(rows.sum())))
    errors, masses = (x.transpose(0, 1)[:, rows] for x in (size, mass))  # [heads, queries]
    return {
        "error": errors.mean(1),
        "worst": errors.topk(bad, dim=1).values.mean(1),
        "mass": masses.mean(1),
        "least_mass": masses.topk(bad, dim=1, largest=False).values.mean(1),
    }


def _without_graph(output: Any) -> Any:
    """The same with its tensors detached, so that what the backward pass kept is let go."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):  # of transformers too
        for name in list(output):
            if isinstance(output[name], Tensor):
                output[name] = output[name].detach()
        return output
    return type(output)(map(_without_graph, output)) if type(output) in (list, tuple) else output


def _detached(x: Inputs) -> Inputs:
    return replace(x, q=x.q.detach(), k=x.k.detach(), v=x.v.detach())


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
