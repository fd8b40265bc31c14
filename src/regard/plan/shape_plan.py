"""Plans of video transformers as Sparse-vDiT makes them: what each shape loses in each head, and the choice.

`record_shapes` runs the model on calibration inputs, `plan_shapes` chooses, `planned` gives the `Plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.kernels.fused import column_mass
from regard.patterns import Full, Pattern
from regard.plan.apply import inputs_of, label_of, refuse_call
from regard.plan.cost import CostModel, Shape, shape_of
from regard.plan.groups import Inputs
from regard.plan.identity import identity
from regard.plan.options import DENSE, NOTHING, Option
from regard.plan.plan import Plan
from regard.plan.record import projections
from regard.plan.rounded import density_of, one_head
from regard.plan.shapes import WIDTHS, kind_of_shape, search_shapes, video_options
from regard.watch.anatomy import Anatomy
from regard.watch.anatomy import anatomy as find_anatomy
from regard.watch.call import Call
from regard.watch.probe import quiet, run
from regard.watch.seam import Seam

__all__ = ["ShapeErrors", "plan_shapes", "planned", "record_shapes"]

FIXED = {"full": DENSE, "skip": NOTHING}  # shapes that are options of every plan


@dataclass(eq=False)
class ShapeErrors:
    """What each option loses in each head of a model, over calibration inputs.

    ``errors[l, h, m] = sum |W_o (O_full - O_m)|^2 / sum |W_o O_full|^2`` over samples, steps and queries; a head whose
    output is nothing loses nothing. ``mass`` is the mean mass that the option keeps, from two log-sum-exps.
    """

    options: list[str]
    layers: list[str]
    patterns: dict[str, dict[str, Pattern]]
    """By layer and option: the pattern, of all heads alike or one a head."""
    shapes: dict[str, Shape]
    causal: dict[str, bool]
    errors: np.ndarray
    mass: np.ndarray
    density: np.ndarray
    """Pairs of each option over all pairs, ``[options]``: what it costs."""
    seconds: np.ndarray | None
    """What each option takes for one head, ``[options]``; None: not timed."""
    received: dict[str, Tensor]
    """By layer: the mass that each key received, ``[heads, length]``."""
    block: int | tuple[int, int] | None
    """Whether shapes were rounded up to blocks, and to which."""
    projected: bool
    """Whether every layer's output projection was found; else errors are those of the heads' own outputs."""


def record_shapes(
    model: nn.Module,
    inputs: Sequence[Any],
    shape: Sequence[int],
    *,
    prefix: int = 0,
    suffix: int = 0,
    block: int | tuple[int, int] | None = None,
    widths: Sequence[int] = WIDTHS,
    timed: bool = False,
    anatomy: Anatomy | None = None,
) -> ShapeErrors:
    """The error of every option of `video_options` in every self-attention head.

    Two dense runs of each calibration input: the first finds the keys that receive most, the second tries the options.

    Args:
        model: any model that the seam sees; run without gradients and in evaluation mode.
        inputs: of several prompts and steps, with both guidance branches: dicts, tuples or tensors for ``model``.
        shape, prefix, suffix: tokens of the video and of the text around it, see `video_options`.
        block: None: exact shapes; 64 or (256, 64), say: rounded up to whole blocks of tokens, or of (queries, keys),
            which kernels run faster; see `video_options`.
        widths: of diagonals and multi-diagonals, see `video_options`.
        timed: whether to time every option on this machine, for plans by seconds.
        anatomy: the model's parts, where its output projections cannot be found.

    Raises:
        ValueError: for no inputs, a layer that attends over another number of tokens, and calls without positions.
    """
    if not inputs:
        raise ValueError("inputs must be at least one calibration input, got none")
    length = prefix + prod(shape) + suffix
    with quiet(model):
        parts = anatomy
        if parts is None:
            parts = find_anatomy(model, inputs[0])
        received = _Received(length)
        how: dict[str, Any] = {"prefix": prefix, "suffix": suffix, "block": block, "widths": tuple(widths)}
        tried = _Tried(shape, how, received, projections(model, parts), CostModel() if timed else None)
        for handler in (received, tried):
            for given in inputs:
                with Seam(model, handler, edits=True):
                    run(model, given)
    return tried.found()


@dataclass(eq=False)
class _Received:
    """A handler: the mass that each key receives, ``[heads, length]`` a layer."""

    length: int

    def __post_init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, call: Call) -> Tensor | None:
        if call.kind != "self":
            return None
        name = label_of(call)
        try:
            refuse_call(call)
            if call.k.shape[2] != self.length or call.q.shape[2] != self.length:
                raise ValueError(f"attends over {call.k.shape[2]} tokens, shape, prefix and suffix say {self.length}")
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        ones = torch.ones(1, self.length, 1, device=call.q.device)
        mass = column_mass(call.q, call.k, ones, mask=call.mask, is_causal=call.is_causal, scale=call.scale)
        mass = mass[:, :, 0].sum(0)
        self.sums[name] = self.sums[name] + mass if name in self.sums else mass
        return None


class _Tried:
    """A handler: every option beside the dense output."""

    def __init__(
        self,
        shape: Sequence[int],
        how: dict[str, Any],
        received: _Received,
        projections: dict[str, tuple[str, Tensor]],
        cost: CostModel | None,
    ) -> None:
        self.shape, self.how, self.cost = shape, how, cost
        self.seconds: np.ndarray | None = None
        self.received, self.projections = received, projections
        self.patterns: dict[str, dict[str, Pattern]] = {}
        self.alike: dict[str, Pattern] = {}
        self.shapes: dict[str, Shape] = {}
        self.causal: dict[str, bool] = {}
        self.lost: dict[str, Tensor] = {}  # [heads, options]
        self.size: dict[str, Tensor] = {}  # [heads]
        self.mass: dict[str, list[Tensor]] = {}

    def __call__(self, call: Call) -> Tensor | None:
        if call.kind != "self":
            return None
        name, inputs = label_of(call), inputs_of(call)
        if name not in self.patterns:
            made = video_options(self.shape, self.received.sums[name], **self.how)
            # shapes that are alike in all layers are one object, so that a plan has one option of them
            self.patterns[name] = {n: p if p.heads else self.alike.setdefault(n, p) for n, p in made.items()}
            self.shapes[name], self.causal[name] = shape_of(inputs), call.causal
            if self.cost is not None and self.seconds is None:
                self.seconds = _timed(self.cost, inputs, self.patterns[name])
        full, lse = _attended(inputs, Full())
        gram = self._gram(name, inputs)
        lost, mass = [], []
        for pattern in self.patterns[name].values():
            if pattern == Full():
                lost.append(torch.zeros(full.shape[1], dtype=torch.float64))
                mass.append(torch.ones(full.shape[1], dtype=torch.float64))
                continue
            out, part = _attended(inputs, pattern)
            lost.append(_energy(full - out, gram))
            mass.append((part - lse).exp().double().mean((0, 2)).cpu())
        for sums, new in ((self.lost, torch.stack(lost, 1)), (self.size, _energy(full, gram))):
            sums[name] = sums[name] + new if name in sums else new
        self.mass.setdefault(name, []).append(torch.stack(mass, 1))
        return full.to(call.result_dtype)

    def _gram(self, name: str, inputs: Inputs) -> Tensor | None:
        """``W_h W_h^T`` of each head's part of the output projection, float32 ``[heads, v_dim, v_dim]``."""
        heads, v_dim = inputs.q.shape[1], inputs.v.shape[3]
        found = self.projections.get(name.split("#")[0])
        if found is None or found[1].shape[1] != heads * v_dim:
            return None
        blocks = found[1].detach().float().view(-1, heads, v_dim).permute(1, 2, 0)
        return blocks @ blocks.transpose(1, 2)

    def found(self) -> ShapeErrors:
        """The sums, divided."""
        layers = list(self.patterns)
        if not layers:
            raise ValueError("model made no self-attention call that the seam saw")
        first = self.patterns[layers[0]]
        length = self.received.length
        heads = {self.lost[name].shape[0] for name in layers}
        if len(heads) > 1:
            raise ValueError(f"layers must have as many heads as one another, got {sorted(heads)}")
        errors = [
            torch.where(self.size[n][:, None] > 0, self.lost[n] / self.size[n].clamp(min=1e-300)[:, None], 0)
            for n in layers
        ]
        return ShapeErrors(
            options=list(first),
            layers=layers,
            patterns=self.patterns,
            shapes=self.shapes,
            causal=self.causal,
            errors=torch.stack(errors).numpy(),
            mass=torch.stack([torch.stack(self.mass[n]).mean(0) for n in layers]).numpy(),
            density=np.array([density_of(p, length, length) for p in first.values()]),
            block=self.how["block"],
            seconds=self.seconds,
            received=self.received.sums,
            projected=all(n.split("#")[0] in self.projections for n in layers),
        )


def _timed(cost: CostModel, inputs: Inputs, patterns: dict[str, Pattern]) -> np.ndarray:
    """Seconds of every option for the last head, as a plan would run it."""
    last = inputs.q.shape[1] - 1
    options = [FIXED[name] if name in FIXED else Option(name, one_head(p, last)) for name, p in patterns.items()]
    cost.time(inputs, options)
    return np.array([cost.seconds(shape_of(inputs), option, 1) for option in options])


def _attended(inputs: Inputs, pattern: Pattern) -> tuple[Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    how: dict[str, Any] = {"q_start": inputs.q_start, "bias": inputs.bias, "scale": inputs.scale, "return_lse": True}
    out, lse = attend(q, k, v, inputs.place(pattern), **how)
    return out, lse


def _energy(x: Tensor, gram: Tensor | None) -> Tensor:
    """``sum |x W_h|^2`` of each head, float64 ``[heads]``."""
    x = x.float()
    y = x if gram is None else x @ gram
    return (x * y).double().sum((0, 2, 3)).clamp(min=0).cpu()


def plan_shapes(
    found: ShapeErrors,
    budget: float | int,
    *,
    eps: float | int = 0.1,
    by: Literal["operations", "seconds"] = "operations",
) -> np.ndarray:
    """The option of each head ``[layers, heads]`` with the least summed error at ``budget`` of what dense heads cost.

    Options whose error is above eps are not on offer, but "full", as far as the budget allows: see `search_shapes`.

    Args:
        found: what each option loses.
        budget: share of the dense operations, or seconds.
        eps: as said.
        by: what an option costs: its pairs, as in the paper, or its time on this machine, where a pair in one shape may
            take longer than in another.

    Raises:
        ValueError: for a budget that no choice meets, with the least that one does; for seconds that were not timed.
    """
    if by not in ("operations", "seconds"):
        raise ValueError(f'by must be "operations" or "seconds", got {by!r}')
    costs = found.density
    if by == "seconds":
        if found.seconds is None:
            raise ValueError('by="seconds" needs options that were timed: record_shapes(..., timed=True)')
        costs = found.seconds / found.seconds[found.options.index("full")]
    layers, heads, _ = found.errors.shape
    return search_shapes(found.errors, found.options, costs, budget * layers * heads, eps)[0].which


def planned(model: nn.Module, found: ShapeErrors, which: Any) -> Plan:
    """A choice ``[layers, heads]`` of `found`'s options as a `Plan`, to apply, save and load."""
    known = dict(FIXED)
    layers: dict[str, tuple[Option, ...]] = {}
    heads = []
    for n, name in enumerate(found.layers):
        given = []
        for head, m in enumerate(np.asarray(which)[n].tolist()):
            option, of = found.options[m], found.patterns[name]
            named = f"{option} of {name}, head {head}" if of[option].heads else option
            if named not in known:
                known[named] = Option(named, one_head(of[option], head))
            given.append(known[named])
            heads.append(
                {
                    "layer": name,
                    "head": head,
                    "role": kind_of_shape(option),
                    "given": known[named].name,
                    "why": f"error {found.errors[n, head, m]:.3g} at {found.density[m]:.3g} of the operations",
                    "error": float(found.errors[n, head, m]),
                    "mass": float(found.mass[n, head, m]),
                }
            )
        layers[name] = tuple(given)
    who = identity(model, found.layers)
    return Plan(layers=layers, shapes=dict(found.shapes), model=who, causal=dict(found.causal), heads=heads)
