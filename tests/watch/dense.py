"""Runs a model twice: once watched, once with its queries and keys taken at the seam for the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from regard.watch.atlas import Atlas
from regard.watch.recorder import watch
from regard.watch.seam import Seam
from regard.watch.settings import WIDTHS, Watch
from tests.oracles.statistics import Dense, softmax


@dataclass
class Taken:
    """One attention call of the model, in float64."""

    layer: str
    forward: int
    weights: np.ndarray  # [batch, heads, q_len, kv_len]
    allowed: np.ndarray  # [batch, q_len, kv_len]
    kind: str
    causal: bool
    start: int  # padded-axis position of the first query
    step: str


def take(model: torch.nn.Module, run: Callable[[], object]) -> list[Taken]:
    calls: list[Taken] = []

    def handler(call) -> None:
        q, k = call.q.double(), call.k.double().repeat_interleave(call.groups, 1)
        scores = q @ k.transpose(-1, -2) * call.scale
        ok = torch.ones(scores.shape, dtype=torch.bool)
        if call.mask is not None:
            if call.mask.dtype == torch.bool:
                ok &= call.mask
            else:
                ok &= call.mask > -1e30
                scores = scores + call.mask.double().clamp(min=-1e30)
        if call.is_causal:
            ok &= torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = softmax(scores.detach().numpy(), ok.numpy())
        name = call.layer + (f"#{call.index}" if call.index else "")
        first = int(call.q_pos[0])
        calls.append(Taken(name, call.forward, weights, ok[:, 0].numpy(), call.kind, call.causal, first, call.step))

    with torch.no_grad(), Seam(model, handler):
        run()
    return calls


def oracle(
    calls: list[Taken], pads, *, ids=None, cross_pads=None, groups=None, keep=None, templates, lag=None, decoder=""
) -> dict[str, Dense]:
    """The figures of every layer. `pads[b]` = (left, length) of each sample's real tokens on the padded axis.

    ids: token ids [batch, length] of all positions in the end; groups: name -> bool mask [batch, length];
    keep(taken, b, i) -> whether the row at padded position i counts.
    """
    layers: dict[str, Dense] = {}
    for name in dict.fromkeys(c.layer for c in calls):
        dense = layers[name] = Dense(widths=WIDTHS, templates=templates, lag=lag)
        own = [c for c in calls if c.layer == name]
        runs: list[list[Taken]] = []
        for c in own:  # a call that starts at 0 begins a new batch of samples
            if c.start == 0:
                runs.append([])
            runs[-1].append(c)
        for number, run in enumerate(runs):
            batch = run[0].weights.shape[0]
            for b in range(batch):
                for c in run:
                    _add(
                        dense,
                        c,
                        b,
                        pads[number][b],
                        None if cross_pads is None else cross_pads[number][b],
                        ids,
                        groups,
                        keep,
                        number,
                        decoder,
                    )
                if dense.sample is not None:
                    dense.end()
    return layers


def _add(dense, c, b, pad, key_pad, ids, groups, keep, number, decoder):
    left, right = pad
    rows = [r for r in range(c.weights.shape[2]) if left <= c.start + r and (right is None or c.start + r < right)]
    if keep is not None:
        rows = [r for r in rows if keep(c, b, c.start + r)]
    cross = c.kind == "cross"
    k_left, k_right = key_pad if cross else pad
    stop = c.weights.shape[3] if k_right is None else min(k_right, c.weights.shape[3])
    if not cross:
        stop = min(stop, c.start + c.weights.shape[2])
    keys = slice(k_left, stop)
    p, ok = c.weights[b][:, rows, keys], c.allowed[b][rows, keys]
    own_ids = None if ids is None or cross else ids[number][b][keys].tolist()
    in_decoder = bool(decoder) and c.layer.startswith(decoder) and not cross
    own = {}
    for name, mask in (groups or {}).items():
        own[name] = np.zeros(stop - k_left, bool) if in_decoder else np.asarray(mask[b])[keys]
    q_length = (c.start + c.weights.shape[2] if right is None else right) - left
    dense.add(
        p,
        ok,
        [c.start + r - left for r in rows],
        own_ids,
        c.causal,
        own,
        not cross,
        q_length if cross else None,
    )


def compare(atlas: Atlas, layers: dict[str, Dense], *, rtol: float = 1e-5, skip: tuple[str, ...] = ()) -> int:
    """Every sum variable of the atlas against the oracle; returns how many arrays were compared."""
    assert list(atlas["layer"].values) == list(layers)
    done = 0
    for name, array in atlas.data_vars.items():
        if array.attrs["merge"] != "sum" or name in skip:
            continue
        for layer, dense in layers.items():
            got = array.sel(layer=layer)
            heads = int(atlas["heads"].sel(layer=layer))
            if "head" in array.dims:
                assert np.isnan(got.isel(head=slice(heads, None)).values).all()
                got = got.isel(head=slice(0, heads))
            if "head2" in array.dims:
                got = got.isel(head2=slice(0, heads))
            _close(str(name), layer, got, dense, atlas, rtol)
            done += 1
    return done


def _close(name: str, layer: str, got: xr.DataArray, dense: Dense, atlas: Atlas, rtol: float) -> None:
    if name not in dense.out:
        assert np.isnan(got.values).all(), f"{name} of {layer} is not something this layer has"
        return
    want = dense.out[name]
    if name == "top1_offset":
        table = np.stack([want[c] if c in want else np.zeros(got.shape[0]) for c in atlas["offset_class"].values], -1)
        want = table
    want = np.asarray(want, dtype=float)
    values = got.values
    if name in ("near", "near_rows") and want.shape[-1] != values.shape[-1]:  # a causal layer beside one that is not
        assert (values[..., : values.shape[-1] - want.shape[-1]] == 0).all()
        values = values[..., values.shape[-1] - want.shape[-1] :]
    assert values.shape == want.shape, f"{name} of {layer}: {values.shape} and {want.shape}"
    # Relative to each figure, or to 1% of the layer's largest: a bin with next to nothing in it has no digits.
    floor = 0.01 * np.abs(want).max() if want.size else 1.0
    bound = rtol * np.maximum(np.abs(want), floor) + 1e-12
    rows = dense.out["rows"]
    if name in (
        "entropy",
        "entropy_norm",
        "entropy_at",
    ):  # a peaked row's entropy is a small difference: 1e-6 nat a row
        bound = bound + 1e-6 * (dense.out["rows_at"] if name == "entropy_at" else rows)
    if name == "received_kurtosis":  # of a flat profile it is a ratio of differences: digits go with mean / spread
        bound = rtol * np.abs(want + 3 * dense.out["received_samples"]) * np.maximum(1, dense.out["flatness"] / 3)
    worst = np.abs(values - want)
    assert (worst <= bound).all(), f"{name} of {layer}: off by {worst.max():.2e} of {np.abs(want).max():.3g}"


def watched(model, run, **choices) -> Atlas:
    settings = Watch("full", **choices)
    with torch.no_grad(), watch(model, statistics=settings) as w:
        run()
    return w.atlas
