"""Mass between groups of tokens, and how much each document brings to an answer."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .context import _pick
from .registry import measure, ratio

INF = float("inf")
PAPER = "Masking in Multi-hop QA: An Analysis of How Language Models Perform with Context Permutation, arXiv 2505.11754"


@measure("group_mass", formula="mean_{i in q_group} sum_{j in k_group} P_ij", range=(0, 1), paper=PAPER)
def group_mass(atlas: Atlas, rows: str | None = None, keys: str | None = None, by_sample: bool = False) -> xr.DataArray:
    """Mean mass that a row of one group puts on the keys of another, [layer, head, q_group, k_group].

    Groups are those named when the watch was made, `groups={"document": mask, ...}`, beside "all" rows and the "first"
    key; NaN where a group has no rows. With a group for node mentions and one for text it is the split of the mass
    between the two (arXiv 2505.02130).

    Args:
        atlas: with the statistic "group"; for `by_sample` watched with `per_sample=("group_raw",)`.
        rows, keys: one group of rows or of keys, whose dimension goes; None keeps all.
        by_sample: [layer, head, sample, ...], the mean over the rows of each sample.
    """
    mass = atlas.need("group_raw") if by_sample else ratio(atlas.need("group"), atlas.need("group_rows"))
    mass = mass if rows is None else _pick(mass, "q_group", rows, "rows")
    return mass if keys is None else _pick(mass, "k_group", keys, "keys")


@measure(
    "information_contribution",
    formula="IC[d] = sum_layers mean_heads mean_{i in rows} sum_{j in d} P_ij",
    range=(0, INF),
    paper=PAPER,
)
def information_contribution(
    atlas: Atlas,
    documents: Sequence[str] | None = None,
    rows: str = "answer",
    by_sample: bool = False,
    by_layer: bool = False,
) -> xr.DataArray:
    """Mass that the answer's rows put on each document, summed over layers, [k_group] or [sample, k_group].

    A sum over layers, so no mass: it reaches the number of layers. A long document gets more at equal interest; give
    documents of one length, or divide by theirs. Its maximum over documents is the peak by which the paper orders them.

    Args:
        atlas: as for `group_mass`.
        documents: the groups of keys that are documents; None: all named groups but that of the rows.
        rows: the group of rows that write the answer.
        by_sample: one figure a sample, from `group_raw`.
        by_layer: the running sum after each layer, [layer, ...], instead of the last one.
    """
    mass = group_mass(atlas, rows=rows, by_sample=by_sample).mean("head", skipna=True)
    known = mass["k_group"].values.tolist()
    if documents is None:
        documents = [d for d in known if d not in ("first", rows)]
    if isinstance(documents, str) or not documents:
        raise AtlasError(f"documents: must be the names of one or more groups of keys, got {documents!r}")
    if unknown := [d for d in documents if d not in known]:
        raise AtlasError(f"documents: no group {', '.join(unknown)} in this atlas; there are {', '.join(known)}")
    total = mass.sel(k_group=list(documents)).cumsum("layer", skipna=False).assign_coords(layer=mass["layer"])
    return total if by_layer else total.isel(layer=-1, drop=True)
