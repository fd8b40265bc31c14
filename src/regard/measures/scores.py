"""The scores that head roles are judged by, each from what the atlas holds; NaN where it holds too little."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from regard.watch.atlas import Atlas, AtlasError

from . import distance, entropy, relations, retrieval, sinks
from .registry import ratio

WINDOW, STREAMING = "window1/16", "sinks4+window1/16"


def role_scores(atlas: Atlas) -> xr.DataArray:
    """Every score behind the roles, [layer, head, role].

    A role's own score carries its name; further quantities it is judged by are named "role/quantity". What the atlas
    does not hold is NaN, and `missing` (an attribute) says what to watch for it.
    """
    values: dict[str, xr.DataArray] = {}
    missing: dict[str, str] = {}
    frame = atlas.need("rows")
    for name, compute in SCORES.items():
        try:
            values[name] = compute(atlas).reset_coords(drop=True).broadcast_like(frame)
        except AtlasError as lacking:
            missing[name] = str(lacking)
            values[name] = xr.full_like(frame, np.nan).reset_coords(drop=True)
    labels = np.array(list(values), dtype=object)
    stacked = np.stack([v.transpose("layer", "head").values for v in values.values()], axis=-1)
    coords = {"layer": frame["layer"], "head": frame["head"], "role": labels}
    coords |= {c: frame[c] for c in ("kind", "layer_index", "heads") if c in frame.coords}
    return xr.DataArray(
        stacked, dims=("layer", "head", "role"), coords=coords, name="role_scores", attrs={"missing": missing}
    )


def argmax_previous(atlas: Atlas) -> xr.DataArray:
    """Share of rows whose largest weight is on the token just before, [layer, head]."""
    return ratio(atlas.need("top1_offset").sel(offset_class=1, drop=True), atlas.need("rows"))


def _template(name: str, of: Callable[..., xr.DataArray]) -> Callable[[Atlas], xr.DataArray]:
    return lambda atlas: of(atlas, template=name)


def lag(profile: np.ndarray, least: int = 2) -> int | None:
    """The lag of the first peak of the autocorrelation of an offset profile, None if there is none above 0.1."""
    centred = profile - profile.mean()
    power = float(centred @ centred)
    if power == 0 or len(profile) < 3 * least:
        return None
    full = np.correlate(centred, centred, "full")[len(profile) - 1 :] / power
    for at in range(least, len(profile) // 2):
        if full[at] > 0.1 and full[at] > full[at - 1] and full[at] >= full[at + 1]:
            return at
    return None


def diagonals(atlas: Atlas) -> dict[str, xr.DataArray]:
    """Recall, lift and m = 0 share of the diagonals a fixed lag apart: exact if the period was watched.

    Otherwise the lag is the first peak of the autocorrelation of `near`, the width max(1, lag // 8), the recall
    a lower bound (near offsets only) and the density (2 width + 1) / lag.
    """
    template = atlas.need("template_mass")
    if "diagonals" in template["template"].values:
        recall = distance.template_recall(atlas, template="diagonals")
        main = ratio(distance.template_recall(atlas, template="diagonals m=0"), recall)
        density = distance.template_share(atlas, template="diagonals")
        return {"recall": recall, "main": main, "lift": ratio(recall, density), "density": density}
    near, rows = atlas.need("near"), atlas.need("rows")
    offsets = near["offset"].values
    found = {k: np.full(rows.shape, np.nan) for k in ("recall", "main", "lift", "density", "lag")}
    for at in np.ndindex(*rows.shape):
        profile, n = near.values[at], float(rows.values[at])
        if not np.isfinite(profile).all() or not n:
            continue
        period = lag(profile[offsets >= 0])
        if period is None:
            found["recall"][at] = found["lift"][at] = 0.0
            continue
        width = max(1, period // 8)
        on = np.abs((offsets + period // 2) % period - period // 2) <= width
        mass = float(profile[on].sum() / n)
        share = min(1.0, (2 * width + 1) / period)
        own = float(profile[np.abs(offsets) <= width].sum() / n)
        numbers = (mass, own / mass if mass else np.nan, mass / share, share, float(period))
        for name, number in zip(("recall", "main", "lift", "density", "lag"), numbers, strict=True):
            found[name][at] = number
    return {name: rows.copy(data=values) for name, values in found.items()}


def _diagonals(name: str) -> Callable[[Atlas], xr.DataArray]:
    return lambda atlas: diagonals(atlas)[name]


SCORES: dict[str, Callable[[Atlas], xr.DataArray]] = {
    "retrieval": retrieval.retrieval,
    "induction": relations.induction,
    "induction/lift": relations.induction_lift,
    "previous-token": relations.previous_token,
    "previous-token/argmax": argmax_previous,
    "sink": sinks.sink,
    "multi-diagonal": _diagonals("recall"),
    "multi-diagonal/lift": _diagonals("lift"),
    "multi-diagonal/main": _diagonals("main"),
    "multi-diagonal/density": _diagonals("density"),
    "diagonal": _template("diagonal", distance.template_recall),
    "diagonal/lift": _template("diagonal", distance.template_lift),
    "diagonal/density": _template("diagonal", distance.template_share),
    "skewed line": _template("skewed line", distance.template_recall),
    "skewed line/lift": _template("skewed line", distance.template_lift),
    "skewed line/density": _template("skewed line", distance.template_share),
    "vertical stripe": sinks.stripe,
    "vertical stripe/lift": sinks.stripe_lift,
    "block": _template("block", distance.template_recall),
    "block/lift": _template("block", distance.template_lift),
    "block/density": _template("block", distance.template_share),
    "local": _template(WINDOW, distance.template_recall),
    "local/density": _template(WINDOW, distance.template_share),
    "streaming": _template(STREAMING, distance.template_recall),
    "streaming/density": _template(STREAMING, distance.template_share),
    "uniform": entropy.entropy_norm,
    "uniform/top1": entropy.top1,
    "global": distance.distance_norm,
}
