"""The registry of measures: a name, what it is, and the pure function of an atlas that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr

from regard.watch.atlas import Atlas, AtlasError


@dataclass(frozen=True)
class Measure:
    """A named figure: `measure(atlas, **options) -> DataArray`, with its formula, range and paper."""

    name: str
    function: Callable[..., xr.DataArray]
    formula: str
    range: tuple[int | float, int | float]
    units: str
    paper: str

    def __call__(self, atlas: Any, **options: Any) -> xr.DataArray:
        """The figure of this atlas. Raises AtlasError saying what to watch if the atlas lacks something."""
        if not isinstance(atlas, Atlas):
            raise AtlasError(f"atlas: {self.name} takes a regard.Atlas, got {type(atlas).__name__}")
        result = self.function(atlas, **options).rename(self.name)
        facts = {"units": self.units, "formula": self.formula, "range": list(self.range), "paper": self.paper}
        result.attrs = {k: v for k, v in facts.items() if v}
        return result


_REGISTRY: dict[str, Measure] = {}


def measure(
    name: str, *, formula: str, range: tuple[int | float, int | float], units: str = "1", paper: str = ""
) -> Callable[[Callable[..., xr.DataArray]], Measure]:
    """Register a function of an atlas as the measure `name`."""

    def register(function: Callable[..., xr.DataArray]) -> Measure:
        if name in _REGISTRY:
            raise ValueError(f"name: a measure {name!r} is registered already")
        made = Measure(name, function, formula, range, units, paper)
        made.__dict__["__doc__"] = function.__doc__
        _REGISTRY[name] = made
        return made

    return register


def names() -> list[str]:
    """The registered measures, in alphabetical order."""
    return sorted(_REGISTRY)


def get(name: str) -> Measure:
    """The registered measure `name`."""
    if name not in _REGISTRY:
        raise AtlasError(f"name: no measure {name!r}; there are {', '.join(names())}")
    return _REGISTRY[name]


def ratio(top: xr.DataArray, bottom: xr.DataArray) -> xr.DataArray:
    """top / bottom, NaN where nothing was counted."""
    return top / bottom.where(bottom != 0)
