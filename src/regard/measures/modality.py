"""Balance of attention between text and other tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from .context import _pick
from .registry import measure, ratio

INF = float("inf")
PAPER = "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models, arXiv 2508.10552"
By = Literal["layer", "third"]


@measure("mdi", formula="(A_text / |text|) / (A_other / |other|)", range=(0, INF), paper=PAPER)
def mdi(atlas: Atlas, text: str = "text", other: str = "other", rows: str = "all", by: By = "layer") -> xr.DataArray:
    """Mass a text key gets over mass another key gets, [layer], or ["early", "middle", "late"] with `by="third"`.

    A: mass summed over rows and heads; |.|: keys the same rows may see. A and |.| are summed before dividing.
    """
    mass, keys = _sums(atlas, text, other, rows, by)
    return ratio(ratio(mass[0], keys[0]), ratio(mass[1], keys[1]))


@measure("aei", formula="[A_text / (A_text + A_other)] / [|text| / (|text| + |other|)]", range=(0, INF), paper=PAPER)
def aei(atlas: Atlas, text: str = "text", other: str = "other", rows: str = "all", by: By = "layer") -> xr.DataArray:
    """Text's share of the mass over its share of the keys, [layer] or by thirds of the layers."""
    mass, keys = _sums(atlas, text, other, rows, by)
    return ratio(ratio(mass[0], mass[0] + mass[1]), ratio(keys[0], keys[0] + keys[1]))


def _sums(
    atlas: Atlas, text: str, other: str, rows: str, by: str
) -> tuple[tuple[xr.DataArray, xr.DataArray], tuple[xr.DataArray, xr.DataArray]]:
    def total(name: str, group: str) -> xr.DataArray:
        values = _pick(_pick(atlas.need(name), "q_group", rows, "rows"), "k_group", group, "text/other")
        values = values.sum("head", skipna=True)
        if by == "layer":
            return values
        if by != "third":
            raise AtlasError(f"by: {by!r} is neither 'layer' nor 'third'")
        n = values.sizes["layer"]
        third = xr.DataArray(
            np.array(["early", "middle", "late"], dtype=object)[np.arange(n) * 3 // max(n, 1)], dims="layer"
        )
        return values.drop_vars([c for c in values.coords if c != "layer"]).groupby(third.rename("third")).sum()

    return (total("group", text), total("group", other)), (total("group_keys", text), total("group_keys", other))
