"""How far a head looks, and which fixed patterns would keep its mass."""

from __future__ import annotations

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .registry import measure, ratio

INF = float("inf")
ANCHOR = "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm, arXiv 2510.13554"


@measure("mean_distance", formula="mean_i sum_j P_ij |i-j|", range=(0, INF), units="tokens", paper=ANCHOR)
def mean_distance(atlas: Atlas) -> xr.DataArray:
    """Mean distance between a query and what it attends to, [layer, head]."""
    return ratio(atlas.need("distance"), atlas.need("rows"))


@measure("distance_norm", formula="mean_i sum_j P_ij |i-j| / (longest |i-j| of the row)", range=(0, 1))
def distance_norm(atlas: Atlas) -> xr.DataArray:
    """Mean distance as a share of the longest the row could have, [layer, head]."""
    return ratio(atlas.need("distance_norm"), atlas.need("rows"))


@measure("window_mass", formula="mean_i sum_{|i-j| < width} P_ij", range=(0, 1))
def window_mass(atlas: Atlas, width: int | None = None) -> xr.DataArray:
    """Mean mass within a window, [layer, head, width], or [layer, head] for one recorded width."""
    mass = ratio(atlas.need("window"), atlas.need("rows"))
    if width is None:
        return mass
    widths = mass["width"].values.tolist()
    if width not in widths:
        raise AtlasError(f"width: {width} was not recorded; there are {widths}")
    return mass.sel(width=width)


@measure("offset_profile", formula="sum_i P[i, i-o] / rows that have a key at offset o", range=(0, 1))
def offset_profile(atlas: Atlas) -> xr.DataArray:
    """Mean weight at each near offset i - j, [layer, head, offset]."""
    return ratio(atlas.need("near"), atlas.need("near_rows"))


@measure("template_recall", formula="mean_i sum_{j in template(i)} P_ij", range=(0, 1))
def template_recall(atlas: Atlas, template: str | None = None) -> xr.DataArray:
    """Mean mass that a template keeps, [layer, head, template], or [layer, head] for one template."""
    return _one(ratio(atlas.need("template_mass"), atlas.need("rows")), "template", template)


@measure("template_lift", formula="template mass / its mass under uniform weights", range=(0, INF))
def template_lift(atlas: Atlas, template: str | None = None) -> xr.DataArray:
    """How many times more mass a template keeps than chance, [layer, head, template]."""
    return _one(ratio(atlas.need("template_mass"), atlas.need("template_density")), "template", template)


@measure("template_share", formula="mean_i (allowed keys in template(i)) / n_i", range=(0, 1))
def template_share(atlas: Atlas, template: str | None = None) -> xr.DataArray:
    """Mean share of the allowed keys that a template keeps, [layer, head, template]."""
    return _one(ratio(atlas.need("template_density"), atlas.need("rows")), "template", template)


def _one(values: xr.DataArray, dim: str, label: str | None) -> xr.DataArray:
    if label is None:
        return values
    known = values[dim].values.tolist()
    if label not in known:
        raise AtlasError(f"{dim}: no {label!r} in this atlas; there are {', '.join(known)}")
    return values.sel({dim: label}, drop=True)
