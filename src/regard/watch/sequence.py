"""One batch of samples while it runs: what a figure over a whole sample needs until the sample ends.

A sample may come in one forward or in many (cached generation), so the mass each key receives, and whatever is kept
per sample, is gathered here by position and summed up when the sequence closes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .figures import FAI_FAR, FAI_NEAR, Figures, kurtosis, received
from .geometry import BINS, Geometry, pad_positions
from .settings import Watch


@dataclass
class LayerState:
    """What one layer has shown of the sequence so far. Arrays count positions from each sample's first token."""

    first: tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]
    next_pos: int = 0
    length: Int[Tensor, "batch"] | None = None
    causal: bool = True
    halves: Float[Tensor, "batch heads 2 keys"] | None = None
    """Mass received from even and from odd rows."""
    seen: Float[Tensor, "batch one keys"] | None = None
    """Rows that may see each key."""
    odd_chance: Float[Tensor, "batch one keys"] | None = None
    odd_rows: Float[Tensor, "batch one"] | None = None
    by_row: dict[str, Tensor] = field(default_factory=dict)
    by_key: dict[str, Tensor] = field(default_factory=dict)
    band_rows: Float[Tensor, "batch keys"] | None = None
    group_max: Tensor | None = None
    group_rows: Tensor | None = None
    grouped: tuple[Tensor, Tensor] | None = None
    """Mass between groups [batch, heads, q_groups, k_groups] and the rows of each [batch, heads or 1, q_groups]."""
    hits: Tensor | None = None
    copied: Tensor | None = None
    steps: Tensor | None = None
    pending: Tensor | None = None
    first_hidden: Tensor | None = None
    stream: dict[str, Tensor] = field(default_factory=dict)


class Sequence:
    """A batch of samples and the state of every layer that met it."""

    def __init__(self, batch: int, names: list[str], settings: Watch, notes: dict[str, Any]):
        self.batch, self.names, self.settings = batch, names, settings
        self.spans: dict[str, Tensor] = notes.get("spans", {})
        self.groups: dict[str, Any] = {**settings.groups, **notes.get("groups", {})}
        self.rows: Any = notes.get("rows", settings.rows)
        self.ids: dict[str, Tensor] = {}
        self.layers: dict[str, LayerState] = {}
        self.token_layer: str | None = None
        self.embed_norm: Tensor | None = None

    # -- gathering -------------------------------------------------------------------------------------------

    def gather(self, state: LayerState, geo: Geometry, figures: Figures, raw: dict[str, Any]) -> None:
        """Add one call's results by position."""
        state.length = geo.length if state.length is None else torch.maximum(state.length, geo.length)
        state.causal = state.causal and geo.causal
        size = max(int(geo.length.max()), 1)
        if "halves" in figures.columns:
            halves = raw["columns"][:, :, figures.columns["halves"]]
            state.halves = _add_keys(state.halves, halves.double(), geo, size)
            state.seen = _add_keys(state.seen, figures.seen[:, :, 0], geo, size)
            chance = figures.chance["columns"][:, :, figures.columns["halves"]][:, :, 1]
            state.odd_chance = _add_keys(state.odd_chance, chance, geo, size)
            odd = (figures.counted * (geo.q_pos % 2 == 1)[:, None]).sum(2)
            state.odd_rows = odd if state.odd_rows is None else state.odd_rows + odd
        if self.settings.sampled("entropy_raw"):
            self._rowwise(state, "entropy_raw", raw["entropy"], geo, size)
        if self.settings.sampled("group_max_raw"):
            most = (raw["group_rows"].amax(1).double() * geo.rows[..., None]).sum(1)
            rows = geo.rows.sum(1).double()
            state.group_max = most if state.group_max is None else state.group_max + most
            state.group_rows = rows if state.group_rows is None else state.group_rows + rows
        if self.settings.sampled("group_raw"):
            mass, counted = figures.group_mass(raw["columns"]), figures.group_rows
            before = state.grouped
            state.grouped = (mass, counted) if before is None else (before[0] + mass, before[1] + counted)
        if "clipped" in raw:
            self._rowwise(state, "clipped_raw", raw["clipped"], geo, size)
            old = state.by_key.get("banded")
            state.by_key["banded"] = _add_keys(old, raw["banded"].double(), geo, size)
            state.band_rows = _add_keys(state.band_rows, _band_rows(geo), geo, size)

    def _rowwise(self, state: LayerState, name: str, values: Tensor, geo: Geometry, size: int) -> None:
        size = max(size, int(geo.q_pos.max()) + 1)
        kept = state.by_row.get(name)
        if kept is None:
            kept = torch.full((*values.shape[:2], size), torch.nan, device=values.device)
        elif kept.shape[-1] < size:
            kept = torch.nn.functional.pad(kept, (0, size - kept.shape[-1]), value=torch.nan)
        for b in range(values.shape[0]):
            rows = geo.rows[b]
            kept[b][:, geo.q_pos[b, rows]] = values[b][:, rows].float()
        state.by_row[name] = kept

    # -- closing ---------------------------------------------------------------------------------------------

    def sums(self, state: LayerState) -> dict[str, Tensor]:
        """What a layer adds to the sum variables when the samples have ended, [heads, ...] float64."""
        s = self.settings
        out: dict[str, Tensor] = {}
        if state.halves is None or state.seen is None or state.length is None:
            return out
        assert state.odd_chance is not None
        assert state.odd_rows is not None
        heads = state.halves.shape[1]
        profile = received(state.halves.sum(2), state.seen)
        if s.has("received"):
            there = profile.isfinite()
            size = profile.shape[-1]
            bins = torch.arange(size, device=profile.device)[None] * BINS // state.length[:, None]
            place = bins.clamp(max=BINS - 1)[:, None].expand(-1, heads, -1)
            zeros = torch.zeros(*profile.shape[:2], BINS, dtype=profile.dtype, device=profile.device)
            out["received"] = zeros.scatter_add(2, place, torch.where(there, profile, 0.0)).sum(0)
            out["received_keys"] = zeros.scatter_add(2, place, there.double()).sum(0)
        if s.has("kurtosis"):
            value = kurtosis(profile)
            out["received_kurtosis"] = torch.where(value.isfinite(), value, 0.0).sum(0)
            out["received_samples"] = value.isfinite().double().sum(0)
        if s.has("stripe"):
            out |= _stripe(state, heads)
        return out

    def per_sample(self, state: LayerState) -> dict[str, Tensor]:
        """What a layer adds to the per-sample variables, [heads, batch, ...] (stream: [batch, ...])."""
        s = self.settings
        out: dict[str, Tensor] = {}
        assert state.length is not None
        if s.sampled("received_raw") and state.halves is not None and state.seen is not None:
            out["received_raw"] = received(state.halves.sum(2), state.seen).transpose(0, 1)
        for name, values in state.by_row.items():
            out[name] = values.transpose(0, 1)
        if "banded" in state.by_key and state.band_rows is not None:
            rows = state.band_rows[:, None]
            banded = torch.where(rows > 0, state.by_key["banded"] / rows.clamp(min=1), torch.nan)
            out["banded_raw"] = banded.transpose(0, 1)
        if state.group_max is not None and state.group_rows is not None:
            out["group_max_raw"] = state.group_max / state.group_rows[:, None]
        if state.grouped is not None:
            mass, counted = state.grouped
            rows = counted[..., None].expand_as(mass)
            out["group_raw"] = torch.where(rows > 0, mass / rows.clamp(min=1), torch.nan).transpose(0, 1)
        if state.hits is not None and state.copied is not None:
            out["copy_hits"] = state.hits.T.double()
            out["copy_distinct"] = state.copied.sum(2).T.double()
        return out | state.stream

    # -- copying ---------------------------------------------------------------------------------------------

    def copy(self, state: LayerState, index: Tensor, q_abs: Tensor, k_abs: Tensor, valid: Tensor) -> None:
        """Judge this call's rows by their top key `index` [batch, heads, q_len] (key axis, -1 none)."""
        top = torch.where(index >= 0, k_abs[index.clamp(min=0)], -1)
        answer = self.spans.get("answer")
        if answer is None:  # the row that writes the next token: known when that token comes
            last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).amax(1)
            found = top.gather(2, last.clamp(min=0)[:, None, None].expand(-1, top.shape[1], 1))[..., 0]
            state.pending = torch.where(last[:, None] >= 0, found, -1)
            return
        ids, answer = self.ids["input"], answer.to(index.device)
        following = (q_abs + 1).clamp(max=ids.shape[1] - 1)
        judged = valid & (q_abs + 1 >= answer[:, :1]) & (q_abs + 1 < answer[:, 1:]) & (q_abs + 1 < ids.shape[1])
        self._count(state, top, ids[:, following], judged)

    def settle(self, written: Tensor) -> None:
        """The token each sample wrote next, [batch]: judge the rows that waited for it.

        The last token of a generation is never read, so it is taken to be the most likely one.
        """
        for state in self.layers.values():
            if state.pending is not None:
                waiting = torch.ones(self.batch, 1, dtype=torch.bool, device=written.device)
                self._count(state, state.pending[..., None], written[:, None], waiting)
                state.pending = None

    def _count(self, state: LayerState, top: Tensor, written: Tensor, judged: Tensor) -> None:
        """top [batch, heads, rows] positions; written [batch, rows] tokens; judged [batch, rows]."""
        ids, needle = self.ids["input"], self.spans["needle"].to(top.device)
        inside = (top >= needle[:, :1, None]) & (top < needle[:, 1:, None])
        token = ids[:, None].expand(-1, top.shape[1], -1).gather(2, top.clamp(0, ids.shape[1] - 1))
        hit = inside & (token == written[:, None]) & judged[:, None]
        size = max(int((needle[:, 1] - needle[:, 0]).max()), 1)
        if state.hits is None or state.copied is None or state.steps is None:
            state.hits = torch.zeros(top.shape[:2], dtype=torch.long, device=top.device)
            state.copied = torch.zeros(*top.shape[:2], size, dtype=torch.bool, device=top.device)
            state.steps = torch.zeros(top.shape[0], dtype=torch.long, device=top.device)
        state.hits += hit.sum(2)
        state.steps += judged.sum(1)
        place = (top - needle[:, :1, None]).clamp(0, size - 1)
        state.copied |= torch.zeros_like(state.copied, dtype=torch.long).scatter_add_(2, place, hit.long()) > 0


def _add_keys(kept: Tensor | None, values: Tensor, geo: Geometry, size: int) -> Tensor:
    """Add [batch, ..., kv_len] at the keys' positions in their samples."""
    if kept is None:
        kept = torch.zeros(*values.shape[:-1], size, dtype=torch.float64, device=values.device)
    kept = pad_positions(kept, size)
    lead = (slice(None), *([None] * (values.ndim - 2)), slice(None))
    place = geo.k_pos.clamp(0, kept.shape[-1] - 1)[lead].expand(values.shape)
    return kept.scatter_add_(-1, place, torch.where(geo.keys[lead], values.double(), 0.0))


def _band_rows(geo: Geometry) -> Tensor:
    """Rows t with s + near <= t <= s + far for every key s, [batch, kv_len]."""
    out = []
    for b in range(geo.batch):
        at = geo.q_pos[b][geo.rows[b]].sort().values
        out.append(
            torch.searchsorted(at, geo.k_pos[b] + FAI_FAR, right=True) - torch.searchsorted(at, geo.k_pos[b] + FAI_NEAR)
        )
    return torch.stack(out).double()


def _stripe(state: LayerState, heads: int) -> dict[str, Tensor]:
    """Odd rows' mass on the 5% of keys that even rows favour; the first key is left out."""
    assert state.halves is not None
    assert state.odd_chance is not None
    assert state.odd_rows is not None
    device = state.halves.device
    mass = torch.zeros(heads, dtype=torch.float64, device=device)
    chance = torch.zeros(heads, dtype=torch.float64, device=device)
    assert state.length is not None
    for b, n in enumerate(state.length.tolist()):
        if n < 2:
            continue
        even, odd = state.halves[b, :, 0, 1:n], state.halves[b, :, 1, 1:n]
        chosen = even.topk(min(math.ceil(0.05 * n), n - 1), dim=1).indices
        mass += odd.gather(1, chosen).sum(1)
        chance += state.odd_chance[b, :, 1:n].expand(heads, -1).gather(1, chosen).sum(1)
    return {"stripe": mass, "stripe_density": chance, "stripe_rows": state.odd_rows.sum(0).expand(heads)}
