"""Reading what a model computes at sites, and the gradient of a metric by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.edits import Edit
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.running import Backend
from regard.watch.session import Session
from regard.watch.site import Site

Metric = Callable[[Tensor], Tensor]


def trace(
    model: nn.Module,
    inputs: Any,
    sites: Sequence[Site] | Site,
    grad: bool = False,
    *,
    metric: Metric | None = None,
    edits: Sequence[Edit] | Edit = (),
    freeze: Mapping[Site, Tensor] | None = None,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "fused",
) -> Any:
    """Run the model once and read the tensors at `sites`, as they are used (after edits at the same site).

    Args:
        model: the module to run, in the mode it is in.
        inputs: a dict for `model(**inputs)`, a tuple for `model(*inputs)`, or a tensor.
        sites: one or several. `weights` are computed from q and k in float32 (float64 for float64 models) and cost
            memory for the matrix; `k` and `v` have the key heads.
        grad: also return the gradient of `metric`.
        metric: logits -> one number a sample, or one in all; their sum is differentiated.
        edits, freeze, anatomy, valid, backend: as in `intervene`, for this one run.

    Returns:
        {site: value}, detached copies; with `grad=True` {site: (value, d metric / d value)}. For `weights` the gradient
        is `g_i . v_j` with g_i the gradient by z_i. The parameters' `.grad` stay as they were.

    Raises:
        As `intervene`; IndexError for a position that a sample does not have.
    """
    wanted = [sites] if isinstance(sites, Site) else list(sites)
    changes = [edits] if isinstance(edits, Edit) else list(edits)
    if grad and metric is None:
        raise ValueError("trace(grad=True) needs metric=, a function of the logits")
    if metric is not None and not grad:
        raise ValueError("metric= is used with grad=True only")
    session = Session(
        model,
        [(e, None) for e in changes],
        freeze,
        wanted,
        parts=anatomy,
        inputs=inputs,
        valid=valid,
        backend=backend,
        grad=grad,
    )
    with torch.set_grad_enabled(grad), session:
        output = run(model, inputs)
    for site in wanted:
        if site not in session.readings:
            raise RuntimeError(f"{site}: its module did not run in this forward pass")
    if metric is None:
        return {site: session.readings[site].value for site in wanted}
    scores = metric(find_logits(output)[0])
    if not scores.requires_grad:
        raise ValueError("metric= must be a differentiable function of the logits; its result has no gradient")
    sources = [session.readings[site].source for site in wanted]
    gradients = torch.autograd.grad(scores.sum(), sources, allow_unused=True)  # type: ignore[arg-type]
    result = {}
    for site, source, gradient in zip(wanted, sources, gradients, strict=True):
        # A site that the metric does not depend on has gradient 0.
        g = torch.zeros_like(source) if gradient is None else gradient
        result[site] = (session.readings[site].value, session.readings[site].cut(g).detach().clone())
    return result
