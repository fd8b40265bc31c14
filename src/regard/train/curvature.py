"""Kronecker factors of the loss curvature of linear layers, and weights cut to their most curved components."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

__all__ = ["Factors", "components", "curvature_edit", "kfac", "top_products"]


@dataclass(frozen=True, eq=False)
class Factors:
    """K-FAC's factors of one linear layer, float64: sums over batches of products in the model's precision.

    Attributes:
        A: ``E[x x^T]`` of its inputs ``[in, in]``.
        G: ``E[g g^T]`` of the gradients at its outputs ``[out, out]``.
        rows: tokens averaged over.
    """

    A: Float[Tensor, "in in"]
    G: Float[Tensor, "out out"]
    rows: int


def kfac(
    model: nn.Module,
    modules: Sequence[str],
    batches: Iterable[Int[Tensor, "batch length"] | tuple[Tensor, Tensor]],
    sample_labels: bool = True,
    *,
    generator: torch.Generator | None = None,
    logits: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> dict[str, Factors]:
    """Factors of the curvature of a causal language model's loss at its weights, ``A (x) G`` a layer.

    The loss is summed over the tokens predicted, so that g of a token is its own gradient, not a batch's mean, and
    labels are drawn from the model: that is the Fisher matrix, which is the Gauss-Newton one here. With gold labels it
    is the empirical Fisher, another matrix. The last token of a sequence, and whatever predicts padding or is padding,
    counts in neither factor. Measured on memorised text the ranking of components turns round: use other text. After
    arXiv 2510.24256 (Martens & Grosse's K-FAC).

    Args:
        model: called with token ids; in eval mode.
        modules: names of `nn.Linear` modules, each run once a forward pass on ``[batch, length, in]``.
        batches: token ids, or (token ids, mask ``[batch, length]`` that is False at padding).
        sample_labels: False takes the tokens that follow.
        generator: of the labels, on the CPU; needed to draw them.
        logits: of a model and token ids, ``[batch, length, vocab]``; None: ``model(ids)``, or its ``.logits``.

    Returns:
        `Factors` by name. Parameters and their gradients are left alone.

    Raises:
        ValueError: a module that is not there, not linear, not run once, or run on another shape; no generator; no
            token to predict; a model in training mode.
    """
    if model.training:
        raise ValueError("model must be in eval mode, got one in training mode")
    if sample_labels and generator is None:
        raise ValueError("generator must be given to draw labels from the model, got None")
    known = dict(model.named_modules())
    for name in modules:
        if not isinstance(known.get(name), nn.Linear):
            got = "no such module" if name not in known else type(known[name]).__name__
            raise ValueError(f"modules must name nn.Linear modules of the model, {name!r} is {got}")
    logits = _logits if logits is None else logits
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def seen(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            if name in outputs:
                raise ValueError(f"modules must run once a forward pass, {name!r} runs again")
            inputs[name] = given[0].detach()
            # Where nothing below asks for gradients, the graph starts here.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return hook

    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows = 0
    handles = [known[name].register_forward_hook(seen(name)) for name in modules]
    try:
        for batch in batches:
            ids, valid = (batch, torch.ones_like(batch, dtype=torch.bool)) if isinstance(batch, Tensor) else batch
            inputs.clear()
            outputs.clear()
            with torch.enable_grad():
                scores = logits(model, ids)[:, :-1].double()
            counted = (valid[:, :-1] & valid[:, 1:]).to(scores.device)
            _check_run(modules, outputs, ids)
            labels = _drawn(scores.detach(), generator) if sample_labels else ids[:, 1:].to(scores.device)
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(scores[counted], labels[counted], reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
            for name, gradient in zip(modules, gradients, strict=True):
                x, g = (_at_least_float32(part[:, :-1][counted]) for part in (inputs[name], gradient))
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + (x.T @ x).double(), before[1] + (g.T @ g).double())
            rows += int(counted.sum())
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ValueError("batches must hold a token to predict, got none")
    return {name: Factors(a / rows, g / rows, rows) for name, (a, g) in sums.items()}


def top_products(out: Float[Tensor, "out"], into: Float[Tensor, "in"], rho: float | int) -> Bool[Tensor, "out in"]:
    """Which products ``out_i * into_j`` are the largest that together reach ``rho * sum(out) * sum(into)``.

    As few as do; of equal products all or none. Found by bisecting the threshold over sorted factors, so nothing but
    the mask is as large as the outer product. ``rho = 1`` keeps everything, products of 0 too.

    Raises:
        ValueError: rho is not in (0, 1], a factor is negative, or all are 0.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    for name, value in (("out", out), ("into", into)):
        if bool((value < 0).any()) or not bool((value > 0).any()):
            raise ValueError(f"{name} must be non-negative and not all 0, got {value.min():.3g}..{value.max():.3g}")
    if rho == 1:
        return torch.ones(len(out), len(into), dtype=torch.bool, device=out.device)
    rising, order = into.double().sort()
    tails = torch.cat([rising.flip(0).cumsum(0).flip(0), rising.new_zeros(1)])
    rows = out.double()

    def first(threshold: float) -> Tensor:
        """Of each row, how many of the sorted products lie below the threshold."""
        least = torch.where(rows > 0, threshold / rows.clamp(min=torch.finfo(torch.float64).tiny), torch.inf)
        return torch.searchsorted(rising, least)

    wanted = rho * float(rows.sum() * tails[0])
    # The bits of positive floats rise as they do: at most 63 halvings find the largest threshold that reaches it.
    low, high = 0, int((rows.max() * rising[-1]).reshape(1).view(torch.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        threshold = float(torch.tensor([middle]).view(torch.float64))
        low, high = (middle, high) if float((rows * tails[first(threshold)]).sum()) >= wanted else (low, middle)
    start = first(float(torch.tensor([low]).view(torch.float64)))
    mask = torch.zeros(len(out), len(into), dtype=torch.bool, device=out.device)
    return mask.scatter_(1, order.expand(len(out), -1), torch.arange(len(into), device=out.device) >= start[:, None])


def components(
    weight: Float[Tensor, "out in"], A: Float[Tensor, "in in"], G: Float[Tensor, "out out"]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``C = U_G^T W U_A`` with what turns it back: (C, U_G, U_A, lambda, mu), eigenvalues clipped at 0, float64.

    Component (i, j) has curvature ``lambda_i mu_j``.

    Raises:
        ValueError: factors that do not fit the weight.
    """
    wanted = {"A": (A, weight.shape[1]), "G": (G, weight.shape[0])}
    for name, (factor, size) in wanted.items():
        if factor.shape != (size, size):
            raise ValueError(f"{name} must be [{size}, {size}] for {tuple(weight.shape)}, got {tuple(factor.shape)}")
    mu, turn_in = torch.linalg.eigh(A.double())
    lam, turn_out = torch.linalg.eigh(G.double())
    turned = turn_out.T @ weight.detach().double() @ turn_in
    return turned, turn_out, turn_in, lam.clamp(min=0), mu.clamp(min=0)


def curvature_edit(
    weight: Float[Tensor, "out in"], A: Float[Tensor, "in in"], G: Float[Tensor, "out out"], rho: float | int
) -> Float[Tensor, "out in"]:
    """The weight without its flat components: ``W' = U_G (C * mask) U_A^T``, mask from `top_products`.

    What is memorised is sharp item by item but in different directions each, hence flat on average, and goes first;
    what many items share stays. After arXiv 2510.24256.

    Args:
        weight: W of a linear layer.
        A, G: its `Factors`.
        rho: share of the curvature ``sum(lambda) sum(mu)`` to keep, in (0, 1]; 1 gives W back.

    Returns:
        W' in W's dtype. As many components kept as ``top_products(lambda, mu, rho).sum()``.
    """
    if rho == 1:
        return weight.detach().clone()
    turned, turn_out, turn_in, lam, mu = components(weight, A, G)
    return (turn_out @ (turned * top_products(lam, mu, rho)) @ turn_in.T).to(weight.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def _drawn(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    chances = scores.softmax(-1).cpu()
    drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator)
    return drawn.view(chances.shape[:2]).to(scores.device)


def _check_run(modules: Sequence[str], outputs: dict[str, Tensor], ids: Tensor) -> None:
    for name in modules:
        if name not in outputs:
            raise ValueError(f"modules must run once a forward pass, {name!r} does not run")
        if outputs[name].ndim != 3 or outputs[name].shape[:2] != ids.shape:
            want, got = tuple(ids.shape), tuple(outputs[name].shape)
            raise ValueError(f"modules must run on [batch, length, in] = {want}, {name!r} gives {got}")
