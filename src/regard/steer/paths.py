"""Direct paths from every head into many receivers, each receiver by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor, nn

from regard.steer.causal import frozen_heads, heads_of, set_receiver, stage_of
from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.edits import Edit
from regard.watch.effects import Metric, damage
from regard.watch.probe import run
from regard.watch.scan import scan, score, stack
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["head_paths"]


def head_paths(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    receivers: Sequence[Site],
    metric: Metric,
    *,
    pos: Any = -1,
    chunk: int = 8,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
) -> xr.DataArray:
    """What `path_patch` gives for each receiver alone, [receiver, layer, head, sample].

    While every other head stays as in the clean run, what a sender changes at one receiver does not reach another. So
    one run a sender notes all receivers, and a second one is needed for each pair alone.

    Args:
        model, clean, corrupt, metric, pos, chunk, anatomy, valid: as in `path_patch`.
        receivers: sites of heads, of part `q`, `k` or `v`.

    Returns:
        NaN where no path leads from the head to the receiver, and where `path_patch` gives it.

    Raises:
        ValueError: a receiver of another part, or none at all.
    """
    wrong = [str(site) for site in receivers if site.part not in ("q", "k", "v")]
    if wrong or not receivers:
        raise ValueError(f"receivers must be sites of part 'q', 'k' or 'v', got {', '.join(wrong) or 'none'}")
    parts = anatomy_for(model, clean, anatomy)
    reach = [stage_of(site, parts) for site in receivers]
    senders = [head for head in heads_of(parts) if head[0] < max(reach)]
    sent = {head: Site(head[0], "z", head=head[1], pos=pos) for head in senders}
    how: dict[str, Any] = {"anatomy": parts, "valid": valid}
    held = trace(model, clean, frozen_heads(parts, receivers), **how)
    other = trace(model, corrupt, list(sent.values()), **how)
    pairs: list[tuple[int, int]] = []
    edits: list[Edit] = []
    with torch.no_grad():
        harmed = score(model, corrupt, metric, **how)
        batch = len(harmed)
        for begin in range(0, len(senders), chunk):
            some = senders[begin : begin + chunk]
            actions: list[tuple[Edit, slice | None]] = [
                (Edit(site, "set", value=x.repeat(len(some), *[1] * (x.ndim - 1))), None) for site, x in held.items()
            ]
            actions += [
                (Edit(sent[head], "set", value=other[sent[head]]), slice(i * batch, (i + 1) * batch))
                for i, head in enumerate(some)
            ]
            rows = None if valid is None else stack(valid, len(some), batch)
            session = Session(model, actions, None, list(receivers), parts=parts, inputs=clean, valid=rows)
            with session:
                run(model, stack(clean, len(some), batch))
            for n, site in enumerate(receivers):
                for i, noted in enumerate(session.readings[site].value.split(batch)):
                    if some[i][0] < reach[n]:
                        pairs.append((n, begin + i))
                        edits.append(set_receiver(site, noted.clone(), parts))
    found = scan(model, clean, None, edits, metric, chunk, **how)
    effect = damage(found.values, found.clean, harmed).double().cpu().numpy()
    heads = max((n or 0 for n in parts.heads), default=0)
    table = np.full((len(receivers), len(parts), heads, batch), np.nan)
    for (n, sender), row in zip(pairs, effect, strict=True):
        table[n, senders[sender][0], senders[sender][1]] = row
    coords = {"receiver": [str(site) for site in receivers], "layer": range(len(parts)), "head": range(heads)}
    return xr.DataArray(table, dims=("receiver", "layer", "head", "sample"), coords=coords, name="head_paths")
