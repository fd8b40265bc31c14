"""Directions in a space of hidden states: how to find them, take vectors apart along them, and read them out.

States are rows, `[n, dim]`. Sums are taken in float64 and come back in the dtype of what was given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "Adapter",
    "Principal",
    "axis_split",
    "class_directions",
    "distortion",
    "gram_schmidt",
    "mean_difference",
    "principal",
    "project",
    "remove",
    "ridge",
    "share_within",
]


def mean_difference(a: Float[Tensor, "m dim"], b: Float[Tensor, "n dim"]) -> Float[Tensor, "dim"]:
    """`mean(a) - mean(b)`: from b towards a. Not scaled.

    Raises:
        ValueError: one of the two has no row.
    """
    for name, x in (("a", a), ("b", b)):
        if not len(x):
            raise ValueError(f"{name} must have at least one row, got shape {tuple(x.shape)}")
    return (a.double().mean(0) - b.double().mean(0)).to(a.dtype)


class Principal(NamedTuple):
    """Principal components: `directions` [k, dim], orthonormal rows, and the `share` of the variance each carries."""

    directions: Tensor
    share: Tensor


def principal(x: Float[Tensor, "n dim"], k: int) -> Principal:
    """The first k principal components of the rows of x, centred; the largest coordinate of each is positive.

    Raises:
        ValueError: k is not in 1..min(n - 1, dim): centred rows span no more.
    """
    most = min(len(x) - 1, x.shape[1])
    if not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most} for {tuple(x.shape)} centred rows, got {k}")
    centred = x.double() - x.double().mean(0)
    _, sizes, rows = torch.linalg.svd(centred, full_matrices=False)
    rows = rows[:k]
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # the SVD leaves signs open
    variance = sizes.square()
    share = variance[:k] / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Principal((rows * sign).to(x.dtype), share.to(x.dtype))


class Adapter(NamedTuple):
    """A linear map with its offset: `y = x @ weight + offset`."""

    weight: Tensor
    offset: Tensor

    def __call__(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n targets"]:
        """`x @ weight + offset`."""
        return x @ self.weight + self.offset


def ridge(x: Float[Tensor, "n dim"], y: Float[Tensor, "n targets"], alpha: float | int) -> Adapter:
    """The map W that minimises `||(x - mean) W - (y - mean)||^2 + alpha ||W||^2`, with its offset.

    Solved in the smaller of the two spaces (rows or dimensions). `alpha = 0` is least squares, of least norm.

    Raises:
        ValueError: a negative alpha, or x and y with different numbers of rows.
    """
    if alpha < 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have as many rows, got {len(x)} and {len(y)}")
    wide_x, wide_y = x.double(), y.double()
    mean_x, mean_y = wide_x.mean(0), wide_y.mean(0)
    cx, cy = wide_x - mean_x, wide_y - mean_y
    if alpha == 0:
        weight = torch.linalg.pinv(cx) @ cy
    elif cx.shape[0] < cx.shape[1]:
        gram = cx @ cx.T + alpha * torch.eye(len(cx), dtype=cx.dtype, device=cx.device)
        weight = cx.T @ torch.linalg.solve(gram, cy)
    else:
        gram = cx.T @ cx + alpha * torch.eye(cx.shape[1], dtype=cx.dtype, device=cx.device)
        weight = torch.linalg.solve(gram, cx.T @ cy)
    return Adapter(weight.to(x.dtype), (mean_y - mean_x @ weight).to(x.dtype))


def gram_schmidt(vectors: Float[Tensor, "k dim"]) -> Float[Tensor, "k dim"]:
    """Orthonormal rows: `e_i = unit(v_i - sum_{j<i} (v_i . e_j) e_j)`, so the first keeps its direction.

    Raises:
        ValueError: a vector lies in the span of those before it (to 1e-6 of its length), or is 0.
    """
    found: list[Tensor] = []
    for i, vector in enumerate(vectors.double()):
        rest = vector.clone()
        for _ in range(2):  # once more: what rounding left of the earlier directions
            for e in found:
                rest = rest - (rest @ e) * e
        if rest.norm() <= 1e-6 * vector.norm():
            raise ValueError(f"vectors: row {i} is 0 or lies in the span of the rows before it")
        found.append(rest / rest.norm())
    return torch.stack(found).to(vectors.dtype) if found else vectors.clone()


def class_directions(
    x: Float[Tensor, "n dim"], labels: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "1 dim"], Float[Tensor, "others dim"]]:
    """The common direction of the class means of x, and the directions in which they diverge.

    `e = unit(mean_c m_c)` and, Gram-Schmidt after it, `m_c - m_0` for every class but the first, [classes - 1, dim].

    Raises:
        ValueError: one class only, or means that lie in fewer directions.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(classes)}")
    means = torch.stack([x[labels == c].double().mean(0) for c in classes])
    basis = gram_schmidt(torch.cat([means.mean(0, keepdim=True), means[1:] - means[:1]])).to(x.dtype)
    return basis[:1], basis[1:]


def project(x: Float[Tensor, "*rows dim"], basis: Float[Tensor, "k dim"]) -> Float[Tensor, "*rows k"]:
    """Coordinates of x along the orthonormal rows of `basis`: `x . e_i`."""
    return x @ basis.T


def share_within(x: Float[Tensor, "*rows dim"], basis: Float[Tensor, "k dim"]) -> Float[Tensor, "*rows"]:
    """The share of `||x||^2` in the span of the orthonormal rows of `basis`; NaN for x = 0."""
    return project(x, basis).square().sum(-1) / x.square().sum(-1)


def remove(
    x: Float[Tensor, "*rows dim"], basis: Float[Tensor, "k dim"], around: Float[Tensor, "dim"] | None = None
) -> Float[Tensor, "*rows dim"]:
    """x without its part in the span of the orthonormal rows of `basis`, around a point: `x - ((x - c) . e_i) e_i`.

    `around=None`: around the origin. Around the mean of a set, the set's mean stays where it is.
    """
    centred = x if around is None else x - around
    return x - project(centred, basis) @ basis


def axis_split(v: Float[Tensor, "*rows dim"], axis: Float[Tensor, "*#rows dim"]) -> tuple[Tensor, Tensor]:
    """v in its part along an axis and the rest: `(v . a) a` and `v - (v . a) a`, a the unit vector of the axis.

    Raises:
        ValueError: an axis of length 0.
    """
    norm = axis.norm(dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError("axis has length 0, so it has no direction")
    unit = axis / norm
    along = (v * unit).sum(-1, keepdim=True) * unit
    return along, v - along


def distortion(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim_y"]) -> float:
    """How far a map of points x_n -> y_n is from a scaled isometry: the standard deviation over pairs of
    `log(||y_n - y_m|| / ||x_n - x_m||)`; 0 for an isometry up to scale.

    Raises:
        ValueError: fewer than three points, or two that coincide in x or in y.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"x and y must hold the same points, at least 3; got {len(x)} and {len(y)} rows")
    before, after = (torch.nn.functional.pdist(points.double()) for points in (x, y))
    if bool((before == 0).any()) or bool((after == 0).any()):
        raise ValueError("two points coincide, so the ratio of their distances is not defined")
    return float((after / before).log().std(correction=0))
