"""Causal experiments over heads, parts and tokens: what changes in a metric when one of them is changed.

Everything is a scan of edits (`regard.scan`): several experiments share one forward pass, each on its own copy of the
inputs. Results are arrays with named dimensions, one number a sample; layers are block numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.edits import Edit
from regard.watch.effects import Metric, damage
from regard.watch.heads import mask_heads
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.scan import scan, score, stack
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["conditional_mean", "head_ablation", "patch_grid", "path_patch"]

Head = tuple[int, int]


def heads_of(parts: Anatomy) -> list[Head]:
    """Every (layer, head) of the blocks that make a self-attention call."""
    return [(layer, head) for layer, n in enumerate(parts.heads) for head in range(n or 0)]


def head_ablation(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    *,
    kind: str = "zero",
    heads: Iterable[Head] | None = None,
    values: Mapping[int | str, Tensor] | None = None,
    pos: Any = None,
    seed: int = 0,
    chunk: int = 8,
    rows: int | None = None,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> xr.DataArray:
    """`m_without_h - m` for every head on its own, [layer, head, sample]; NaN for heads that were not asked for.

    Args:
        model: the module to run, without gradients.
        inputs: as for `trace`.
        metric: logits -> one number a sample; see `regard.watch.effects`.
        kind: "zero", "uniform", "mean" or "resample": see `mask_heads`.
        heads: which; None: all.
        values, pos, seed: as in `mask_heads`.
        chunk: how many heads share a forward pass.
        rows: how many samples, as in `scan`.
        anatomy, valid: as in `intervene`.

    Returns:
        The changes, with the metric of the whole model as coordinate `plain` [sample] and the kind in `attrs`.
    """
    parts = anatomy_for(model, inputs, anatomy)
    wanted = heads_of(parts) if heads is None else list(heads)
    edits = [mask_heads([head], kind, values=values, pos=pos, seed=seed) for head in wanted]
    found = scan(model, inputs, None, edits, metric, chunk, rows=rows, anatomy=parts, valid=valid)
    out = _table(parts, wanted, found.values - found.clean, "head_ablation")
    out.attrs["kind"] = kind
    return out.assign_coords(plain=("sample", _numpy(found.clean)))


def path_patch(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    receivers: Sequence[Site] | Site,
    metric: Metric,
    *,
    pos: Any = -1,
    senders: Iterable[Head] | None = None,
    freeze_mlps: bool = False,
    chunk: int = 8,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> xr.DataArray:
    """The part of each head's effect that runs straight into the receivers: `damage`, [layer, head, sample].

    For every sender head: (1) in the clean run its z at `pos` is set to the corrupted run's, every other head's z to
    the clean one, and what the receivers then hold is noted; (2) in another clean run the receivers are set to that,
    and the metric read. The direct path thus goes through the residual stream and, unless `freeze_mlps`, the MLPs.
    (Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969.)

    Args:
        model: the module to run, without gradients.
        clean, corrupt: inputs as for `trace`, aligned token by token.
        receivers: sites of the stream or of heads (`q`, `k`, `v`, `z`), or `Site(None, "final")`. `k` and `v` of single
            query heads are set for these alone, also where heads share them.
        metric: logits -> one number a sample.
        pos: the sender's tokens, as in `Site`.
        senders: which heads; None: all up to the latest receiver's layer.
        freeze_mlps: set every MLP's output to the clean one too, so that only the stream itself carries.
        chunk, anatomy, valid: as in `scan`.

    Returns:
        NaN for heads that are no senders, and for samples without a clean-corrupt difference (with a warning).

    Raises:
        ValueError: no receiver, or none that a sender could reach.
    """
    wanted = [receivers] if isinstance(receivers, Site) else list(receivers)
    if not wanted:
        raise ValueError("receivers must name at least one Site")
    parts = anatomy_for(model, clean, anatomy)
    reach = max(stage_of(site, parts) for site in wanted)
    possible = [head for head in heads_of(parts) if head[0] < reach]
    chosen = possible if senders is None else list(senders)
    beyond = [head for head in chosen if head not in possible]
    if beyond or not chosen:
        raise ValueError(f"senders: no path leads from {beyond or 'any head'} to {', '.join(map(str, wanted))}")

    held = frozen_heads(parts, wanted)
    held += [Site(i, "mlp_out") for i in range(len(parts))] if freeze_mlps else []
    sent = {head: Site(head[0], "z", head=head[1], pos=pos) for head in chosen}
    how: dict[str, Any] = {"anatomy": parts, "valid": valid}
    before = trace(model, clean, held, **how)
    other = trace(model, corrupt, list(sent.values()), **how)
    with torch.no_grad():
        whole, harmed = (score(model, x, metric, anatomy=parts, valid=valid) for x in (clean, corrupt))
        batch = len(whole)
        values = []
        for begin in range(0, len(chosen), chunk):
            some = chosen[begin : begin + chunk]
            copies = len(some)
            inputs = stack(clean, copies, batch)
            rows = None if valid is None else stack(valid, copies, batch)
            actions: list[tuple[Edit, slice | None]] = [
                (Edit(site, "set", value=x.repeat(copies, *[1] * (x.ndim - 1))), None) for site, x in before.items()
            ]
            actions += [
                (Edit(sent[head], "set", value=other[sent[head]]), slice(i * batch, (i + 1) * batch))
                for i, head in enumerate(some)
            ]
            session = Session(model, actions, None, wanted, parts=parts, inputs=clean, valid=rows)
            with session:
                run(model, inputs)
            noted = {site: session.readings[site].value for site in wanted}
            edits = [(set_receiver(site, value, parts), None) for site, value in noted.items()]
            with Session(model, edits, parts=parts, inputs=clean, valid=rows):
                logits = find_logits(run(model, inputs))[0]
            values += [metric(part) for part in logits.split(batch)]
    effect = damage(torch.stack(values), whole, harmed)
    return _table(parts, chosen, effect, "path_patch")


def patch_grid(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    parts: Sequence[str],
    classes: Mapping[str, Any],
    metric: Metric,
    *,
    layers: Sequence[int] | None = None,
    direction: str = "denoise",
    chunk: int = 8,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> xr.DataArray:
    """One part of one layer, on one class of tokens, taken from the other run: [part, layer, class, sample].

    Args:
        model: the module to run, without gradients.
        clean, corrupt: inputs as for `trace`, aligned token by token.
        parts: names of `Site` parts of blocks, such as "attn_out", "mlp_out", "resid_post".
        classes: {name: positions as in `Site.pos`}.
        metric: logits -> one number a sample.
        layers: which blocks; None: all.
        direction: "denoise" gives `recovery`, "noise" gives `damage`.
        chunk, anatomy, valid: as in `scan`.
    """
    found = anatomy_for(model, clean, anatomy)
    rows = list(range(len(found))) if layers is None else [found.block(layer) for layer in layers]
    sites = [Site(layer, part, pos=pos) for part in parts for layer in rows for pos in classes.values()]
    done = scan(model, clean, corrupt, sites, metric, chunk, direction=direction, anatomy=found, valid=valid)
    effect = done.recovery() if direction == "denoise" else done.damage()
    values = _numpy(effect).reshape(len(parts), len(rows), len(classes), -1)
    coords = {"part": list(parts), "layer": rows, "class": list(classes)}
    return xr.DataArray(values, dims=("part", "layer", "class", "sample"), coords=coords, name="patch_grid")


Sampler = Callable[[int, int, int, torch.Generator], Tensor]


def conditional_mean(
    model: nn.Module,
    ids: Int[Tensor, "batch length"],
    sampler: Sampler,
    site: Site,
    draws: int,
    *,
    seed: int = 0,
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch length dim"]:
    """What a site holds on average over inputs that share one token: `E[h_t(x') | x'_t = x_t]` at every position t.

    Setting the site to it keeps what position and token say and takes away what was read from other tokens.

    Args:
        model: takes `input_ids`.
        ids: the inputs whose tokens are kept.
        sampler: (position, token, draws, generator) -> inputs [draws, length] that hold the token there.
        site: a site of the stream, without `pos`.
        draws: inputs drawn for each (position, token); equal pairs share them.
        seed: of the draws; each pair has its own generator, so that the batch does not matter.

    Raises:
        ValueError: a site of the wrong kind, or a sampler that returned another shape or token.
    """
    if site.in_attention or site.pos is not None:
        raise ValueError(f"site must be one of the stream, for all tokens; got {site}")
    parts = anatomy_for(model, {"input_ids": ids}, anatomy)
    length = ids.shape[1]
    means: dict[tuple[int, int], Tensor] = {}
    for at in range(length):
        for token in ids[:, at].unique().tolist():
            generator = torch.Generator().manual_seed(hash((seed, at, token)) % (1 << 63))
            drawn = sampler(at, token, draws, generator).to(ids.device)
            if drawn.shape != (draws, length) or not bool((drawn[:, at] == token).all()):
                raise ValueError(
                    f"sampler gave shape {tuple(drawn.shape)} for position {at}, token {token}; "
                    f"accepted is {(draws, length)} with that token there"
                )
            here = Site(site.layer, site.part, pos=at)
            means[at, token] = trace(model, {"input_ids": drawn}, here, anatomy=parts)[here].double().mean(0)
    rows = [torch.stack([means[at, token] for at, token in enumerate(row)]) for row in ids.tolist()]
    example = trace(model, {"input_ids": ids[:1]}, site, anatomy=parts)[site]
    return torch.stack(rows).to(example)


def frozen_heads(parts: Anatomy, receivers: Sequence[Site]) -> list[Site]:
    """The z of every head but those of receivers, which must take up what they read."""
    sites = []
    for layer, n in enumerate(parts.heads):
        open_: set[int] = set()
        for site in receivers:
            if site.part == "z" and site.layer is not None and parts.block(site.layer) == layer:
                heads = range(n or 0) if site.head is None else [site.head] if isinstance(site.head, int) else site.head
                open_.update(heads)
        kept = tuple(h for h in range(n or 0) if h not in open_)
        if kept:
            sites.append(Site(layer, "z", head=kept if open_ else None))
    return sites


def stage_of(site: Site, parts: Anatomy) -> int:
    """Heads of layers below this number come before the site."""
    if site.layer is None:
        return 0 if site.part == "embed" else len(parts)
    at = parts.block(site.layer)
    return at + 1 if site.part in ("attn_out", "resid_mid", "mlp_out", "resid_post") else at


def set_receiver(site: Site, value: Tensor, parts: Anatomy) -> Edit:
    """The edit that gives a receiver what was noted, single query heads of shared keys alone."""
    shared = False
    if site.part in ("k", "v") and site.head is not None and site.layer is not None:
        at = parts.block(site.layer)
        shared = parts.heads[at] != parts.kv_heads[at]
    if shared and not isinstance(site.head, int):
        raise ValueError(f"{site}: name one query head a Site where heads share keys and values")
    return Edit(site, "set", value=value, expand=shared)


def _table(parts: Anatomy, heads: Sequence[Head], values: Float[Tensor, "heads batch"], name: str) -> xr.DataArray:
    most = max((n or 0 for n in parts.heads), default=0)
    table = np.full((len(parts), most, values.shape[1]), np.nan)
    for (layer, head), row in zip(heads, _numpy(values), strict=True):
        table[layer, head] = row
    coords = {"layer": range(len(parts)), "head": range(most)}
    return xr.DataArray(table, dims=("layer", "head", "sample"), coords=coords, name=name)


def _numpy(x: Tensor) -> NDArray[np.float64]:
    return x.detach().double().cpu().numpy()
