"""The page's figures in matplotlib, for papers: `atlas.plot.heads()`, `.roles()`, `.map(layer, head)` ...

Each method draws into `ax` if one is given, else into a new figure, and returns the Axes (`.figure` holds the Figure,
which no global state keeps: nothing to close).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from regard import measures
from regard.measures.roles import MIXED, ROLES, roles
from regard.watch.atlas import Atlas, AtlasError

from .taxonomy import LOOKS

__all__ = ["AtlasPlots"]


class AtlasPlots:
    """Figures of one atlas; `layer` is its number in call order or its name."""

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def heads(self, measure: str = "entropy", *, ax: Axes | None = None, cmap: str = "viridis") -> Axes:
        """A measure of every head, layers down and heads across; blank where a layer has no such head."""
        found = measures.get(measure)
        values = found(self.atlas)
        if values.dims != ("layer", "head"):
            raise ValueError(
                f"measure: {measure!r} is [{', '.join(map(str, values.dims))}]; a grid of heads takes [layer, head]"
            )
        ax = ax or _axes(1.6 + 0.34 * values.sizes["head"], 1.1 + 0.3 * values.sizes["layer"])
        image = ax.imshow(values.values, cmap=cmap, aspect="equal", interpolation="nearest")
        units = "" if found.units in ("", "1") else f" ({found.units})"
        ax.figure.colorbar(image, ax=ax, label=f"{measure.replace('_', ' ')}{units}", shrink=0.85)
        return _grid_labels(ax)

    def roles(self, *, ax: Axes | None = None) -> Axes:
        """Every head's primary role, layers down and heads across, with the two-letter codes of the legend."""
        table = roles(self.atlas)
        names = table.names.values
        present = [r for r in (*ROLES, MIXED) if (names == r).any()]
        codes = np.full(names.shape, np.nan)
        for n, role in enumerate(present):
            codes[names == role] = n
        ax = ax or _axes(2.6 + 0.34 * names.shape[1], 1.1 + 0.3 * names.shape[0])
        colours = ListedColormap([LOOKS[r].light for r in present])
        ax.imshow(codes, cmap=colours, norm=BoundaryNorm(np.arange(len(present) + 1) - 0.5, max(1, len(present))))
        for (i, j), role in np.ndenumerate(names):
            if role:
                ax.text(j, i, LOOKS[role].code, ha="center", va="center", color="white", fontsize=6.5)
        handles = [ax.plot([], [], "s", color=LOOKS[r].light, label=f"{LOOKS[r].code}  {r}")[0] for r in present]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
        return _grid_labels(ax)

    def sinks(self, *, ax: Axes | None = None) -> Axes:
        """Mass on the first token of every head by layer, with the mean of each layer."""
        return self._by_layer("sink", "mass on the first token", ax)

    def distance(self, *, ax: Axes | None = None) -> Axes:
        """Mean distance of every head by layer, with the mean of each layer."""
        return self._by_layer("mean_distance", "mean distance (tokens)", ax)

    def role_counts(self, *, ax: Axes | None = None) -> Axes:
        """Heads of each role by layer, stacked."""
        names = roles(self.atlas).names.values
        ax = ax or _axes(5.2, 2.8)
        base = np.zeros(len(names))
        for role in (*ROLES, MIXED):
            count = (names == role).sum(1)
            if count.any():
                ax.bar(np.arange(len(names)), count, bottom=base, color=LOOKS[role].light, width=0.8, label=role)
                base += count
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
        return _clean(ax, "layer", "heads", whole="both")

    def offsets(self, layer: int | str, head: int, *, ax: Axes | None = None) -> Axes:
        """Mean weight of one head at each offset, query - key."""
        profile = self._head(measures.get("offset_profile")(self.atlas), layer, head)
        seen = np.isfinite(profile.values)
        ax = ax or _axes(4.2, 2.6)
        x, y = profile["offset"].values[seen], profile.values[seen]
        ax.fill_between(x, y, alpha=0.2, color=self._colour(layer, head), lw=0)
        ax.plot(x, y, color=self._colour(layer, head), lw=1.3)
        ax.set_ylim(bottom=0)
        return _clean(ax, "offset, query − key (tokens)", "mean weight")

    def entropy(self, layer: int | str, head: int, *, ax: Axes | None = None) -> Axes:
        """Mean entropy of one head by relative position of the query."""
        values = self._head(measures.get("entropy_at")(self.atlas), layer, head)
        ax = ax or _axes(4.2, 2.6)
        at = (values["bin"].values.astype(float) + 0.5) / values.sizes["bin"]
        ax.plot(at, values.values, color=self._colour(layer, head), lw=1.3)
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        return _clean(ax, "relative position of the query", "entropy (nats)")

    def map(self, layer: int | str, head: int, *, ax: Axes | None = None, gamma: float = 0.5) -> Axes:
        """Block map of one head: the share of a query block's mass that each key block gets; colour ~ share^gamma."""
        blocks = self._head(self.atlas.need("blocks"), layer, head).values
        rows = self._head(self.atlas.need("rows_at"), layer, head).values
        if not np.isfinite(blocks).any():
            raise AtlasError(f"layer {layer!r} has no block map: it is cross-attention")
        share = blocks / np.where(rows > 0, rows, np.nan)[:, None]
        ax = ax or _axes(3.9, 3.3)
        colour = self._colour(layer, head)
        cmap = LinearSegmentedColormap.from_list("role", ["#ffffff", colour, "#111111"])
        image = ax.imshow(share, cmap=cmap, norm=PowerNorm(gamma, vmin=0), extent=(0, 1, 1, 0), interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label="share of mass", shrink=0.85)
        return _clean(ax, "relative position of the key", "relative position of the query", spines=True)

    # -- parts -----------------------------------------------------------------------------------------------

    def _by_layer(self, measure: str, label: str, ax: Axes | None) -> Axes:
        values = measures.get(measure)(self.atlas)
        names = roles(self.atlas).names.values
        ax = ax or _axes(4.6, 2.8)
        heads = values.sizes["head"]
        for role in (*ROLES, MIXED):
            i, j = np.nonzero((names == role) & np.isfinite(values.values))
            if len(i):
                spread = (j / max(1, heads - 1) - 0.5) * 0.6
                ax.scatter(i + spread, values.values[i, j], s=11, color=LOOKS[role].light, label=role, lw=0)
        ax.plot(np.arange(values.sizes["layer"]), values.mean("head").values, color="0.35", lw=1, zorder=0)
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0, handletextpad=0.2)
        ax.set_ylim(bottom=0)
        return _clean(ax, "layer", label, whole="x")

    def _head(self, values: Any, layer: int | str, head: int) -> Any:
        labels = self.atlas["layer"].values.astype(str).tolist()
        at = labels.index(layer) if layer in labels else layer
        if not isinstance(at, int) or not 0 <= at < len(labels):
            raise ValueError(f"layer must be 0 .. {len(labels) - 1} or one of {', '.join(labels)}; got {layer!r}")
        count = int(self.atlas["heads"].values[at]) if "heads" in self.atlas.coords else self.atlas.sizes["head"]
        if not 0 <= head < count:
            raise ValueError(f"head must be 0 .. {count - 1} in layer {labels[at]}; got {head}")
        return values.isel(layer=at).isel({"head": head} if "head" in values.dims else {})

    def _colour(self, layer: int | str, head: int) -> str:
        return LOOKS[str(self._head(roles(self.atlas).names, layer, head).item())].light


def _axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def _clean(ax: Axes, x: str, y: str, *, whole: str = "", spines: bool = False) -> Axes:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if whole in ("x", "both"):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if whole in ("y", "both"):
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if not spines:
        ax.spines[["top", "right"]].set_visible(False)
    return ax


def _grid_labels(ax: Axes) -> Axes:
    _clean(ax, "head", "layer", whole="both", spines=True)
    ax.spines[:].set_visible(False)
    return ax
