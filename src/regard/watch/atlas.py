"""The atlas: what was watched, as one labelled dataset that merges exactly.

Dimensions (fixed by what was asked for, so that runs line up):

| dim | labels |
|---|---|
| `layer` | qualified module name of each attention layer, in call order |
| `head`, `head2` | 0 .. most heads of any layer - 1; layers with fewer are NaN beyond `heads[layer]` |
| `offset` | i - j, signed; negative only when some layer looks ahead; |offset| < 256 by default |
| `width` | 1, 2, 4 ... 2^20; mass on |i-j| < width |
| `q_group` | "all" and the user's groups |
| `k_group` | "first" (first token that is not padding) and the user's groups |
| `bin`, `key_bin`, `q_block`, `k_block` | 32 bins of relative position floor(32 i / length), labels 0 .. 31 |
| `relation` | self, previous, duplicate, induction |
| `template` | "sinks4+window1/16", "sinks4+window1/8", "sinks4+window1/4" (budget in keys: that share of the sample's
| | keys, 4 of them the first four), "diagonal" (|i-j| <= max(1, length // 64)), and the user's |
| `offset_class` | lower bound of i - argmax: 0, 1, 2 (2-3), 4 (4-7), ...; negative for keys ahead |
| `ring` | Chebyshev distance between patches, 0 .. (only with `grid=`) |
| `sample` | str; the user's ids or "0", "1", ... |
| `position`, `key` | 0 .. longest sample - 1, counted from the sample's first token that is not padding |

Coordinates on `layer`: `heads` (int), `kind` ("self" or "cross"), `layer_index` (0, 1, ... in call order) and
`causal` (bool).
Cross-attention layers have NaN in everything that compares a query's position with a key's.

A variable may not be called like a dimension, hence `relation_mass`, `template_mass`, `ring_mass`.
Variables, their dimensions, units and merge rules: the table in `regard.watch.variables` (`VARIABLES`). All sums are
float64; per-sample arrays are float32. A variable is present only if it was asked for; `atlas.need(name)` says how.

`attrs`: `format` (int), `model`, `model_class`, `fingerprint`, `statistics` (JSON), `provenance` (JSON list, one entry
a run: versions, seed, date, command, device, dtype).
"""

from __future__ import annotations

import functools
import html
import importlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr.storage

from .variables import CONCAT, MAX, MERGES, SUM, VARIABLES, how_to_ask

FORMAT = 1
SAME_ATTRS = ("format", "model_class", "fingerprint", "statistics")
RAGGED = ("position", "key")  # dims whose length is that of the longest sample


class AtlasError(ValueError):
    """An atlas that cannot be merged, read or measured; the message names what differs or is missing."""


class _Load:
    """`Atlas.load(path)` reads a file; `atlas.load()` stays xarray's own (which `compute()` calls)."""

    def __get__(self, instance: xr.Dataset | None, owner: type) -> Callable[..., Any]:
        return load_atlas if instance is None else functools.partial(xr.Dataset.load, instance)


class Atlas(xr.Dataset):
    """What was watched: an `xarray.Dataset` whose variables say how they merge (see the module's table)."""

    __slots__ = ()

    # -- asking ---------------------------------------------------------------------------------------------

    def need(self, name: str) -> xr.DataArray:
        """The variable `name`, or an AtlasError that says what to pass to `regard.watch` to have it."""
        if name not in self.data_vars:
            raise AtlasError(f"this atlas holds no {name!r}: watch again with {how_to_ask(name)}")
        return self[name]

    def measure(self, name: str, **options: Any) -> xr.DataArray:
        """The registered measure `name` of this atlas (`regard.measures.names()` lists them)."""
        # Measures stand above watch, so they are found by name when asked for.
        return importlib.import_module("regard.measures").get(name)(self, **options)

    def roles(self, **options: Any) -> Any:
        """Every head's role with its evidence: `regard.measures.roles.roles(atlas)`."""
        return importlib.import_module("regard.measures.roles").roles(self, **options)

    @property
    def plot(self) -> Any:  # type: ignore[override]
        """Figures of this atlas in matplotlib: `atlas.plot.heads()`, ... (`regard.report.plots`)."""
        return importlib.import_module("regard.report.plots").AtlasPlots(self)

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """One dict a run: model, versions, seed, date, command, device, dtype."""
        return json.loads(self.attrs.get("provenance", "[]"))

    # -- merging --------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        return merge([self, other]) if isinstance(other, Atlas) else NotImplemented

    def __radd__(self, other: Any) -> Any:  # sum() starts from 0
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented

    # -- storing --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the atlas as a Zarr directory at `path` (one file if it ends in .zip), whole or not at all.

        The new atlas is written beside an older one, flushed to disk and moved in; a process killed at any moment
        leaves the old or the new one readable by `Atlas.load`. What is not an atlas is never replaced.
        """
        path = Path(path)
        check_free(path)
        if path.suffix == ".zip":
            return _save_file(self, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh, old = _sibling(path, f"new-{os.getpid()}"), _sibling(path, "old")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            _plain(self).to_zarr(fresh, mode="w", consolidated=False)
            _flush(fresh)
            _recover(path)
            if path.exists():
                path.rename(old)
            fresh.rename(path)
            _flush_directory(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return path

    load: Any = _Load()

    # -- showing --------------------------------------------------------------------------------------------

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("model", f"{self.attrs.get('model', '?')} ({self.attrs.get('model_class', '?')})")]
        if {"layer", "head"} <= set(self.dims):
            facts.append(("heads", f"{self.sizes['layer']} layers x {self.sizes['head']} heads"))
        if "n_tokens" in self:
            n = self["n_tokens"].values
            facts.append(("samples", f"{n.size}, {int(n.sum())} tokens"))
        if "rows" in self and self["rows"].size:
            facts.append(("rows", f"{int(np.nanmax(self['rows'].values))} a head, at most"))
        facts.append(("runs", str(len(self.provenance))))
        return facts

    def __repr__(self) -> str:
        lines = ["<regard.Atlas>", *(f"  {k}: {v}" for k, v in self._facts()), "  variables:"]
        for name, array in self.data_vars.items():
            shape = ", ".join(f"{d} {n}" for d, n in array.sizes.items())
            lines.append(f"    {name} [{shape}] {array.attrs.get('units', '')}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cell = html.escape
        facts = "".join(f"<tr><th>{cell(k)}</th><td colspan=3>{cell(v)}</td></tr>" for k, v in self._facts())
        rows = "".join(
            f"<tr><td>{cell(str(name))}</td><td>{cell(', '.join(f'{d} {n}' for d, n in a.sizes.items()))}</td>"
            f"<td>{cell(str(a.attrs.get('units', '')))}</td><td>{cell(str(a.attrs.get('long_name', '')))}</td></tr>"
            for name, a in self.data_vars.items()
        )
        return f"<table class='regard-atlas'><caption>regard.Atlas</caption>{facts}{rows}</table>"


def load_atlas(path: str | os.PathLike[str]) -> Atlas:
    """Read an atlas that `save` wrote. Raises FileNotFoundError or AtlasError (not an atlas; newer format)."""
    path = Path(path)
    _recover(path)
    if not path.exists():
        raise FileNotFoundError(f"path: no atlas at {path}")
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise AtlasError(f"path: {path} is a file but not a zipped atlas")
        with (
            zarr.storage.ZipStore(path, mode="r") as store,
            xr.open_zarr(store, consolidated=False, chunks=None) as data,
        ):
            data = data.load()
    elif not _is_zarr(path):
        raise AtlasError(f"path: {path} is not an atlas (no zarr.json in it)")
    else:
        with xr.open_zarr(path, consolidated=False, chunks=None) as data:
            data = data.load()
    if "format" not in data.attrs:
        raise AtlasError(f"path: {path} is a Zarr dataset but not an atlas")
    if int(data.attrs["format"]) > FORMAT:
        raise AtlasError(f"path: {path} has atlas format {data.attrs['format']}; this regard reads up to {FORMAT}")
    for name in data.variables:
        if data[name].dtype.kind in "TU":
            data[name] = data[name].astype(object)
    order = [name for name in VARIABLES if name in data.data_vars]
    order += [str(name) for name in data.data_vars if name not in VARIABLES]
    return Atlas({name: data[name] for name in order}, data.coords, data.attrs)


# -- merging ------------------------------------------------------------------------------------------------


def merge(atlases: Iterable[Atlas]) -> Atlas:
    """One atlas of several runs of the same model: sums add, maxima win, samples follow each other in order.

    Raises AtlasError naming what differs (model, layers, statistics, labels) when the runs are not of one kind.
    """
    parts = list(atlases)
    if not parts:
        raise AtlasError("atlases: nothing to merge")
    for other in parts[1:]:
        _check_same(parts[0], other)
    first = parts[0]
    coords = {name: c for name, c in first.coords.items() if name not in (*RAGGED, "sample", "offset")}
    if "causal" in coords:
        causal = np.logical_and.reduce([p["causal"].values for p in parts])
        coords["causal"] = first["causal"].copy(data=causal)
    if "offset" in first.coords:
        coords["offset"] = np.unique(np.concatenate([p["offset"].values for p in parts]))
    if "sample" in first.coords:
        coords["sample"] = np.concatenate([p["sample"].values for p in parts])
    for dim in RAGGED:
        if dim in first.dims:
            coords[dim] = np.arange(max(p.sizes[dim] for p in parts))
    merged = {name: _merge_variable([p[name] for p in parts], coords) for name in first.data_vars}
    attrs = dict(first.attrs)
    runs = {json.dumps(run): run for p in parts for run in p.provenance}
    attrs["provenance"] = json.dumps(list(runs.values()))
    return Atlas(merged, coords, attrs)


def _merge_variable(arrays: list[xr.DataArray], coords: dict[Any, Any]) -> xr.Variable:
    rule, dims, attrs = arrays[0].attrs.get("merge"), arrays[0].dims, arrays[0].attrs
    if rule not in MERGES:
        raise AtlasError(f"{arrays[0].name}: merge rule {rule!r} is none of {', '.join(MERGES)}")
    if rule == CONCAT:
        padded = [_pad(a, {d: len(coords[d]) for d in dims if d in RAGGED}) for a in arrays]
        return xr.Variable(dims, np.concatenate(padded, axis=dims.index("sample")), attrs)
    if "offset" in dims:  # an offset that a run never had carries no mass
        arrays = [a.reindex(offset=coords["offset"], fill_value=0.0) for a in arrays]
    total = arrays[0].values.copy()
    for a in arrays[1:]:
        total = total + a.values if rule == SUM else np.maximum(total, a.values)
    return xr.Variable(dims, total, attrs)


def _pad(array: xr.DataArray, sizes: dict[Any, int]) -> np.ndarray:
    values = array.values
    fill: Any = {"f": np.nan, "i": -1}.get(values.dtype.kind, "")
    widths = [(0, sizes.get(d, n) - n) for d, n in zip(array.dims, values.shape, strict=True)]
    return np.pad(values, widths, constant_values=fill) if any(w for _, w in widths) else values


def _check_same(a: Atlas, b: Atlas) -> None:
    for key in SAME_ATTRS:
        x, y = a.attrs.get(key), b.attrs.get(key)
        if x != y:
            raise AtlasError(f"these runs do not merge: {key} differs: {_difference(x, y)}")
    for name in ("layer", "heads", "kind", "layer_index"):
        if name in a.coords or name in b.coords:
            _check_labels(name, a, b)
    missing = set(a.data_vars) ^ set(b.data_vars)
    if missing:
        raise AtlasError(f"these runs do not merge: only one of them holds {', '.join(sorted(map(str, missing)))}")
    for dim in sorted(set(a.dims) | set(b.dims), key=str):
        if dim not in (*RAGGED, "sample", "offset", "layer"):
            _check_labels(str(dim), a, b)


def _check_labels(name: str, a: Atlas, b: Atlas) -> None:
    if name in a.dims and a.sizes[name] != b.sizes.get(name) and name not in a.coords:
        raise AtlasError(f"these runs do not merge: {name} has {a.sizes[name]} and {b.sizes.get(name)} entries")
    if name not in a.coords and name not in b.coords:
        return
    x = [] if name not in a.coords else a[name].values.tolist()
    y = [] if name not in b.coords else b[name].values.tolist()
    if x != y:
        only = [v for v in x if v not in y] + [v for v in y if v not in x]
        shown = ", ".join(map(str, only[:6])) or "the order"
        raise AtlasError(f"these runs do not merge: {name} differs ({shown})")


def _difference(x: Any, y: Any) -> str:
    try:
        left, right = json.loads(x), json.loads(y)
        keys = [k for k in {**left, **right} if left.get(k) != right.get(k)]
        return "; ".join(f"{k}: {left.get(k)!r} and {right.get(k)!r}" for k in keys)
    except (TypeError, ValueError, AttributeError):
        return f"{x!r} and {y!r}"


# -- files --------------------------------------------------------------------------------------------------


def _plain(atlas: Atlas) -> xr.Dataset:
    return xr.Dataset(atlas.data_vars, atlas.coords, atlas.attrs)


def check_free(path: Path) -> None:
    """An atlas may be saved at `path`: nothing is there, or an atlas of the same form."""
    ours = zipfile.is_zipfile(path) if path.suffix == ".zip" else _is_zarr(path)
    if path.exists() and not ours:
        raise AtlasError(f"path: {path} exists and is not an atlas; give another path")


def _save_file(atlas: Atlas, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _sibling(path, f"new-{os.getpid()}")
    try:
        held: dict[str, Any] = {}  # a zip cannot be rewritten, and metadata is: it is made in memory first
        _plain(atlas).to_zarr(zarr.storage.MemoryStore(store_dict=held), mode="w", consolidated=False)
        with open(fresh, "wb") as handle:
            with zipfile.ZipFile(handle, "w") as archive:
                for name, content in held.items():
                    archive.writestr(name, content.to_bytes())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(fresh, path)
        _flush_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _sibling(path: Path, tag: str) -> Path:
    return path.with_name(f".{path.name}.{tag}")


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and (path / "zarr.json").is_file()


def _recover(path: Path) -> None:
    """Put the old atlas back if a save died between its two renames."""
    old = _sibling(path, "old")
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(path)


def _flush(folder: Path) -> None:
    def sync(file: str) -> None:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())

    folders = [(parent, files) for parent, _, files in os.walk(folder)]
    with ThreadPoolExecutor(16) as pool:  # waiting together is one wait of the disk
        list(pool.map(sync, [os.path.join(parent, file) for parent, files in folders for file in files]))
        list(pool.map(_flush_directory, [Path(parent) for parent, _ in folders]))


def _flush_directory(folder: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def variable(name: str, values: np.ndarray) -> xr.Variable:
    """`values` as the atlas variable `name`, with its dimensions and attributes from the table."""
    return xr.Variable(VARIABLES[name].dims, values, VARIABLES[name].attrs)


__all__ = ["CONCAT", "FORMAT", "MAX", "SUM", "Atlas", "AtlasError", "load_atlas", "merge", "variable"]
