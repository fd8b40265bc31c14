"""From an atlas (and close-ups) to what the page's script reads: one JSON header, one blob of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from regard import measures
from regard.measures.roles import MIXED, ROLES, RULES, RoleTable
from regard.watch.atlas import Atlas, AtlasError

from .pack import Blob, Quantiser, quantiser_for, rounded, triangle
from .taxonomy import LOOKS, MEASURES, SCORES, slug
from .windows import Closeup

BUDGETS = {
    "sinks4+window1/16": "1/16 of the keys",
    "sinks4+window1/8": "1/8 of the keys",
    "sinks4+window1/4": "1/4 of the keys",
}
RECEIVERS = 20


@dataclass(frozen=True)
class Picture:
    """A picture behind an image model's patches: a PNG as data URL, its size, the patch grid, tokens before it."""

    src: str
    size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int


@dataclass
class Extras:
    """What a page can show beyond the atlas: close-ups, token axes, a picture."""

    closeups: Mapping[str, Closeup] = field(default_factory=dict)
    axes: Sequence[Sequence[str]] | None = None
    """Token texts of each sequence; default the atlas's first sample."""
    axis_of: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """For a layer, which of `axes` its queries and its keys are."""
    picture: Picture | None = None
    query: int | None = None
    """The query picked when the page opens; default the last."""


@dataclass
class Frame:
    """The atlas's layers in plain lists."""

    atlas: Atlas
    names: list[str]
    heads: list[int]
    kinds: list[str]
    causal: list[bool]

    @classmethod
    def of(cls, atlas: Atlas) -> Frame:
        """Read the coordinates, checking that there is a head to show."""
        missing = [c for c in ("layer", "head") if c not in atlas.coords]
        if missing or not atlas.sizes.get("layer"):
            raise AtlasError("atlas: it holds no attention layer; watch a model while it runs before reporting")
        n = atlas.sizes["layer"]
        coord = atlas.coords
        heads = coord["heads"].values.astype(int).tolist() if "heads" in coord else [atlas.sizes["head"]] * n
        kinds = coord["kind"].values.astype(str).tolist() if "kind" in coord else ["self"] * n
        causal = coord["causal"].values.astype(bool).tolist() if "causal" in coord else [False] * n
        return cls(atlas, coord["layer"].values.astype(str).tolist(), heads, kinds, causal)

    def ragged(self, values: Any, digits: int = 4) -> list[Any]:
        """[layer, head, ...] as nested lists without the heads a layer lacks."""
        return [rounded(np.asarray(values[i])[:h], digits) for i, h in enumerate(self.heads)]


def payload(atlas: Atlas, table: RoleTable, extras: Extras) -> tuple[dict[str, Any], Blob]:
    """Everything the page's script reads."""
    frame = Frame.of(atlas)
    blob = Blob()
    axes = _axes(atlas, extras)
    lengths = _lengths(frame, extras)
    cells = sum(_cells(extras, name) for name in frame.names)
    quant = quantiser_for(max((k for _, k in lengths if k), default=1), cells)
    header: dict[str, Any] = {
        "quant": {"floor": quant.floor, "levels": quant.levels},
        "layers": _layers(frame, extras, axes, lengths),
        "axes": axes,
        "roles": _roles(),
        "rules": _rules(table),
        "roleOf": _role_of(frame, table),
        "scores": frame.ragged(_score_values(table), 6),
        "holds": _holds(frame, table),
        "measures": _measures(frame),
        "budgets": _budgets(frame),
        "maps": _maps(frame, extras, blob, quant, lengths),
        "windows": _windows(frame, extras, blob, quant),
        "offsets": _offsets(frame, blob),
        "window": _optional(frame, "window_mass"),
        "entropyAt": _optional(frame, "entropy_at"),
        "received": _received(frame, extras),
        "relative": _relative(atlas, extras),
        "queryLength": [q for q, _ in lengths],
        "keyLength": [k for _, k in lengths],
        "picture": vars(extras.picture) if extras.picture else None,
        "query": extras.query,
    }
    header["arrays"] = blob.index
    return header, blob


def _axes(atlas: Atlas, extras: Extras) -> list[list[str]]:
    if extras.axes is not None:
        return [list(map(str, axis)) for axis in extras.axes]
    if "tokens" not in atlas or atlas.sizes.get("sample", 0) != 1:
        return []
    n = int(atlas["n_tokens"].values[0])
    return [[str(t) for t in atlas["tokens"].values[0][:n]]]


def _lengths(frame: Frame, extras: Extras) -> list[tuple[int, int]]:
    """(q_len, kv_len) of each layer: exact where looked at closely, else the sample's; 100 (percent) for several."""
    atlas = frame.atlas
    if _relative(atlas, extras):
        return [(100, 100)] * len(frame.names)
    longest = int(atlas["n_tokens"].values.max()) if "n_tokens" in atlas and atlas["n_tokens"].size else 0
    if not longest and "received_raw" in atlas:
        longest = atlas.sizes["key"]
    if not longest and "rows" in atlas and atlas.sizes.get("sample", 1) == 1:
        longest = int(np.nanmax(atlas["rows"].values))
    out = []
    for name in frame.names:
        seen = extras.closeups.get(name)
        out.append((seen.q_len, seen.kv_len) if seen else (longest, longest))
    return out


def _relative(atlas: Atlas, extras: Extras) -> bool:
    """Whether positions can only be told in percent of the length: several samples, no close-up of one."""
    return not extras.closeups and atlas.sizes.get("sample", 1) != 1


def _cells(extras: Extras, name: str) -> int:
    seen = extras.closeups.get(name)
    if seen is None:
        return 0
    total = 0 if seen.blocks is None else seen.blocks.numel()
    total += sum(w.numel() for _, w in seen.windows)
    return total // 2 if seen.causal else total


def _layers(
    frame: Frame, extras: Extras, axes: Sequence[Sequence[str]], lengths: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    out = []
    for i, name in enumerate(frame.names):
        q_axis, k_axis = extras.axis_of.get(name, (0, 0) if frame.kinds[i] == "self" else (-1, -1))
        # An axis of another length is another sequence: positions only.
        for side, axis, length in (("q", q_axis, lengths[i][0]), ("k", k_axis, lengths[i][1])):
            if 0 <= axis < len(axes) and len(axes[axis]) != length:
                q_axis, k_axis = (-1, k_axis) if side == "q" else (q_axis, -1)
        out.append(
            {
                "name": name,
                "index": i,
                "heads": frame.heads[i],
                "kind": frame.kinds[i],
                "causal": frame.causal[i],
                "q_axis": q_axis,
                "k_axis": k_axis,
            }
        )
    return out


def _roles() -> list[dict[str, str]]:
    return [
        {"id": slug(role), "label": role, "code": LOOKS[role].code, "rule": LOOKS[role].meaning}
        for role in (*ROLES, MIXED)
    ]


def _rules(table: RoleTable) -> list[dict[str, Any]]:
    some = next(iter(table.evidence.values()))["roles"]
    return [
        {
            "role": slug(rule.role),
            "combine": rule.combine,
            "conditions": [
                {
                    "label": SCORES.get(c["score"], c["score"]),
                    "op": c["op"],
                    "threshold": c["threshold"],
                    "from": c["where_from"],
                }
                for c in some[rule.role]["scores"]
            ],
        }
        for rule in RULES
    ]


def _score_values(table: RoleTable) -> np.ndarray:
    order = [c.score for rule in RULES for c in rule.conditions]
    return table.scores.sel(role=order).transpose("layer", "head", "role").values


def _evidence(frame: Frame, table: RoleTable) -> list[list[dict[str, Any]]]:
    return [[table.evidence[name, h] for h in range(n)] for name, n in zip(frame.names, frame.heads, strict=True)]


def _role_of(frame: Frame, table: RoleTable) -> list[list[str]]:
    return [[slug(e["role"]) for e in row] for row in _evidence(frame, table)]


def _holds(frame: Frame, table: RoleTable) -> list[list[list[bool | None]]]:
    return [[[e["roles"][rule.role]["holds"] for rule in RULES] for e in row] for row in _evidence(frame, table)]


def _measures(frame: Frame) -> list[dict[str, Any]]:
    """Every registered measure that gives one number a head and can be taken from this atlas."""
    names = [*MEASURES, *(n for n in measures.names() if n not in MEASURES)]
    out = []
    for name in names:
        measure = measures.get(name)
        try:
            values = measure(frame.atlas)
        except AtlasError:
            continue
        if values.dims != ("layer", "head") or not np.isfinite(values.values).any():
            continue
        units = "" if measure.units in ("1", "") else f" ({measure.units})"
        out.append(
            {
                "name": name,
                "label": MEASURES.get(name, name.replace("_", " ")),
                "title": f"{name.replace('_', ' ')}{units}",
                "formula": measure.formula,
                "paper": measure.paper,
                "values": frame.ragged(values.values, 6),
            }
        )
    return out


def _budgets(frame: Frame) -> list[dict[str, Any]]:
    try:
        recall, share = measures.get("template_recall")(frame.atlas), measures.get("template_share")(frame.atlas)
    except AtlasError:
        return []
    return [
        {
            "label": label,
            "recall": frame.ragged(recall.sel(template=name).values, 6),
            "share": frame.ragged(share.sel(template=name).values),
        }
        for name, label in BUDGETS.items()
        if name in recall["template"].values
    ]


def _optional(frame: Frame, name: str) -> list[Any] | None:
    try:
        return frame.ragged(measures.get(name)(frame.atlas).values)
    except AtlasError:
        return None


def _maps(
    frame: Frame, extras: Extras, blob: Blob, quant: Quantiser, lengths: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Block maps, coarse to fine: the atlas's, and the close-ups'. Values are a key block's share of a row's mass."""
    out = []
    if "blocks" in frame.atlas:
        blocks = frame.atlas["blocks"].values
        rows = frame.atlas["rows_at"].values[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(rows > 0, blocks / rows, 0.0)
        out.append(_one_map("maps", {n: share[i] for i, n in enumerate(frame.names)}, frame, blob, quant, lengths))
    fine = {n: c.blocks.numpy() for n, c in extras.closeups.items() if c.blocks is not None}
    if fine:
        out.append(_one_map("fine", fine, frame, blob, quant, lengths))
    return [m for m in out if any(m["layers"])]


def _one_map(
    array: str,
    maps: Mapping[str, np.ndarray],
    frame: Frame,
    blob: Blob,
    quant: Quantiser,
    lengths: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    layers: list[dict[str, Any] | None] = []
    codes: list[np.ndarray] = []
    at = 0
    size = next(iter(maps.values())).shape[-1]
    for i, name in enumerate(frame.names):
        given = maps.get(name)
        if given is None or not np.isfinite(given[: frame.heads[i]]).all():
            layers.append(None)
            continue
        flat, tri = triangle(quant.encode(given[: frame.heads[i]]))
        layers.append({"offset": at, "tri": tri, "q_len": lengths[i][0], "kv_len": lengths[i][1]})
        codes.append(flat)
        at += flat.size
    blob.add(array, np.concatenate(codes) if codes else np.zeros(0, np.uint8))
    return {"size": size, "array": array, "layers": layers}


def _windows(frame: Frame, extras: Extras, blob: Blob, quant: Quantiser) -> list[dict[str, Any]]:
    count = max((len(c.windows) for c in extras.closeups.values()), default=0)
    out = []
    for w in range(count):
        layers: list[dict[str, Any] | None] = []
        codes, keys, tops = [], [], []
        at = top_at = 0
        spans = set()
        for i, name in enumerate(frame.names):
            seen = extras.closeups.get(name)
            if seen is None or len(seen.windows) <= w:
                layers.append(None)
                continue
            window, weights = seen.windows[w]
            heads = weights.numpy()[: frame.heads[i]]
            square = window.rows == window.keys and seen.causal
            flat, tri = triangle(quant.encode(heads)) if square else (quant.encode(heads).reshape(-1), False)
            whole = window.keys == (0, seen.kv_len)
            entry = {"rows": window.rows, "keys": window.keys, "offset": at, "tri": tri, "covers": whole}
            if not whole:
                weight, index = seen.heaviest[w]
                tops.append(quant.encode(weight.numpy()).reshape(-1))
                keys.append(index.numpy().astype("<u4").reshape(-1))
                entry |= {"top": weight.shape[-1], "top_offset": top_at}
                top_at += tops[-1].size
            layers.append(entry)
            codes.append(flat)
            at += flat.size
            spans.add(window)
        blob.add(f"window{w}", np.concatenate(codes))
        if tops:
            blob.add(f"window{w}_top", np.concatenate(tops))
            longest = max(int(k.max()) for k in keys)
            blob.add(f"window{w}_keys", np.concatenate(keys).astype("<u2" if longest < 65536 else "<u4"))
        first = min(spans, key=lambda s: (s.rows, s.keys))
        rows, cols = first.rows, first.keys
        label = f"exact {rows[0]}–{rows[1] - 1}" + ("" if rows == cols else f" × {cols[0]}–{cols[1] - 1}")
        out.append(
            {
                "id": f"window{w}",
                "label": label,
                "array": f"window{w}",
                "top_weights": f"window{w}_top",
                "top_keys": f"window{w}_keys",
                "layers": layers,
            }
        )
    return out


def _offsets(frame: Frame, blob: Blob) -> dict[str, Any] | None:
    try:
        near = measures.get("offset_profile")(frame.atlas).transpose("layer", "head", "offset")
    except AtlasError:
        return None
    offsets = near["offset"].values.astype(int)
    values = np.concatenate([near.values[i, :h] for i, h in enumerate(frame.heads)])
    used = np.isfinite(values).any(0)
    if not used.any():
        return None
    values, offsets = values[:, used], offsets[used]
    codes = np.where(np.isfinite(values), np.rint(np.clip(np.nan_to_num(values), 0, 1) * 65534), 65535)
    blob.add("near", codes.astype("<u2"))
    widths = frame.atlas["width"].values.astype(int).tolist() if "width" in frame.atlas.coords else []
    return {"offsets": offsets.tolist(), "widths": widths}


def _received(frame: Frame, extras: Extras) -> dict[str, Any] | None:
    """The keys that receive most, [position, figure]: the share of all mass where looked at closely, else the atlas's
    mean weight from the queries that may see the key (single samples only)."""
    atlas = frame.atlas
    if extras.closeups:
        closeups = [extras.closeups.get(name) for name in frame.names]
        rows = [None if c is None or c.received is None else c.received.numpy() for c in closeups]
        figure = "mass"
    elif "received_raw" in atlas and atlas.sizes.get("sample") == 1:
        rows = list(atlas["received_raw"].transpose("sample", "layer", "head", "key").values[0])
        figure = "weight"
    else:
        return None
    return {
        "figure": figure,
        "top": [[] if x is None else [_top(r) for r in x[:n]] for x, n in zip(rows, frame.heads, strict=True)],
    }


def _top(row: np.ndarray) -> list[list[Any]]:
    row = np.nan_to_num(row)
    order = np.argsort(-row, kind="stable")[:RECEIVERS]
    return [[int(k), rounded(float(row[k]))] for k in order if row[k] > 0]
