"""Masking heads: four different things under one name, so the kind must be said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from regard.watch.edits import Edit
from regard.watch.site import Site

KINDS = ("zero", "uniform", "mean", "resample")


def mask_heads(
    heads: Iterable[tuple[int | str, int]],
    kind: str,
    *,
    values: Mapping[int | str, Tensor] | None = None,
    pos: Any = None,
    steps: str = "all",
    seed: int = 0,
) -> list[Edit]:
    """Edits that take heads out of a model.

    Args:
        heads: (layer, head) pairs.
        kind: `zero`: the head's output z is 0 (the output projection's bias stays). `uniform`: its weights are 1/n_i
            on every key it may see, so z is the mean value; what the retrieval-head papers call masking. `mean`: z is
            the mean over other samples. `resample`: z is that of another sample.
        values: for `mean` and `resample`: {layer: z of other inputs, [samples, heads, length, head_dim]}, as
            `trace(model, inputs, Site(layer, "z", pos=pos))` gives it. None: this batch.
        pos, steps: as in `Site`.
        seed: of `resample`.

    Returns:
        One edit a layer, in the order of layers.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: masking a head means one of {', '.join(KINDS)}")
    if values is not None and kind not in ("mean", "resample"):
        raise ValueError(f"kind={kind!r} takes no values=")
    by_layer: dict[int | str, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, [])
        if head not in by_layer[layer]:
            by_layer[layer].append(head)
    edits = []
    for layer in sorted(by_layer, key=lambda x: (isinstance(x, str), x)):
        chosen = tuple(sorted(by_layer[layer]))
        if values is not None and layer not in values:
            raise ValueError(f"values= has no layer {layer!r}")
        value = None if values is None else values[layer][:, list(chosen)]
        part = "weights" if kind == "uniform" else "z"
        edits.append(Edit(Site(layer, part, head=chosen, pos=pos, steps=steps), kind, value=value, seed=seed))
    return edits
