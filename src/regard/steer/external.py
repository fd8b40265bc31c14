"""Axes from a signal recorded outside the model, and adapters that read and steer hidden states along them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.steer.directions import ridge

__all__ = ["Independent", "Reader", "external_axes", "fit_adapter", "ica"]


class Independent(NamedTuple):
    """Independent components: `axes` [n, k], of mean 0 and variance 1; `unmixing` [k, dim], `axes = (x - mean) U^T`;
    whether the iteration `converged`."""

    axes: Tensor
    unmixing: Tensor
    converged: bool


def ica(x: Float[Tensor, "n dim"], k: int, seed: int = 0, *, steps: int = 500, tolerance: float = 1e-8) -> Independent:
    """FastICA (Hyvaerinen 1999): x whitened in its first k principal components, then rotated to be least Gaussian.

    All components at once: `W <- E[tanh(W y) y^T] - diag(E[1 - tanh^2(W y)]) W`, orthonormalised as `(W W^T)^(-1/2) W`,
    until no row turns by more than `1 - |cos| = tolerance`. The order is by the share of x's variance that a component
    carries, the sign so that its largest value is positive: neither means anything.

    Args:
        x: samples as rows.
        k: components.
        seed: of the first rotation.
        steps: at most as many.
        tolerance: see above.

    Raises:
        ValueError: k is not in 1..the number of directions that the centred rows span.
    """
    centred = x.double() - x.double().mean(0)
    left, sizes, right = torch.linalg.svd(centred, full_matrices=False)
    rank = int((sizes > sizes[:1] * 1e-10).sum())
    if not 1 <= k <= rank:
        raise ValueError(f"k must be in 1..{rank}, the directions that the centred rows span, got {k}")
    root = len(x) ** 0.5
    white, whitening = left[:, :k] * root, right[:k] / sizes[:k, None] * root
    start = torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.device)
    w, converged = _orthonormal(start), False
    for _ in range(steps):
        y = (white @ w.T).tanh()
        turned = _orthonormal(y.T @ white / len(x) - (1 - y.square()).mean(0)[:, None] * w)
        converged = bool(((turned * w).sum(1).abs() > 1 - tolerance).all())
        w = turned
        if converged:
            break
    unmixing = w @ whitening
    axes = centred @ unmixing.T
    order = (w.square() @ sizes[:k].square()).argsort(descending=True)
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()[0]
    axes, unmixing = (axes * sign)[:, order], (unmixing * sign[:, None])[order]
    return Independent(axes.to(x.dtype), unmixing.to(x.dtype), converged)


def _orthonormal(w: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(w)
    return left @ right


def external_axes(signal: Float[Tensor, "n sensors"], k: int, seed: int = 0) -> Float[Tensor, "n k"]:
    """Axes of a signal with a row an item (a word, say): sensors to equal variance, then `ica`.

    Raises:
        ValueError: a sensor that is constant; k as in `ica`.
    """
    spread = signal.double().std(0, correction=0)
    if bool((spread == 0).any()):
        raise ValueError(f"signal: sensor {int((spread == 0).nonzero()[0])} is constant")
    return ica((signal.double() / spread).to(signal.dtype), k, seed).axes


class Reader(NamedTuple):
    """Reads axes from hidden states: `a_k = w_k . (h - mean) / std + offset_k`; `weight` [dim, k]."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    offset: Tensor

    def __call__(self, hidden: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
        """The axes' values at hidden states."""
        return (hidden - self.mean) / self.std @ self.weight + self.offset

    def direction(self, k: int) -> Float[Tensor, "dim"]:
        """A unit step along axis k in standardised coordinates, as a step of hidden states: `std * w_k / ||w_k||`."""
        w = self.weight[:, k]
        return self.std * w / w.norm()

    def r2(self, hidden: Float[Tensor, "n dim"], axes: Float[Tensor, "n k"]) -> Float[Tensor, "k"]:
        """The share of each axis's variance over these rows that is read: `1 - sum (a - read)^2 / sum (a - mean)^2`."""
        left = (axes - self(hidden)).square().sum(0)
        return 1 - left / (axes - axes.mean(0)).square().sum(0)


def fit_adapter(hidden: Float[Tensor, "n dim"], axes: Float[Tensor, "n k"], alpha: float | int) -> Reader:
    """Ridge regression from standardised hidden states to axes.

    Raises:
        ValueError: a dimension of `hidden` that is constant; as `directions.ridge`.
    """
    mean, std = hidden.mean(0), hidden.std(0, correction=0)
    if bool((std == 0).any()):
        raise ValueError(f"hidden: dimension {int((std == 0).nonzero()[0])} is constant")
    fit = ridge((hidden - mean) / std, axes, alpha)
    return Reader(mean, std, fit.weight, fit.offset)
