"""The figures of one call: which reducers its pass needs, and what they add to the atlas.

`Figures` is made once for all layers that share a geometry; `take(q, k, ...)` runs one pass over a layer's weights.
Everything that is a density, a chance or a count of allowed keys comes from the same pass over a head of zero scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.kernels.reducers import Columns, Entropy, Gram, Lse, Offsets, Pairs, PatternMass, Squares, Top
from regard.kernels.tiles import Reducer, tile_pass
from regard.patterns.pattern import Pattern

from .geometry import BINS, Geometry, one_hot
from .reducers import Banded, Clipped, GroupRows, KeyWeights, Rings, SameToken
from .settings import BUDGETS, Watch

SINKS = 4
CLASSES = (*(-(2**n) for n in range(19, -1, -1)), 0, *(2**n for n in range(20)))
"""Labels of `offset_class`: the bound nearest 0 of i - argmax."""
SPARSE = 0.03  # share of related pairs below which a list of them is cheaper than comparing tokens in every tile
MOST_PAIRS = 1 << 24
WAAD_MOST, FAI_NEAR, FAI_FAR = 10, 10, 100


@dataclass(frozen=True, eq=False)
class Moved(Pattern):
    """Patterns over positions from each sample's first token, asked by index on the key axis."""

    patterns: tuple[Pattern, ...]
    shift: tuple[int, ...]

    def allows(self, q_idx: Tensor, kv_idx: Tensor, head: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
        """The sample's own pattern at its own positions; padding stands at 0."""
        assert batch is not None
        samples = batch.unique().tolist()
        out: Tensor | None = None
        for sample in samples:
            shift = self.shift[sample]
            own = self.patterns[sample].allows((q_idx - shift).clamp(min=0), (kv_idx - shift).clamp(min=0), head, batch)
            out = own if out is None else torch.where(batch == sample, own, out)
        assert out is not None
        return out


class Figures:
    """The passes for all calls of one geometry.

    Args:
        geometry: where rows and keys stand.
        settings: what to watch.
        groups: for each of the user's groups, which rows [batch, q_len] and keys [batch, kv_len] are in it.
        ids: token ids of rows and keys, None if unknown or not of one sequence.
    """

    def __init__(
        self,
        geometry: Geometry,
        settings: Watch,
        groups: dict[str, tuple[Tensor, Tensor]],
        ids: tuple[Tensor, Tensor] | None,
    ):
        self.geometry, self.settings, self.groups = geometry, settings, groups
        self.device = geometry.q_pos.device
        self.positional = geometry.positional
        self.reducers: dict[str, Reducer] = {}
        self.by_row: dict[str, Reducer] = {}
        self.columns: dict[str, slice] = {}
        self._choose(ids if self.positional else None)
        self._uniform()

    # -- which reducers --------------------------------------------------------------------------------------

    def _choose(self, ids: tuple[Tensor, Tensor] | None) -> None:
        s, geo, r = self.settings, self.geometry, self.reducers
        if s.has("entropy") or s.sampled("entropy_raw"):
            r["entropy"] = Entropy()
        if s.has("top1") or s.sampled("copy_hits"):
            r["top"] = Top()
        if s.has("sq"):
            r["sq"] = Squares()
        if s.has("head_gram"):
            r["gram"] = Gram()
        if s.has("group_max") or s.sampled("group_max_raw"):
            r["group_rows"] = GroupRows(torch.stack([self._keys_of(g) for g in s.k_groups], -1))
        weights = self._column_weights()
        if weights is not None:
            r["columns"] = Columns(weights)
        if not self.positional:
            return
        if s.has("distance", "near", "window", "template", "relation"):
            # Every row once, and every row by its longest distance.
            weights = torch.stack([torch.ones_like(geo.longest, dtype=torch.float64), 1 / geo.longest.double()], -1)
            r["offsets"] = Offsets(*geo.offsets, weights)
        if s.has("template"):
            r["sinks"] = KeyWeights(self._sink_keys())
            if s.templates:
                r["patterns"] = PatternMass([self._moved(t) for t in s.templates.values()])
        if s.has("relation") and ids is not None:
            for name, shift in (("duplicate", 0), ("induction", 1)):
                if name in s.relations:
                    r[name], self.by_row[name] = self._same_token(*ids, shift)
        if s.has("ring") and s.grid is not None:
            r["rings"] = Rings(*s.grid, s.prefix)
        if s.sampled("rhythm"):
            r["clipped"], r["banded"] = Clipped(WAAD_MOST), Banded(FAI_NEAR, FAI_FAR)

    def _column_weights(self) -> Tensor | None:
        """Row weights [batch, q_len, C] of the column pass, and their places in `self.columns`."""
        s, geo = self.settings, self.geometry
        if not (s.has("group", "received", "kurtosis", "blocks", "stripe") or s.sampled("received_raw", "group_raw")):
            return None
        rows = geo.rows
        even = geo.q_pos % 2 == 0
        parts = {"halves": torch.stack([rows & even, rows & ~even], -1)}
        if s.has("group"):
            parts["later"] = torch.stack([rows & self._later(g) for g in s.k_groups], -1)
        if (s.has("group") or s.sampled("group_raw")) and s.groups:
            parts["q_groups"] = torch.stack([rows & self.groups[g][0] for g in s.groups], -1)
        if s.has("blocks"):
            parts["blocks"] = one_hot(geo.q_bin, rows, torch.bool)
        at = 0
        for name, part in parts.items():
            self.columns[name] = slice(at, at + part.shape[-1])
            at += part.shape[-1]
        return torch.cat(list(parts.values()), -1).to(torch.float32)

    def _keys_of(self, group: str) -> Tensor:
        geo = self.geometry
        return geo.keys & ((geo.k_pos == 0) if group == "first" else self.groups[group][1])

    def _rows_of(self, group: str) -> Tensor:
        geo = self.geometry
        return geo.rows if group == "all" else geo.rows & self.groups[group][0]

    def _later(self, group: str) -> Tensor:
        """Rows after the group's last key; where layers look both ways, rows outside the group."""
        geo, keys = self.geometry, self._keys_of(group)
        there = keys.any(1, keepdim=True)
        if not self.positional:
            return there.expand_as(geo.rows)
        if geo.causal:
            last = torch.where(keys, geo.k_pos, -1).amax(1, keepdim=True)
            return there & (geo.q_pos > last)
        inside = geo.q_pos == 0 if group == "first" else self.groups[group][0]
        return there & ~inside

    def _sink_keys(self) -> Tensor:
        """Key-axis index of each sample's first four tokens, -1 where the call has no such key."""
        geo = self.geometry
        index = torch.arange(SINKS, device=self.device) - geo.k_pos[:, :1]
        there = (index >= 0) & (index < geo.k_pos.shape[1])
        return torch.where(there & geo.keys.gather(1, index.clamp(0, geo.k_pos.shape[1] - 1)), index, -1)

    def _moved(self, template: Pattern | Callable[[int], Pattern]) -> Moved:
        geo = self.geometry
        made = [template if isinstance(template, Pattern) else template(n) for n in geo.length.tolist()]
        for pattern in made:
            if not isinstance(pattern, Pattern):
                raise ValueError(
                    f"templates: a function of the length must give a Pattern, got {type(pattern).__name__}"
                )
        return Moved(tuple(made), tuple((-geo.k_pos[:, 0]).tolist()))

    def _same_token(self, row_ids: Tensor, key_ids: Tensor, shift: int) -> tuple[Reducer, Reducer]:
        """Keys j < i whose token `shift` places before is the row's, summed over rows and by row; padding has none."""
        geo = self.geometry
        if shift:
            key_ids = torch.cat([torch.full_like(key_ids[:, :1], -2), key_ids[:, :-1]], 1)
            before = torch.cat([torch.zeros_like(geo.keys[:, :1]), geo.keys[:, :-1]], 1)
            key_ids = key_ids.masked_fill(~(geo.keys & before), -2)
        else:
            key_ids = key_ids.masked_fill(~geo.keys, -2)
        row_ids = row_ids.masked_fill(~geo.rows, -1)
        batch, q_len, kv_len = *row_ids.shape, key_ids.shape[1]
        order, place = key_ids.sort(1)
        begin = torch.searchsorted(order, row_ids)
        count = torch.searchsorted(order, row_ids, right=True) - begin
        if int(count.sum()) > min(SPARSE * batch * q_len * kv_len, MOST_PAIRS):
            return SameToken(row_ids, key_ids), SameToken(row_ids, key_ids)
        # Each row's matches stand together in the sorted keys.
        flat = count.flatten()
        row = torch.arange(batch * q_len, device=self.device).repeat_interleave(flat)
        within = torch.arange(len(row), device=self.device) - (flat.cumsum(0) - flat).repeat_interleave(flat)
        b_idx, q_idx = row // q_len, row % q_len
        k_idx = place[b_idx, begin.flatten()[row] + within]
        earlier = k_idx < q_idx + geo.q_start
        b_idx, q_idx, k_idx = b_idx[earlier], q_idx[earlier], k_idx[earlier]
        pairs = (q_idx, k_idx) if batch == 1 else (b_idx, q_idx, k_idx)
        return Pairs(pairs, total=True), Pairs(pairs)

    # -- the uniform head ------------------------------------------------------------------------------------

    def _uniform(self) -> None:
        geo, s = self.geometry, self.settings
        heads = 1 if geo.allowed is None else geo.allowed.shape[1]
        batch, q_len, kv_len = geo.batch, geo.q_pos.shape[1], geo.k_pos.shape[1]
        q = torch.zeros(batch, heads, q_len, 1, dtype=torch.float64, device=self.device)
        k = torch.zeros(batch, 1, kv_len, 1, dtype=torch.float64, device=self.device)
        options: dict[str, Any] = {
            "mask": geo.allowed,
            "is_causal": geo.is_causal,
            "q_start": geo.q_start,
            "valid": geo.rows,
            "scale": 1.0,
        }
        (lse,) = tile_pass(q, k, [Lse()], **options)
        self.n_keys = lse.exp().round()  # [batch, heads or 1, q_len], 0 in rows that do not count
        self.row_count = self.counted.sum((0, 2))
        used = ("columns", "offsets", "sinks", "patterns", "rings")
        chosen = {name: self.reducers[name] for name in used if name in self.reducers} | self.by_row
        if self.positional and s.has("relation"):
            rows = torch.arange(q_len, device=self.device)
            for name, back in (("self", 0), ("previous", 1)):
                if name in s.relations:
                    there = (rows + geo.q_start - back >= 0) & (rows + geo.q_start - back < kv_len)
                    chosen[name] = Pairs((rows[there], rows[there] + geo.q_start - back))
        self.chance = dict(zip(chosen, tile_pass(q, k, list(chosen.values()), **options), strict=True))
        if "columns" in chosen:
            # Weighted by its number of keys, a uniform row counts one for every key it may see.
            counts = [self._rows_of(g) for g in s.q_groups]
            weights = torch.stack(counts, -1).double()
            per_head = []
            for h in range(heads):  # the weights differ between heads only where the masks do
                w = weights * self.n_keys[:, h, :, None]
                mask = geo.allowed if heads == 1 else geo.allowed[:, h : h + 1]  # type: ignore[index]
                (seen,) = tile_pass(q[:, :1], k, [Columns(w)], **{**options, "mask": mask})
                per_head.append(seen.round())
            self.seen = torch.cat(per_head, 1)  # [batch, heads, q_groups, kv_len]

    # -- one layer -------------------------------------------------------------------------------------------

    def take(self, q: Tensor, k: Tensor, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One pass over a layer: what it adds to the sums ([heads, ...], float64) and the raw results by reducer."""
        found = tile_pass(
            q, k, list(self.reducers.values()), q_start=self.geometry.q_start, valid=self.geometry.rows, **options
        )
        raw = dict(zip(self.reducers, found, strict=True))
        return self.sums(raw, q.shape[1]), raw

    def sums(self, raw: dict[str, Any], heads: int) -> dict[str, Tensor]:
        """The sum variables of a layer, summed over samples."""
        s = self.settings
        out: dict[str, Tensor] = {"rows": self.row_count.expand(heads)}
        if s.has("entropy"):
            self._entropy(raw["entropy"].double(), out, heads)
        if s.has("entropy", "blocks"):
            out["rows_at"] = torch.einsum("bhq,bqs->hs", self.counted, self._row_bins).expand(heads, -1)
        if s.has("top1"):
            self._top(raw["top"], out)
        if s.has("sq"):
            out["sq"] = raw["sq"].double().sum((0, 2))
        if s.has("head_gram"):
            out["head_gram"] = raw["gram"].double().sum(0)
        if s.has("group_max"):
            most = raw["group_rows"].amax(1).double()  # [batch, q_len, groups]
            out["group_max"] = torch.stack([(most * self._rows_of(g)[..., None]).sum((0, 1)) for g in s.q_groups])
        if s.has("group"):
            self._groups(raw["columns"], out, heads)
        if s.has("blocks"):
            blocks = raw["columns"][:, :, self.columns["blocks"]]
            out["blocks"] = (blocks @ self._key_bins.to(blocks.dtype)[:, None]).double().sum(0)
        if not self.positional:
            return out
        if "offsets" in raw:
            self._offsets(raw["offsets"].double().sum(0), out)
        if s.has("relation"):
            self._relations(raw, out, heads)
        if s.has("template"):
            out["template_mass"] = self._templates(raw)
            out["template_density"] = self._template_chance.expand(heads, -1)
        if "rings" in raw:
            out["ring_mass"] = raw["rings"].double().sum((0, 2))
            self._rings(out, heads)
        return out

    @cached_property
    def counted(self) -> Tensor:
        """1 for rows that count and may see a key, [batch, heads or 1, q_len], float64."""
        return (self.n_keys > 0).double()

    @cached_property
    def _row_bins(self) -> Tensor:
        return one_hot(self.geometry.q_bin, self.geometry.rows, torch.float64)

    @cached_property
    def _key_bins(self) -> Tensor:
        return one_hot(self.geometry.k_bin, self.geometry.keys, torch.float64)

    @cached_property
    def _group_keys(self) -> Tensor:
        return torch.stack([self._keys_of(g) for g in self.settings.k_groups], -1).double()  # [batch, kv_len, groups]

    @cached_property
    def group_rows(self) -> Tensor:
        """Rows of each group that count, [batch, heads or 1, q_groups]."""
        inside = torch.stack([self._rows_of(g) for g in self.settings.q_groups], -1).double()
        return torch.einsum("bhq,bqc->bhc", self.counted, inside)

    def group_mass(self, columns: Tensor) -> Tensor:
        """Mass from the rows of each group to its keys, [batch, heads, q_groups, k_groups], of the column pass."""
        rows = [columns[:, :, self.columns["halves"]].double().sum(2, keepdim=True)]
        if self.settings.groups:
            rows.append(columns[:, :, self.columns["q_groups"]].double())
        return torch.einsum("bhck,bkg->bhcg", torch.cat(rows, 2), self._group_keys)

    @cached_property
    def _group_counts(self) -> dict[str, Tensor]:
        after = torch.stack([self._later(g) for g in self.settings.k_groups], -1).double()
        return {
            "group_keys": torch.einsum("bhck,bkg->hcg", self.seen, self._group_keys),
            "group_rows": self.group_rows.sum(0),
            "later_rows": torch.einsum("bhq,bqg->hg", self.counted, after),
        }

    def _entropy(self, entropy: Tensor, out: dict[str, Tensor], heads: int) -> None:
        n = self.n_keys
        out["entropy"] = entropy.sum((0, 2))
        out["entropy_norm"] = torch.where(n >= 2, entropy / n.clamp(min=2).log(), 0.0).sum((0, 2))
        out["entropy_norm_rows"] = (n >= 2).sum((0, 2)).double().expand(heads)
        out["entropy_at"] = torch.einsum("bhq,bqs->hs", entropy, self._row_bins)

    def _top(self, top: tuple[Tensor, Tensor], out: dict[str, Tensor]) -> None:
        geo, (weight, index) = self.geometry, top
        out["top1_weight"] = weight.double().sum((0, 2))
        if not self.positional:
            return
        key = geo.k_pos[:, None].expand(-1, index.shape[1], -1).gather(2, index.clamp(min=0))
        offset = geo.q_pos[:, None] - key
        size = torch.log2(offset.abs().clamp(min=1).double()).floor().long() + 1
        label = 20 + torch.sign(offset) * size  # place in CLASSES
        counted = (index >= 0).double()
        counts = torch.zeros(index.shape[1], len(CLASSES), dtype=torch.float64, device=self.device)
        flat = label.clamp(0, len(CLASSES) - 1).transpose(0, 1).flatten(1)
        out["top1_offset"] = counts.scatter_add_(1, flat, counted.transpose(0, 1).flatten(1))

    def _groups(self, columns: Tensor, out: dict[str, Tensor], heads: int) -> None:
        out["group"] = self.group_mass(columns).sum(0)
        out |= {name: counts.expand(heads, *counts.shape[1:]) for name, counts in self._group_counts.items()}
        later = columns[:, :, self.columns["later"]].double()
        out["later"] = torch.einsum("bhgk,bkg->hg", later, self._group_keys)

    def _offsets(self, profile: Tensor, out: dict[str, Tensor]) -> None:
        """distance, near and window from the full profile [heads, 2, offsets]."""
        s, (lo, hi) = self.settings, self.geometry.offsets
        if s.has("distance"):
            far = torch.arange(lo, hi, device=self.device).abs().double()
            out["distance"], out["distance_norm"] = (profile @ far).unbind(-1)
        total = profile[:, 0]
        if s.has("near"):
            first = 1 - s.near
            near = torch.zeros(total.shape[0], s.near - first, dtype=torch.float64, device=self.device)
            a, b = max(lo, first), min(hi, s.near)
            if a < b:
                near[:, a - first : b - first] = total[:, a - lo : b - lo]
            out["near"] = near
            out["near_rows"] = self._near_rows
        if s.has("window"):
            inside = self._within(total)
            widths = torch.tensor(list(s.widths), device=self.device).clamp(max=inside.shape[-1]) - 1
            out["window"] = inside[:, widths]

    @cached_property
    def _near_rows(self) -> Tensor:
        """Rows that have a key at each near offset: some token of the sample stands there."""
        geo, near = self.geometry, self.settings.near
        offsets = torch.arange(1 - near, near, device=self.device)
        counts = []
        for b in range(geo.batch):
            at, n = geo.q_pos[b][geo.rows[b]].sort().values, geo.length[b]
            # key = i - o must lie in [0, n): o <= i < o + n
            lower = torch.searchsorted(at, offsets)
            upper = torch.searchsorted(at, offsets + n)
            counts.append(upper - lower)
        total = torch.stack(counts).sum(0).double()
        return total * (offsets >= 0) if geo.causal else total

    def _within(self, profile: Tensor) -> Tensor:
        """Mass on |offset| <= d for d = 0, 1, ...: [..., distances] from a profile [..., offsets]."""
        lo, hi = self.geometry.offsets
        most = max(hi - 1, -lo, 0)
        folded = torch.zeros(*profile.shape[:-1], most + 1, dtype=profile.dtype, device=profile.device)
        offsets = torch.arange(lo, hi, device=profile.device).abs()
        return folded.index_add_(-1, offsets, profile).cumsum(-1)

    def _relations(self, raw: dict[str, Any], out: dict[str, Tensor], heads: int) -> None:
        s, (lo, hi) = self.settings, self.geometry.offsets
        mass, rows, chance = [], [], []
        zero = torch.zeros(heads, dtype=torch.float64, device=self.device)
        profile = raw["offsets"][:, :, 0].double().sum(0)
        for name in s.relations:
            if name in ("self", "previous"):
                offset = 0 if name == "self" else 1
                mass.append(profile[:, offset - lo] if lo <= offset < hi else zero)
            else:
                mass.append(raw[name].double().transpose(0, 1).flatten(1).sum(1) if name in raw else zero)
            uniform = self.chance.get(name)
            rows.append(zero if uniform is None else (uniform > 0).sum((0, 2)).double().expand(heads))
            chance.append(zero if uniform is None else uniform.sum((0, 2)).expand(heads))
        out["relation_mass"], out["relation_rows"] = torch.stack(mass, -1), torch.stack(rows, -1)
        out["relation_chance"] = torch.stack(chance, -1)

    @cached_property
    def _template_chance(self) -> Tensor:
        return self._templates(self.chance)

    def _templates(self, raw: dict[str, Any]) -> Tensor:
        """Mass of every template, [heads, templates], of the layer's weights or of the uniform head's."""
        s, geo = self.settings, self.geometry
        profile = raw["offsets"][:, :, 0].double()
        within = self._within(profile)
        sinks = raw["sinks"].double()
        n = geo.length
        out: dict[str, Tensor] = {}
        for name, share in BUDGETS.items():
            budget = (n // share).clamp(min=2)
            sink_keys = (budget // 2).clamp(max=SINKS)
            window = budget - sink_keys
            reach = window - 1 if geo.causal else (window - 1) // 2
            place = torch.arange(SINKS, device=self.device)
            beyond = (geo.q_pos[..., None] - place).abs() > reach[:, None, None]  # [batch, q_len, SINKS]
            counted = (beyond & (place < sink_keys[:, None, None])).double()
            out[f"sinks4+window{name}"] = self._reach(within, reach) + torch.einsum("bhqs,bqs->h", sinks, counted)
        out["window1/16"] = self._reach(within, (n // 16).clamp(min=1) - 1)
        out["diagonal"] = self._reach(within, (n // 64).clamp(min=1))
        if s.lag is not None:
            width, half = max(1, s.lag // 8), s.lag // 2
            offsets = torch.arange(*geo.offsets, device=self.device)
            on = (torch.remainder(offsets + half, s.lag) - half).abs() <= width
            out["diagonals"] = profile[..., on].sum((0, 2))
            out["diagonals m=0"] = profile[..., offsets.abs() <= width].sum((0, 2))
        for i, name in enumerate(s.templates):
            out[name] = raw["patterns"][..., i].double().sum((0, 2))
        return torch.stack([out[name] for name in s.template_names], -1)

    def _reach(self, within: Tensor, reach: Tensor) -> Tensor:
        """Mass on |offset| <= reach of each sample, summed over samples: [heads]."""
        at = reach.clamp(max=within.shape[-1] - 1)[:, None, None].expand(-1, within.shape[1], 1)
        return within.gather(2, at).sum((0, 2))

    def _rings(self, out: dict[str, Tensor], heads: int) -> None:
        geo, s = self.geometry, self.settings
        assert s.grid is not None
        cells = s.grid[0] * s.grid[1]
        patch = geo.rows & (geo.q_pos >= s.prefix) & (geo.q_pos < s.prefix + cells)
        out["ring_rows"] = ((self.n_keys > 0) & patch[:, None]).sum((0, 2)).double().expand(heads)
        keys = self.chance["rings"] * self.n_keys[..., None]
        out["ring_patches"] = keys.round().sum((0, 2)).amax(0)


def received(total: Tensor, seen: Tensor) -> Tensor:
    """Mass received over the rows that may see the key; NaN where none may. [..., keys]."""
    return torch.where(seen > 0, total / seen.clamp(min=1), torch.nan)


def kurtosis(profile: Tensor) -> Tensor:
    """Excess kurtosis of the keys' values, NaN left out: [...]; NaN with fewer than 4 keys or no spread."""
    there = profile.isfinite()
    n = there.sum(-1)
    mean = torch.where(there, profile, 0.0).sum(-1) / n.clamp(min=1)
    centred = torch.where(there, profile - mean[..., None], 0.0)
    m2, m4 = (centred**2).sum(-1) / n.clamp(min=1), (centred**4).sum(-1) / n.clamp(min=1)
    spread = (n >= 4) & (m2 > 1e-24)
    return torch.where(spread, m4 / m2.clamp(min=1e-24) ** 2 - 3, torch.nan)


__all__ = ["BINS", "CLASSES", "Figures", "kurtosis", "received"]
