"""How spread a head's weights are."""

from __future__ import annotations

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas

from .registry import measure, ratio

INF = float("inf")
GROKKING = "Weight Decay Regimes in Grokking Transformers, arXiv 2605.20441"


@measure("entropy", formula="mean_i H_i, H_i = -sum_j P_ij log P_ij", range=(0, INF), units="nat")
def entropy(atlas: Atlas) -> xr.DataArray:
    """Mean entropy of a row of weights, [layer, head]."""
    return ratio(atlas.need("entropy"), atlas.need("rows"))


@measure("entropy_norm", formula="mean_i H_i / log n_i over rows with n_i >= 2 allowed keys", range=(0, 1))
def entropy_norm(atlas: Atlas) -> xr.DataArray:
    """Mean entropy as a share of the most a row could have, [layer, head]."""
    return ratio(atlas.need("entropy_norm"), atlas.need("entropy_norm_rows"))


@measure("entropy_at", formula="mean of H_i over the rows of a relative position", range=(0, INF), units="nat")
def entropy_at(atlas: Atlas) -> xr.DataArray:
    """Mean entropy by relative position of the row, [layer, head, bin]."""
    return ratio(atlas.need("entropy_at"), atlas.need("rows_at"))


@measure(
    "entropy_spread", formula="population std over heads of mean_i H_i", range=(0, INF), units="nat", paper=GROKKING
)
def entropy_spread(atlas: Atlas) -> xr.DataArray:
    """How differently the heads of a layer spread their weights, [layer]; the paper averages it over layers."""
    return entropy(atlas).std("head", ddof=0, skipna=True)


@measure(
    "head_similarity",
    formula="mean over head pairs h != g of <P^h, P^g> / (|P^h| |P^g|), weights of all rows as one vector",
    range=(0, 1),
    paper=GROKKING,
)
def head_similarity(atlas: Atlas) -> xr.DataArray:
    """Mean cosine between the weight maps of a layer's heads, [layer]; NaN in layers of one head."""
    gram = atlas.need("head_gram")
    values = gram.values
    norm = np.sqrt(np.diagonal(values, axis1=1, axis2=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = values / (norm[:, :, None] * norm[:, None, :])
    off = ~np.eye(values.shape[1], dtype=bool) & np.isfinite(cosine)
    count = off.sum((1, 2))
    total = np.where(off, cosine, 0.0).sum((1, 2))
    mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return xr.DataArray(mean, dims="layer", coords={"layer": gram["layer"]})


@measure("top1", formula="mean_i max_j P_ij", range=(0, 1))
def top1(atlas: Atlas) -> xr.DataArray:
    """Mean of the largest weight of a row, [layer, head]."""
    return ratio(atlas.need("top1_weight"), atlas.need("rows"))


@measure("participation", formula="1 / mean_i sum_j P_ij^2", range=(1, INF), units="keys")
def participation(atlas: Atlas) -> xr.DataArray:
    """How many equally weighted keys would give the same mean squared weight, [layer, head]."""
    return ratio(atlas.need("rows"), atlas.need("sq"))
