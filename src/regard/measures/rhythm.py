"""Two signals of a reasoning text: how far a token looks back (WAAD), how much later ones look at it (FAI)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .distance import mean_distance
from .registry import measure

PAPER = "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm, arXiv 2510.13554"


def middle_layers(count: int, layers: int = 5) -> list[int]:
    """Up to `layers` evenly spaced layer indices of the middle third of `count` layers."""
    third = np.arange(count // 3, max(count - count // 3, count // 3 + 1))
    return sorted({int(i) for i in third[np.linspace(0, len(third) - 1, min(layers, len(third))).round().astype(int)]})


def ranked_heads(atlas: Atlas, share: float, layers: int, farthest: bool) -> xr.DataArray:
    """The (layer, head) pairs of the middle layers that look nearest or farthest on average, a `share` of them."""
    if not 0 < share <= 1:
        raise AtlasError(f"share: must be in (0, 1], got {share}")
    if "self" not in atlas["kind"].values:
        raise AtlasError("atlas: no self-attention layer in it")
    own = np.flatnonzero(atlas["kind"].values == "self")
    rank = mean_distance(atlas).isel(layer=own[middle_layers(len(own), layers)]).stack(lh=("layer", "head"))
    rank = rank.dropna("lh").sortby(rank.dropna("lh"), ascending=not farthest)
    return rank["lh"][: max(1, round(share * rank.sizes["lh"]))]


def _mean(values: xr.DataArray, heads: xr.DataArray) -> xr.DataArray:
    picked = [values.sel(layer=layer, head=head, drop=True) for layer, head in heads.values]
    dims = ("layer_index", "heads", "kind", "causal")
    return sum(p.drop_vars(dims, errors="ignore") for p in picked) / len(picked)  # type: ignore[return-value]


@measure("waad", formula="sum_s Pbar_local[t, s] min(t - s, 10)", range=(0, 10), units="tokens", paper=PAPER)
def waad(atlas: Atlas, share: float = 0.3, layers: int = 5) -> xr.DataArray:
    """Windowed average attention distance of each token, [sample, position]; NaN outside the rows watched.

    Averaged over the nearest-looking `share` of the heads of `layers` layers of the middle third.
    """
    return _mean(atlas.need("clipped_raw"), ranked_heads(atlas, share, layers, farthest=False))


@measure("fai", formula="mean of Pbar_global[t, s] over rows s+10 <= t <= s+100", range=(0, 1), paper=PAPER)
def fai(atlas: Atlas, share: float = 0.3, layers: int = 5) -> xr.DataArray:
    """Future attention influence of each token, [sample, key]; NaN where no row lies in the band.

    Averaged over the farthest-looking `share` of the heads of `layers` layers of the middle third.
    """
    return _mean(atlas.need("banded_raw"), ranked_heads(atlas, share, layers, farthest=True))
