"""Weight against distance on a grid of patches."""

from __future__ import annotations

import xarray as xr

from regard.watch.atlas import Atlas

from .registry import measure, ratio

PAPER = "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt, arXiv 2303.13731"


@measure(
    "ring_strength", formula="mean over patch rows of sum_{patches j at distance r} P_ij", range=(0, 1), paper=PAPER
)
def ring_strength(atlas: Atlas, per_patch: bool = False) -> xr.DataArray:
    """Mean mass on the patches at each Chebyshev distance, [layer, head, ring]; `per_patch`: mean weight of one such.

    Keys outside the grid (a class token) are in no ring, so the rings sum to 1 less their mass.
    """
    return ratio(atlas.need("ring_mass"), atlas.need("ring_patches" if per_patch else "ring_rows"))
