"""How much a response looks at what the user said."""

from __future__ import annotations

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .registry import measure, ratio

PAPER = "On the Loss of Context-awareness in General Instruction Fine-tuning, arXiv 2411.02688"


@measure("user_attention", formula="mean_t max_h sum_{j in group} P^h_tj", range=(0, 1), paper=PAPER)
def user_attention(atlas: Atlas, group: str = "user", rows: str = "all", by_sample: bool = False) -> xr.DataArray:
    """The most any head looks at a group of keys, averaged over rows: [layer], or [layer, sample] with `by_sample`.

    The maximum over heads is taken in each row, before the mean. Watch the response rows alone (`rows="generated"` or
    a mask), or name a row group.
    """
    if by_sample:
        values = atlas.need("group_max_raw")
        return _pick(values, "k_group", group, "group")
    mass = _pick(_pick(atlas.need("group_max"), "k_group", group, "group"), "q_group", rows, "rows")
    counted = _pick(atlas.need("group_rows"), "q_group", rows, "rows").max("head", skipna=True)
    return ratio(mass, counted)


def _pick(values: xr.DataArray, dim: str, label: str, argument: str) -> xr.DataArray:
    known = values[dim].values.tolist()
    if label not in known:
        raise AtlasError(f"{argument}: no group {label!r} in this atlas; there are {', '.join(known)}")
    return values.sel({dim: label}, drop=True)
