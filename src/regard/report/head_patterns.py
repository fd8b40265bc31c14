"""Weight maps by kind: their codes in the plane, and the mean map of every cluster.

``python -m regard.report.head_patterns FILE.png`` draws those of the shipped vision transformer on 60 digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["head_patterns", "main", "plane"]

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


def main(path: str, images: int = 60, steps: int = 800, seed: int = 0) -> None:
    """Writes the kinds of maps that the shipped vision transformer has on some test digits."""
    from regard.tasks.map_kinds import clustered, codes, patch_maps
    from regard.tasks.testbeds import load
    from regard.tasks.vision import digits, normalised

    model = load("testbed:vit").model
    maps = patch_maps(model, {"pixel_values": normalised(digits("test").x[:images])})
    found, count = codes(maps, seed, steps=steps), model.config.num_hidden_layers
    layers = np.repeat(np.arange(count), len(maps) // count)
    kinds = clustered(found, seed)
    head_patterns(found.numpy(), kinds.numpy(), layers, maps[:, 0].numpy()).savefig(path, dpi=150)


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
