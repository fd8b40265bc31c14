"""Weight maps by kind: their codes in the plane, and the mean map of every cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["head_patterns", "plane"]

Floats = NDArray[np.floating[Any]]


def plane(codes: Floats) -> Floats:
    """The two leading principal coordinates of the codes ``[n, 2]``."""
    centred = codes - codes.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :2] * sizes[:2]


def head_patterns(codes: Floats, clusters: NDArray[Any], layers: NDArray[Any], maps: Floats) -> Figure:
    """One point a map, coloured by cluster and larger in later layers; beside it each cluster's mean map.

    Args:
        codes: of the maps ``[n, d]``, d at least 2; drawn by `plane`.
        clusters: of each map, whole numbers from 0.
        layers: of each map.
        maps: ``[n, height, width]``.

    Raises:
        ValueError: lengths that differ, or codes of one dimension.
    """
    n = len(codes)
    if codes.ndim != 2 or codes.shape[1] < 2:
        raise ValueError(f"codes must be [n, d] with d at least 2, got shape {codes.shape}")
    for name, value in (("clusters", clusters), ("layers", layers), ("maps", maps)):
        if len(value) != n:
            raise ValueError(f"{name} must be one for each of the {n} codes, got {len(value)}")
    kinds = np.unique(clusters)
    columns = -(-len(kinds) // 2)
    figure = Figure(figsize=(3.6 + 1.15 * columns, 3.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(3.6, 1.15 * columns))
    left, right = parts
    ax, points, colours = left.subplots(), plane(codes), colormaps["tab10"]
    for k, kind in enumerate(kinds):
        some = clusters == kind
        ax.scatter(*points[some].T, s=4 + 5 * layers[some], color=colours(k % 10), lw=0, alpha=0.6)
    ax.set_xlabel("first principal coordinate of the codes")
    ax.set_ylabel("second")
    ax.spines[["top", "right"]].set_visible(False)
    axes = right.subplots(2, columns, squeeze=False).ravel()
    for k, kind in enumerate(kinds):
        some = clusters == kind
        axes[k].imshow(maps[some].mean(0), cmap="magma")
        axes[k].set_title(f"{some.sum()} maps\nlayer {layers[some].mean():.1f}", fontsize=7, color=colours(k % 10))
    for each in axes:
        each.set_xticks([])
        each.set_yticks([])
    for each in axes[len(kinds) :]:
        each.set_visible(False)
    return figure
