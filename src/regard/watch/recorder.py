"""The recorder: `with watch(model) as w: model(...)`, then `w.atlas`.

Every attention call of the model is met at the seam and left as it was; beside it one exact pass over its weights
(`regard.kernels.tiles.tile_pass`, memory linear in length) gives all statistics asked for. Rows are absolute: a text
read in one forward and the same text read token by token through a cache give the same sums, except that relative
positions (`bin`, `q_block`, `k_block`, budgets of templates) are relative to the length seen at each forward.

Batch-padding never counts: rows of padding are left out, positions start at each sample's first real token.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import residual
from .atlas import FORMAT, Atlas, variable
from .call import Call
from .figures import CLASSES, Figures
from .fold import known_fold
from .geometry import BINS, Geometry, geometry_of
from .provenance import fingerprint, model_name, provenance
from .seam import Seam
from .sequence import LayerState
from .sequence import Sequence as Samples
from .settings import POSITIONLESS, Watch
from .variables import PER_SAMPLE, STATISTICS, STREAM_VARIABLES, VARIABLES

PER_SAMPLE_OF_STREAM = tuple(name for name in STREAM_VARIABLES if name != "bos_embed_norm")


class WatchError(RuntimeError):
    """Something that cannot be watched as asked; the message names the layer or argument and what to do."""


def watch(
    model: nn.Module,
    *,
    statistics: str | Sequence[str] | Watch = "default",
    tokenizer: Any = None,
    **choices: Any,
) -> Recorder:
    """Watch every attention head of `model` while it runs.

        with regard.watch(model, tokenizer=tokenizer) as w:
            model(**inputs)            # or model.generate(...), any number of times
        atlas = w.atlas

    Args:
        model: any `nn.Module` whose attention goes through `scaled_dot_product_attention`.
        statistics: "light" (sinks, entropy, distance, received mass), "default", "full", a sequence of names, or a
            whole `Watch`.
        tokenizer: gives the atlas token texts.
        choices: any other field of `Watch`: rows, groups, relations, templates, near, widths, period, grid, prefix,
            per_sample, stream, tokens, layers, folds.

    Returns:
        a `Recorder`, to be used in a `with` statement.
    """
    settings = replace(statistics, **choices) if isinstance(statistics, Watch) else Watch(statistics, **choices)
    return Recorder(model, settings, tokenizer)


class Recorder:
    """Watches a model inside a `with` statement and builds its atlas."""

    def __init__(self, model: nn.Module, settings: Watch, tokenizer: Any = None):
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self._decoder = _decoder_prefix(model)
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._about: dict[str, dict[str, Any]] = {}
        self._samples: list[dict[str, Any]] = []
        self._count = 0
        self._sequence: Samples | None = None
        self._notes: dict[str, Any] = {}
        self._forward = -1
        self._known: dict[tuple[Any, ...], tuple[Geometry, Figures, Any]] = {}
        self._in_forward: dict[str, Geometry] = {}
        self._embed: tuple[str, Tensor] | None = None
        self._written: Tensor | None = None
        self._seam: Seam | None = None
        self._hooks: list[RemovableHandle] = []
        self._atlas: Atlas | None = None

    # -- opening and closing ---------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._seam = Seam(self.model, self._on_call)
        self._seam.__enter__()
        if self.settings.stream:
            self._hooks += residual.attach(self.model, self._before_block, self._after_block)
        if self.settings.sampled("copy_hits"):
            self._hooks.append(self.model.register_forward_hook(self._after_forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        seam, self._seam = self._seam, None
        assert seam is not None
        seam.__exit__(kind, error, trace)
        if kind is None:
            self._close_sequence()

    def annotate(
        self,
        *,
        names: Sequence[str] | None = None,
        spans: Mapping[str, Any] | None = None,
        groups: Mapping[str, Any] | None = None,
        rows: Any = None,
    ) -> Recorder:
        """Say what the samples of the next forward are: call it before the forward.

        Args:
            names: one id a sample, for the atlas's `sample` labels.
            spans: (start, end) on the padded token axis, [batch, 2] each: "needle", and "answer" where the answer is
                in the input (teacher-forced); for `per_sample=("copy_hits",)`.
            groups: key masks for the groups of the settings that differ from sample to sample.
            rows: a mask [length] or [batch, length] of the rows to count.
        """
        notes: dict[str, Any] = {}
        if names is not None:
            notes["names"] = [str(n) for n in names]
        if spans is not None:
            notes["spans"] = {k: torch.as_tensor(v).reshape(-1, 2) for k, v in spans.items()}
        if groups is not None:
            unknown = set(groups) - set(self.settings.groups)
            if unknown:
                raise WatchError(
                    f"groups: {', '.join(sorted(unknown))} must also be named when the watch is made, as "
                    "groups={name: None} if they are given for every forward"
                )
            notes["groups"] = dict(groups)
        if rows is not None:
            notes["rows"] = rows
        self._notes = notes
        return self

    # -- the seam's calls ------------------------------------------------------------------------------------

    def _on_call(self, call: Call) -> None:
        label = call.layer or type(self.model).__name__
        if call.index:
            label = f"{label}#{call.index}"
        wanted = self.settings.layers
        if wanted is not None and not any(fnmatch.fnmatchcase(label, pattern) for pattern in wanted):
            return
        try:
            with torch.no_grad():
                self._record(self._unfolded(call, label), label)
        except ValueError as error:
            raise WatchError(f"layer {label!r}: {error}") from error

    def _record(self, call: Call, label: str) -> None:
        self._check_positions(call, label)
        if call.forward != self._forward:
            self._begin_forward(call, label)
        samples = self._sequence
        assert samples is not None
        own_batch = call.q.shape[0] == samples.batch
        state = samples.layers.get(label)
        if state is not None and call.positions.first == 0:
            state = None  # the layer reads a new text
        geo, figures = self._figures(call, label, state if own_batch else None)
        sums, raw = figures.take(call.q, call.k, mask=call.mask, is_causal=call.is_causal, scale=call.scale)
        if call.folded or not call.positions_known:
            for name in ("entropy_at", "rows_at"):
                sums.pop(name, None)
        self._add(label, sums, call.q.shape[1], call.kind, geo.causal)
        if not own_batch:
            if self.settings.per_sample:
                raise WatchError(
                    f"layer {label!r} has a batch of {call.q.shape[0]} where the samples are {samples.batch}, so "
                    "it has nothing per sample; name the layers to watch (layers=[...]) or leave per_sample out"
                )
            alone = Samples(call.q.shape[0], [], self.settings, {})
            state = LayerState(first=(geo.q_first, geo.k_first))
            alone.gather(state, geo, figures, raw)
            self._add(label, alone.sums(state), call.q.shape[1], call.kind, geo.causal)
            return
        if state is None:
            state = samples.layers[label] = LayerState(first=(geo.q_first, geo.k_first))
        state.next_pos = call.positions.first + call.q.shape[2]
        samples.gather(state, geo, figures, raw)
        self._in_forward[label] = geo
        if samples.token_layer is None and call.kind == "self" and not self._in_decoder(label):
            samples.token_layer = label
        if self.settings.sampled("copy_hits") and call.kind == "self" and "input" in samples.ids:
            if "needle" not in samples.spans:
                raise WatchError("per_sample: copy_hits needs w.annotate(spans={'needle': ...}) before each forward")
            samples.copy(state, raw["top"][1], call.q_pos, call.kv_pos, call.valid)

    def _unfolded(self, call: Call, label: str) -> Call:
        """The call over whole samples, where it is known what the model folds into its batch."""
        given = (f for name, f in self.settings.folds.items() if fnmatch.fnmatchcase(label, name))
        fold = next(given, None) or known_fold(call)
        return call if fold is None else fold.unfold(call)

    def _check_positions(self, call: Call, label: str) -> None:
        known = call.positions_known and not call.folded
        if known:
            return
        asked = [s for s in self.settings.names if s not in POSITIONLESS] + list(self.settings.per_sample)
        if asked:
            why = "folds windows or axes into the batch" if call.folded else "has keys whose positions are not known"
            raise WatchError(
                f"layer {label!r} {why}, so {', '.join(asked)} would not mean what they say; watch it with "
                f"statistics={POSITIONLESS!r}, or leave it out with layers=[...]"
            )

    def _begin_forward(self, call: Call, label: str) -> None:
        self._forward = call.forward
        self._known, self._in_forward = {}, {}
        samples = self._sequence
        first, batch = call.positions.first, call.q.shape[0]
        goes_on = samples is not None and samples.batch == batch and not self._notes
        if goes_on:
            assert samples is not None
            state = samples.layers.get(label)
            # Another start means another text, or a cache cut back; either way these are not the rows that follow.
            goes_on = state is None or 0 < first == state.next_pos
        if not goes_on:
            self._close_sequence()
            names = self._notes.get("names") or [str(self._count + b) for b in range(batch)]
            if len(names) != batch:
                raise WatchError(f"names: {len(names)} given for a batch of {batch}")
            samples = self._sequence = Samples(batch, names, self.settings, self._notes)
            self._notes = {}
            self._count += batch
        assert samples is not None
        self._read_tokens(samples, call.inputs, first, call.q.shape[2] if goes_on else None)

    def _read_tokens(self, samples: Samples, inputs: Mapping[str, Any], first: int, added: int | None) -> None:
        axes = {"input_ids": "input", "decoder_input_ids": "decoder"}
        for argument, axis in axes.items():
            ids = inputs.get(argument)
            if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or len(ids) != samples.batch:
                continue
            ids = ids.detach()
            old = samples.ids.get(axis)
            if old is not None and added is not None and ids.shape[1] < first + added:
                if added == 1 and axis == ("decoder" if self._decoder else "input"):
                    samples.settle(ids[:, 0])
                ids = torch.cat([old[:, :first].to(ids), ids], 1)
            samples.ids[axis] = ids

    # -- geometry --------------------------------------------------------------------------------------------

    def _figures(self, call: Call, label: str, state: LayerState | None) -> tuple[Geometry, Figures]:
        mask, where = call.mask, call.positions
        key = (
            call.kind,
            self._in_decoder(label),
            call.is_causal,
            (call.q.shape[0], call.q.shape[2], call.k.shape[2]),
            (where.first, where.q_start, where.total),
            None if state is None else id(state.first[1]),
            None if mask is None else (mask.data_ptr(), tuple(mask.shape), mask.stride(), mask.dtype),
            call.q.device,
        )
        if key in self._known:
            return self._known[key][:2]
        if self._positional(call) and int(where.kv[-1] - where.kv[0]) != len(where.kv) - 1:
            raise WatchError(
                f"layer {label!r} keeps keys with gaps between their positions (an evicting cache); watch it with "
                f"statistics={POSITIONLESS!r}"
            )
        geo = geometry_of(call, self._rows(call), None if state is None else state.first)
        figures = Figures(geo, self.settings, self._groups(call, geo, label), self._ids(call, label))
        self._known[key] = (geo, figures, mask)  # the mask is kept, so that its address stays its own
        return geo, figures

    def _positional(self, call: Call) -> bool:
        return call.kind == "self" and call.positions_known and not call.folded and call.k.shape[2] > 0

    def _rows(self, call: Call) -> Tensor:
        assert self._sequence is not None
        rows, shape = self._sequence.rows, (call.q.shape[0], call.q.shape[2])
        if isinstance(rows, str):
            keep = rows == "all" or rows == call.step
            return torch.full(shape, keep, dtype=torch.bool, device=call.q.device)
        return _at("rows", rows, call.q_pos, shape[0])

    def _groups(self, call: Call, geo: Geometry, label: str) -> dict[str, tuple[Tensor, Tensor]]:
        samples = self._sequence
        assert samples is not None
        out = {}
        for name, group in samples.groups.items():
            if call.kind == "self" and self._in_decoder(label):
                empty_rows, empty_keys = torch.zeros_like(geo.rows), torch.zeros_like(geo.keys)
                out[name] = (empty_rows, empty_keys)
                continue
            if not isinstance(group, Tensor):
                if group is None:
                    raise WatchError(
                        f"groups: {name!r} was announced without a mask; give it with w.annotate(groups=...)"
                    )
                ids = samples.ids.get("input")
                if ids is None:
                    raise WatchError(
                        f"groups: {name!r} is told by token ids, and this forward was given none; give a mask"
                    )
                if callable(group):
                    group = group(ids)
                else:
                    group = torch.isin(ids, torch.tensor(sorted(group), device=ids.device))
            keys = _at(f"groups[{name!r}]", group, call.kv_pos, geo.batch)
            rows = (
                _at(f"groups[{name!r}]", group, call.q_pos, geo.batch)
                if call.kind == "self"
                else torch.zeros_like(geo.rows)
            )
            out[name] = (rows, keys)
        return out

    def _ids(self, call: Call, label: str) -> tuple[Tensor, Tensor] | None:
        """Token ids of the call's rows and keys, None unless they are known for every position."""
        assert self._sequence is not None
        ids = self._sequence.ids.get("decoder" if self._in_decoder(label) else "input")
        if call.kind != "self" or ids is None or len(ids) != call.q.shape[0]:
            return None
        if ids.shape[1] != call.positions.total:
            return None
        ids = ids.to(call.q.device)
        return ids[:, call.q_pos], ids[:, call.kv_pos.clamp(max=ids.shape[1] - 1)]

    def _in_decoder(self, label: str) -> bool:
        return self._decoder is not None and label.startswith(self._decoder)

    # -- summing ---------------------------------------------------------------------------------------------

    def _add(self, label: str, sums: dict[str, Tensor], heads: int, kind: str, causal: bool) -> None:
        about = self._about.setdefault(label, {"heads": heads, "kind": kind, "causal": causal})
        if about["heads"] != heads or about["kind"] != kind:
            raise WatchError(
                f"layer {label!r} had {about['heads']} heads ({about['kind']}-attention) and now {heads} ({kind})"
            )
        about["causal"] = about["causal"] and causal
        kept = self._sums.setdefault(label, {})
        for name, values in sums.items():
            kept[name] = values.clone() if name not in kept else kept[name] + values
        self._atlas = None

    def _close_sequence(self) -> None:
        samples, self._sequence = self._sequence, None
        if samples is None:
            return
        with torch.no_grad():
            if self._written is not None and len(self._written) == samples.batch:
                samples.settle(self._written)
            self._written = None
            entry: dict[str, Any] = {"names": samples.names, "layers": {}}
            for label, state in samples.layers.items():
                about = self._about[label]
                self._add(label, samples.sums(state), about["heads"], about["kind"], about["causal"])
                values = samples.per_sample(state) if self.settings.per_sample or self.settings.stream else {}
                entry["layers"][label] = {k: v.float().cpu().numpy() for k, v in values.items()}
            self._describe_samples(samples, entry)
        self._samples.append(entry)

    def _describe_samples(self, samples: Samples, entry: dict[str, Any]) -> None:
        state = samples.layers.get(samples.token_layer or "") or next(iter(samples.layers.values()), None)
        if state is None or state.length is None:
            entry["n_tokens"] = [0] * samples.batch
            return
        entry["n_tokens"] = state.length.tolist()
        ids = samples.ids.get("input")
        if ids is not None and self.settings.tokens:
            firsts = state.first[1].tolist()
            pairs = zip(ids.tolist(), firsts, entry["n_tokens"], strict=True)
            entry["ids"] = [row[a : a + n] for row, a, n in pairs]
        judged = next((s for s in samples.layers.values() if s.steps is not None), None)
        if judged is not None and judged.steps is not None:
            entry["copy_steps"] = judged.steps.tolist()
            needle = samples.spans["needle"]
            entry["needle_tokens"] = (needle[:, 1] - needle[:, 0]).tolist()
        if samples.embed_norm is not None:
            entry["bos_embed_norm"] = samples.embed_norm.tolist()

    # -- hooks -----------------------------------------------------------------------------------------------

    def _before_block(self, block: str, hidden: Tensor) -> None:
        if self._embed is None or self._embed[0] == block:
            self._embed = (block, hidden.detach().float().norm(dim=-1))

    def _after_block(self, block: str, hidden: Tensor) -> None:
        samples = self._sequence
        label = next((name for name in self._in_forward if name.startswith(f"{block}.")), None)
        if samples is None or label is None:
            return
        state, geo = samples.layers[label], self._in_forward[label]
        if hidden.shape[:2] != geo.q_pos.shape:
            raise WatchError(
                f"stream: block {block!r} gives {list(hidden.shape)}; accepted is [batch, length, dim] with "
                f"batch and length {list(geo.q_pos.shape)}"
            )
        with torch.no_grad():
            at = (geo.q_pos == 0).long().argmax(1)
            if state.first_hidden is None:
                state.first_hidden = hidden.detach().float()[torch.arange(len(at), device=at.device), at]
            size = max(int(geo.q_pos.max()) + 1, 1)
            for name, values in residual.figures(hidden, state.first_hidden).items():
                state.stream[name] = residual.scatter(state.stream.get(name), values, geo.q_pos, geo.rows, size)
            if samples.embed_norm is None and self._embed is not None and self._embed[1].shape == geo.q_pos.shape:
                samples.embed_norm = self._embed[1].gather(1, at[:, None])[:, 0]

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 3 and self._sequence is not None:
            geo = next(iter(self._in_forward.values()), None)
            last = logits.shape[1] - 1
            at = torch.full((len(logits),), last, device=logits.device)
            if geo is not None and geo.rows.shape == logits.shape[:2]:
                index = torch.arange(last + 1, device=logits.device)
                at = torch.where(geo.rows, index, -1).amax(1).clamp(min=0)
            self._written = logits[torch.arange(len(logits), device=logits.device), at].argmax(-1)

    # -- the atlas -------------------------------------------------------------------------------------------

    @property
    def atlas(self) -> Atlas:
        """All that was watched so far; asked for inside the `with`, the running samples are closed first."""
        self._close_sequence()
        if self._atlas is None:
            self._atlas = self._build()
        return self._atlas

    def _build(self) -> Atlas:
        s = self.settings
        labels = list(self._sums)
        if not labels:
            raise WatchError("nothing was watched: run the model inside the `with` statement first")
        heads = max(about["heads"] for about in self._about.values())
        causal = all(a["causal"] for a in self._about.values() if a["kind"] == "self")
        offsets = np.arange(0 if causal else 1 - s.near, s.near)
        length = max((n for e in self._samples for n in e["n_tokens"]), default=0)
        longest = max(
            (v.shape[-1] for e in self._samples for d in e["layers"].values() for v in d.values() if v.ndim > 1),
            default=0,
        )
        position = np.arange(max(length, longest))
        coords: dict[str, Any] = {
            "layer": np.array(labels, dtype=object),
            "head": np.arange(heads),
            "heads": ("layer", np.array([self._about[x]["heads"] for x in labels])),
            "kind": ("layer", np.array([self._about[x]["kind"] for x in labels], dtype=object)),
            "causal": ("layer", np.array([self._about[x]["causal"] for x in labels])),
            "layer_index": ("layer", np.arange(len(labels))),
            "head2": np.arange(heads),
            "bin": np.arange(BINS),
            "key_bin": np.arange(BINS),
            "q_block": np.arange(BINS),
            "k_block": np.arange(BINS),
            "offset": offsets,
            "width": np.array(list(s.widths)),
            "q_group": np.array(s.q_groups, dtype=object),
            "k_group": np.array(s.k_groups, dtype=object),
            "relation": np.array(list(s.relations), dtype=object),
            "template": np.array(s.template_names, dtype=object),
            "offset_class": np.array(CLASSES),
            "ring": np.arange(max(s.grid) if s.grid else 0),
            "sample": np.array([n for e in self._samples for n in e["names"]], dtype=object),
            "position": position,
            "key": position,
        }
        data = {}
        for name in self._wanted():
            dims = VARIABLES[name].dims
            if dims[0] == "layer":
                shape = tuple(len(coords[d][1]) if isinstance(coords[d], tuple) else len(coords[d]) for d in dims)
                fill = self._fill_sums if VARIABLES[name].merge == "sum" else self._fill_samples
                data[name] = variable(name, fill(name, shape, labels))
        data |= self._sample_variables(len(position))
        used = {d for v in data.values() for d in v.dims}
        coords = {k: v for k, v in coords.items() if k in used or isinstance(v, tuple)}
        return Atlas(data, coords, self._attrs())

    def _wanted(self) -> list[str]:
        s = self.settings
        names = {"rows", *(v for stat in s.names for v in STATISTICS[stat])}
        names |= {v for option in s.per_sample for v in PER_SAMPLE[option]}
        names |= set(PER_SAMPLE_OF_STREAM) if s.stream else set()
        return [name for name in VARIABLES if name in names]

    def _fill_sums(self, name: str, shape: tuple[int, ...], labels: list[str]) -> np.ndarray:
        out = np.full(shape, np.nan)
        for i, label in enumerate(labels):
            found = self._sums[label].get(name)
            if found is None:
                continue
            values = found.cpu().numpy()
            if VARIABLES[name].dims[-1] == "offset":
                values = values[..., values.shape[-1] - shape[-1] :]
            out[i][tuple(slice(0, n) for n in values.shape)] = values
        return out

    def _fill_samples(self, name: str, shape: tuple[int, ...], labels: list[str]) -> np.ndarray:
        out = np.full(shape, np.nan, dtype=np.float32)
        axis = VARIABLES[name].dims.index("sample") - 1
        for i, label in enumerate(labels):
            at = 0
            for entry in self._samples:
                n = len(entry["names"])
                values = entry["layers"].get(label, {}).get(name)
                if values is not None:
                    place = [slice(0, k) for k in values.shape]
                    place[axis] = slice(at, at + n)
                    out[i][tuple(place)] = values
                at += n
        return out

    def _sample_variables(self, length: int) -> dict[str, xr.Variable]:
        out = {
            "n_tokens": variable(
                "n_tokens", np.array([n for e in self._samples for n in e["n_tokens"]], dtype=np.int64)
            )
        }
        for name, missing in (("copy_steps", 0), ("needle_tokens", 0), ("bos_embed_norm", np.nan)):
            if any(name in e for e in self._samples):
                values = [x for e in self._samples for x in e.get(name, [missing] * len(e["names"]))]
                out[name] = variable(name, np.array(values))
        if not self.settings.tokens:
            return out
        total = len(out["n_tokens"].values)
        ids, at = np.full((total, length), -1, dtype=np.int64), 0
        for entry in self._samples:
            for row in entry.get("ids", [[]] * len(entry["names"])):
                ids[at, : len(row)] = row
                at += 1
        out["token_ids"] = variable("token_ids", ids)
        if self.tokenizer is not None:
            out["tokens"] = variable("tokens", token_texts(self.tokenizer, ids))
        return out

    def _attrs(self) -> dict[str, Any]:
        facts = provenance(self.model)
        return {
            "format": FORMAT,
            "model": model_name(self.model),
            "model_class": facts["model_class"],
            "fingerprint": fingerprint(self.model),
            "statistics": self.settings.to_json(),
            "provenance": json.dumps([facts]),
        }


def token_texts(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """The text of each id as the tokenizer writes it alone, "" for -1; an undecodable piece keeps its raw token."""
    known: dict[int, str] = {-1: ""}
    for value in np.unique(ids).tolist():
        if value not in known:
            text = tokenizer.decode([value])
            raw = getattr(tokenizer, "convert_ids_to_tokens", None)
            known[value] = text if (text and "\ufffd" not in text) or raw is None else str(raw(value))
    flat = np.empty(ids.size, dtype=object)
    flat[:] = [known[v] for v in ids.ravel().tolist()]
    return flat.reshape(ids.shape)


def _at(argument: str, mask: Any, positions: Tensor, batch: int) -> Tensor:
    """A mask [length] or [batch, length] of the padded axis read at positions, False beyond its end."""
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or mask.ndim not in (1, 2) or (mask.ndim == 2 and mask.shape[0] not in (1, batch)):
        raise WatchError(
            f"{argument}: must be a bool mask [length] or [batch, length] with batch {batch}, got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    mask = mask.to(positions.device).reshape(-1, mask.shape[-1]).expand(batch, -1)
    inside = positions < mask.shape[1]
    return mask[:, positions.clamp(max=mask.shape[1] - 1)] & inside


def _decoder_prefix(model: nn.Module) -> str | None:
    """How layer names of the decoder begin, in a model that has an encoder beside it."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    get: Callable[[], nn.Module] | None = getattr(model, "get_decoder", None)
    decoder = get() if get is not None else None
    for name, module in model.named_modules():
        if module is decoder:
            return f"{name}."
    return None


__all__ = ["Recorder", "Watch", "WatchError", "watch"]
