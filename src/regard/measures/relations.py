"""Mass on keys that stand in a relation to the query's token."""

from __future__ import annotations

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .registry import measure, ratio

INF = float("inf")
INDUCTION = "In-context Learning and Induction Heads (Olsson et al. 2022)"
CLARK = "What Does BERT Look At? (Clark et al. 2019); Voita et al. 2019"


def _relation(atlas: Atlas, name: str, of: str) -> xr.DataArray:
    mass = atlas.need("relation_mass")
    known = mass["relation"].values.tolist()
    if name not in known:
        raise AtlasError(f"relation: no {name!r} in this atlas; there are {', '.join(known)}")
    pick = {"relation": name}
    return ratio(mass.sel(pick, drop=True), atlas.need(of).sel(pick, drop=True))


@measure("self_token", formula="mean_i P_ii", range=(0, 1))
def self_token(atlas: Atlas) -> xr.DataArray:
    """Mean weight a query gives its own position, [layer, head]."""
    return _relation(atlas, "self", "relation_rows")


@measure("previous_token", formula="mean over i >= 1 of P[i, i-1]", range=(0, 1), paper=CLARK)
def previous_token(atlas: Atlas) -> xr.DataArray:
    """Mean weight on the token just before, [layer, head]."""
    return _relation(atlas, "previous", "relation_rows")


@measure("duplicate", formula="mean over rows with one of sum_{j < i, x_j = x_i} P_ij", range=(0, 1))
def duplicate(atlas: Atlas) -> xr.DataArray:
    """Mean mass on earlier occurrences of the query's own token, [layer, head]."""
    return _relation(atlas, "duplicate", "relation_rows")


@measure(
    "induction", formula="mean over rows with one of sum_{j < i, x_(j-1) = x_i} P_ij", range=(0, 1), paper=INDUCTION
)
def induction(atlas: Atlas) -> xr.DataArray:
    """Mean mass on what followed earlier occurrences of the query's token (prefix matching), [layer, head]."""
    return _relation(atlas, "induction", "relation_rows")


@measure("induction_lift", formula="induction mass / its mass under uniform weights", range=(0, INF), paper=INDUCTION)
def induction_lift(atlas: Atlas) -> xr.DataArray:
    """How many times more induction mass than chance, [layer, head]."""
    return _relation(atlas, "induction", "relation_chance")
