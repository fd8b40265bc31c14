"""What training did to a model, and what rounding does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.quantized import quantize

__all__ = [
    "Commutator",
    "Trajectory",
    "commutator",
    "curve_like",
    "eight_bits",
    "flat",
    "head_numbers",
    "parameters_of",
    "trajectory_pca",
    "walk_like",
    "weight_drift",
    "weights",
]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters, by name, to measure `weight_drift` from."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def weight_drift(before: Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor]) -> dict[str, float]:
    """How far each matrix moved: ``|W - W0|_F / |W0|_F``, in float64, for the parameters of two dimensions.

    Args:
        before: W0 by name, as `weights` gives them.
        after: the model trained, or its weights.

    Raises:
        ValueError: the names or a shape differ, or a matrix was 0.
    """
    now = weights(after) if isinstance(after, nn.Module) else after
    if set(now) != set(before):
        raise ValueError(
            f"before and after must hold the same parameters, they differ in {sorted(set(now) ^ set(before))}"
        )
    drift = {}
    for name, start in before.items():
        if now[name].shape != start.shape:
            raise ValueError(f"{name} must keep its shape, {tuple(start.shape)} became {tuple(now[name].shape)}")
        if start.ndim != 2:
            continue
        size = float(start.double().norm())
        if size == 0:
            raise ValueError(f"{name} was 0, so there is nothing to measure its drift by")
        drift[name] = float((now[name].double() - start.double()).norm()) / size
    return drift


def parameters_of(model: nn.Module | Mapping[str, Tensor], part: str | Sequence[str] = "*") -> dict[str, Tensor]:
    """The parameters whose names match a shell-style pattern, or one of several, in the model's order.

    Raises:
        ValueError: none matches.
    """
    patterns = [part] if isinstance(part, str) else list(part)
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    found = {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not found:
        raise ValueError(f"part must match a parameter, {patterns} match none of {', '.join(named)}")
    return found


def flat(model: nn.Module | Mapping[str, Tensor], part: str | Sequence[str] = "*") -> Tensor:
    """The parameters of a part as one vector, float64."""
    return torch.cat([p.detach().double().flatten() for p in parameters_of(model, part).values()])


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Principal axes of the points that training passed through.

    Attributes:
        shares: of the variance, of each axis, falling ``[axes]``; at most one axis fewer than points.
        axes: orthonormal rows ``[axes, parameters]``.
        coordinates: of each point from the mean ``[points, axes]``.
    """

    shares: Float[Tensor, "axes"]
    axes: Float[Tensor, "axes parameters"]
    coordinates: Float[Tensor, "points axes"]

    def dimension(self, share: float = 0.95) -> int:
        """Axes that together hold this share of the variance."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        return int((self.shares.cumsum(0) < share - 1e-12).sum()) + 1

    def basis(self, share: float = 0.95) -> Float[Tensor, "dimension parameters"]:
        """Those axes."""
        return self.axes[: self.dimension(share)]


def trajectory_pca(
    checkpoints: Sequence[Mapping[str, Tensor]] | Float[Tensor, "points parameters"], part: str | Sequence[str] = "*"
) -> Trajectory:
    """Principal components of a parameter trajectory, centred, in float64, through the points' Gram matrix.

    Few components say little by themselves: of a random walk in many dimensions the first holds ``6 / pi^2`` = 61% of
    the variance, and any smooth curve looks as flat. Compare with `walk_like` and `curve_like`. Checkpoints should be
    evenly spaced in steps. After arXiv 2602.10496.

    Args:
        checkpoints: weights by name, as `weights` gives them; or points, one a row.
        part: names of the parameters that count, shell-style; not for points.

    Raises:
        ValueError: fewer than two points, or all the same.
    """
    if isinstance(checkpoints, Tensor):
        points = checkpoints.double()
    else:
        points = torch.stack([flat(c, part) for c in checkpoints]) if len(checkpoints) else torch.zeros(0, 1)
    if len(points) < 2:
        raise ValueError(f"checkpoints must hold at least 2 points, got {len(points)}")
    centred = points - points.mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if values[0] <= 1e-24 * points.square().sum():
        raise ValueError("checkpoints must differ, got the same point every time")
    kept = int((values > 1e-12 * values[0]).sum())
    lengths = values[:kept].sqrt()
    axes = (vectors[:, :kept] / lengths).T @ centred
    return Trajectory(values[:kept] / values[:kept].sum(), axes, vectors[:, :kept] * lengths)


def walk_like(points: Float[Tensor, "points parameters"], generator: torch.Generator) -> Tensor:
    """A random walk with as many steps, each as long as the trajectory's, in directions drawn at random."""
    steps = points.double().diff(dim=0)
    drawn = torch.randn(steps.shape, generator=generator, dtype=torch.float64)
    drawn *= steps.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
    return torch.cat([torch.zeros_like(drawn[:1]), drawn.cumsum(0)])


def curve_like(points: Float[Tensor, "points parameters"], generator: torch.Generator, waves: int = 3) -> Tensor:
    """A smooth curve of the trajectory's length in random directions, run through at even speed.

    ``sum_(k=1..waves) cos(pi k t) u_k / k``, u_k normal, t from 0 to 1: it has at most ``waves`` dimensions and the
    same length, so a trajectory flatter than it is flat beyond being smooth.
    """
    count, width = points.shape
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    k = torch.arange(1, waves + 1, dtype=torch.float64)
    curve = (torch.cos(math.pi * k * t) / k) @ torch.randn(waves, width, generator=generator, dtype=torch.float64)
    length = points.double().diff(dim=0).norm(dim=1).sum()
    return curve * (length / curve.diff(dim=0).norm(dim=1).sum())


@dataclass(frozen=True)
class Commutator:
    """What the order of two steps of SGD changes.

    Attributes:
        delta: ``theta_ab - theta_ba`` (a first, less b first) of the part, one vector, float64.
        defect: ``|delta| / (|lr g_a| |lr g_b|)``, gradients at the start.
    """

    delta: Float[Tensor, "parameters"]
    defect: float

    def inside(self, basis: Float[Tensor, "dimension parameters"]) -> float:
        """``|B delta|^2 / |delta|^2``: the share of its energy in the span of orthonormal rows.

        A random subspace of k of n dimensions holds k / n of it on average. NaN where the order changes nothing.
        """
        total = self.delta.square().sum()
        return float((basis.double() @ self.delta).square().sum() / total) if total > 0 else math.nan


def commutator(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch_a: Any,
    batch_b: Any,
    lr: float,
    part: str | Sequence[str] = "*",
) -> Commutator:
    """Two plain SGD steps (no momentum, no state) on two batches, in both orders, from the model's weights.

    All parameters step; the part alone is compared. For a quadratic loss ``delta = lr^2 (H_b g_a - H_a g_b)`` exactly.
    The model is left as it was. Dropout must be off: it would differ between the orders. In the model's precision:
    a ``delta`` far below the rounding of the weights is noise, so use float64 where lr is small.

    Raises:
        ValueError: the model is in training mode and has dropout; lr is not positive; a gradient is 0.
    """
    if lr <= 0:
        raise ValueError(f"lr must be positive, got {lr}")
    dropouts = [m for m in model.modules() if m.training and "Dropout" in type(m).__name__ and getattr(m, "p", 0.0) > 0]
    if dropouts:
        raise ValueError(f"model must be in eval mode, its {type(dropouts[0]).__name__} would differ between orders")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = parameters_of(start, part)

    def gradient(at: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(at[name])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            found = torch.autograd.grad(loss(model, batch), list(trained.values()), allow_unused=True)
        return {name: g for name, g in zip(trained, found, strict=True) if g is not None}

    def step(at: dict[str, Tensor], g: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p - lr * g[name] if name in g else p for name, p in at.items()}

    try:
        g_a, g_b = gradient(start, batch_a), gradient(start, batch_b)
        after_a, after_b = step(start, g_a), step(start, g_b)
        ends = step(after_a, gradient(after_a, batch_b)), step(after_b, gradient(after_b, batch_a))
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
    delta = torch.cat([(ends[0][n].double() - ends[1][n].double()).flatten() for n in chosen])
    norms = [math.sqrt(sum(float(g[n].double().square().sum()) for n in chosen if n in g)) for g in (g_a, g_b)]
    if min(norms) == 0:
        raise ValueError("loss must depend on the part in both batches, got a gradient of 0")
    return Commutator(delta, float(delta.norm()) / (lr**2 * norms[0] * norms[1]))


def head_numbers(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, float]:
    """`head_similarity` and `entropy_spread` of one forward pass, each averaged over layers: to log while training.

    Similarity is 1 where all heads weigh alike, uniform weights included, and high at the start, because weights are
    never negative; spread is 0 there. After arXiv 2605.20441.
    """
    from regard.measures import get
    from regard.watch.recorder import watch
    from regard.watch.settings import Watch

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch(model, statistics=Watch(("entropy", "head_gram"), tokens=False)) as recorder:
            model(*inputs, **named)
    finally:
        model.train(training)
    return {name: float(get(name)(recorder.atlas).mean()) for name in ("head_similarity", "entropy_spread")}


@contextmanager
def eight_bits(model: nn.Module) -> Iterator[None]:
    """Every linear layer's weight and what it reads, rounded to 8 bits while inside: what large values cost the small.

    ``round(x / s) s``, ``s = max |x| / 127`` of a whole weight, and of each sequence's activations. The weights are put
    back at the end.
    """

    def rounded(x: Tensor) -> Tensor:
        return quantize(x, rows=x.shape[-2]).dequantize().to(x.dtype)

    def read(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(given[0]), *given[1:])

    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(read) for m in linear]
    kept = [m.weight.detach().clone() for m in linear]
    try:
        with torch.no_grad():
            for m in linear:
                m.weight.copy_(rounded(m.weight))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for m, weight in zip(linear, kept, strict=True):
                m.weight.copy_(weight)
