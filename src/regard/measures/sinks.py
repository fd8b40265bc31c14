"""Sinks and massive activations: tokens that gather weight, and what their hidden states look like."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .registry import measure, ratio

INF = float("inf")
SINK = "When Attention Sink Emerges in Language Models (Gu et al. 2024), arXiv 2410.10781"
SECONDARY = "On the Existence and Behaviour of Secondary Attention Sinks, arXiv 2512.22213"
MASSIVE = "arXiv 2510.22603 (ratio to the token's median); Systematic Outliers, arXiv 2502.06415 (ratio to the mean)"


@measure("sink", formula="mean over rows i > max(G) of sum_{j in G} P_ij", range=(0, 1), paper=SINK)
def sink(atlas: Atlas, keys: str = "first") -> xr.DataArray:
    """Mean mass that later rows put on a group of keys, [layer, head]; where layers look both ways, rows outside it."""
    mass = ratio(atlas.need("later"), atlas.need("later_rows"))
    known = mass["k_group"].values.tolist()
    if keys not in known:
        raise AtlasError(f"keys: no group {keys!r} in this atlas; there are {', '.join(known)}")
    return mass.sel(k_group=keys, drop=True)


@measure("received", formula="mean over keys of (mass received / rows that may see the key)", range=(0, 1))
def received(atlas: Atlas) -> xr.DataArray:
    """Mean weight received by relative position of the key, [layer, head, key_bin]."""
    return ratio(atlas.need("received"), atlas.need("received_keys"))


@measure("received_kurtosis", formula="mean over samples of m4 / m2^2 - 3 of the received profile", range=(-2, INF))
def received_kurtosis(atlas: Atlas) -> xr.DataArray:
    """Excess kurtosis of the mass that keys receive: high where few keys get nearly all, [layer, head]."""
    return ratio(atlas.need("received_kurtosis"), atlas.need("received_samples"))


@measure("stripe", formula="mean over odd rows of the mass on the keys that even rows favour (top 5%)", range=(0, 1))
def stripe(atlas: Atlas) -> xr.DataArray:
    """Mass on few fixed keys, the first key left out and the keys chosen on other rows, [layer, head]."""
    return ratio(atlas.need("stripe"), atlas.need("stripe_rows"))


@measure("stripe_lift", formula="stripe mass / its mass under uniform weights", range=(0, INF))
def stripe_lift(atlas: Atlas) -> xr.DataArray:
    """How many times more mass the favoured keys get than chance, [layer, head]."""
    return ratio(atlas.need("stripe"), atlas.need("stripe_density"))


@measure("massive", formula="max_c |h_tc| > ratio * (median_c |h_tc|, or mean_tc |h_tc|)", range=(0, 1), paper=MASSIVE)
def massive(atlas: Atlas, ratio: float = 1000.0, over: Literal["median", "mean"] = "median") -> xr.DataArray:
    """1 where a block's output holds a massive activation, [layer, sample, position]; NaN past a sample's end.

    `over="median"` compares with the token's own median (arXiv 2510.22603), "mean" with the mean over all tokens and
    features of the sample at that layer (arXiv 2502.06415; that mean includes the outlier).
    """
    largest = atlas.need("resid_absmax")
    if over == "median":
        base = atlas.need("resid_absmedian")
    elif over == "mean":
        base = atlas.need("resid_absmean").mean("position", skipna=True)
    else:
        raise AtlasError(f"over: {over!r} is neither 'median' nor 'mean'")
    return (largest > ratio * base).astype(float).where(largest.notnull())


def sink_window(atlas: Atlas) -> xr.DataArray:
    """Blocks between the largest rise and the largest later fall of the first token's norm, bool [layer, sample].

    A block counts as risen from its own output on; without a later fall the window reaches the last block. Layers
    without a recorded block output (a block's second attention) are False.
    """
    norm = atlas.need("resid_norm").isel(position=0)
    before = atlas.need("bos_embed_norm")
    inside = xr.zeros_like(norm, dtype=bool)
    for s in range(norm.sizes["sample"]):
        blocks = np.flatnonzero(np.isfinite(norm.values[:, s]))
        if not blocks.size:
            continue
        steps = np.diff(norm.values[blocks, s], prepend=before.values[s])
        start = int(np.argmax(steps))
        falls = steps[start + 1 :]
        end = start + 1 + int(np.argmin(falls)) if falls.size and falls.min() < 0 else len(blocks)
        inside.values[blocks[start:end], s] = True
    return inside


@measure(
    "sink_lifetime",
    formula="blocks of the first token's window where |cos(h_t, h_0)| > cos",
    range=(0, INF),
    units="layers",
    paper=SECONDARY,
)
def sink_lifetime(atlas: Atlas, cos: float = 0.9) -> xr.DataArray:
    """For how many blocks each later token points where the first one does, [sample, position]; NaN at the first.

    `first` (a coordinate) is the index along `layer` of the first such block, -1 if none; `kind` is "secondary",
    "bos-like", "noise" or "" (never a sink), by the released labels: lifetime > 4 and < n - 15 secondary, >= n - 15
    bos-like; with fewer than 24 blocks the bounds are 0.1 n and 0.7 n (our reading).
    """
    value = atlas.need("bos_cos")
    alive = (abs(value) > cos) & sink_window(atlas)
    life = alive.sum("layer").astype(float).where(value.notnull().any("layer"))
    life = life.where(life["position"] != 0)
    first = xr.where(alive.any("layer"), alive.argmax("layer"), -1)
    blocks = int(value.notnull().any(("sample", "position")).sum())
    low, high = (4.0, blocks - 15.0) if blocks >= 24 else (0.1 * blocks, 0.7 * blocks)
    lives = life.values
    kind = np.select([~(lives > 0), lives >= high, lives > low], ["", "bos-like", "secondary"], default="noise").astype(
        object
    )
    return life.assign_coords(first=(life.dims, first.values), kind=(life.dims, kind))
