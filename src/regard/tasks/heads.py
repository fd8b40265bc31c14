"""Which heads a task needs: the loss of its answers with every head taken out in turn, and what two tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from regard.steer.causal import head_ablation
from regard.tasks.batch import Batch
from regard.tasks.needle import Needle
from regard.tasks.probes import repeated_for
from regard.tasks.retoken import batches
from regard.tasks.testbeds import Loaded
from regard.watch.anatomy import anatomy_for
from regard.watch.effects import loss
from regard.watch.heads import mask_heads
from regard.watch.scan import scan

__all__ = ["TASKS", "overlap", "remove_heads", "scan_heads"]

Draw = Callable[[Loaded, int, int, torch.Generator], list[Batch]]


def _needles(loaded: Loaded, n: int, length: int, generator: torch.Generator) -> list[Batch]:
    return batches(loaded, Needle(length, split="test"), n, generator, chunk=n)


def _repetitions(loaded: Loaded, n: int, length: int, generator: torch.Generator) -> list[Batch]:
    return [repeated_for(loaded, length).batch(n, generator)]


TASKS: dict[str, Draw] = {"needle": _needles, "repeated": _repetitions}
"""Tasks by name, as (model, prompts, length, generator) -> batches."""


def scan_heads(
    loaded: Loaded,
    task: str,
    *,
    kind: str = "zero",
    prompts: int = 64,
    length: int = 256,
    seed: int = 0,
    chunk: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """What the answers of a task cost more without each head: `loss_without - loss`, [layer, head, sample], in nats.

    Args:
        loaded: a causal language model with its tokenizer.
        task: "needle" (a code to be found among filler) or "repeated" (a random segment that repeats).
        kind: how a head is taken out, see `mask_heads`: "zero", "uniform", "mean" or "resample".
        prompts: how many; length: bytes of a needle's text, tokens of a repetition.
        seed: of prompts and of "resample".
        chunk: heads that share a forward pass.
        progress: called with (batches done, batches).

    Returns:
        The increases, with the whole model's loss as coordinate `plain` [sample]; `attrs` say task, kind and length.

    Raises:
        ValueError: an unknown task or kind; "mean" or "resample" for prompts that do not share one length.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    drawn = TASKS[task](loaded, prompts, length, torch.Generator().manual_seed(seed))
    if kind in ("mean", "resample") and len(drawn) > 1:
        raise ValueError(
            f"kind={kind!r} takes the place of a head's output from other prompts, and these {len(drawn)} batches have "
            "lengths of their own in this model's tokens; use kind='zero' or 'uniform', or task='repeated'"
        )
    device = next(loaded.model.parameters()).device
    parts = anatomy_for(loaded.model, None)
    found = []
    for done, batch in enumerate(drawn):
        inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
        found.append(
            head_ablation(loaded.model, inputs, loss(batch.labels), kind=kind, seed=seed, chunk=chunk, anatomy=parts)
        )
        if progress is not None:
            progress(done + 1, len(drawn))
    whole = xr.concat(found, "sample")
    whole.attrs = {"task": task, "kind": kind, "length": length, "seed": seed, "units": "nat"}
    return whole.rename("loss increase")


def remove_heads(
    loaded: Loaded,
    task: str,
    sets: Sequence[Sequence[tuple[int, int]]],
    *,
    kind: str = "zero",
    prompts: int = 64,
    length: int = 256,
    seed: int = 0,
    chunk: int = 1,
) -> xr.DataArray:
    """What the answers of a task cost more without the heads of a set, all at once: [set, sample], in nats.

    Args:
        loaded, task, kind, prompts, length, seed: as in `scan_heads`.
        sets: (layer, head) pairs, for instance the heads of a role and as many random ones.
        chunk: sets that share a forward pass.

    Returns:
        The increases, with the whole model's loss as coordinate `plain` [sample].

    Raises:
        ValueError: no set, an empty one, or an unknown task or kind.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not sets or not all(sets):
        raise ValueError(f"sets must hold at least one head each, got {sets!r}")
    drawn = TASKS[task](loaded, prompts, length, torch.Generator().manual_seed(seed))
    device = next(loaded.model.parameters()).device
    parts = anatomy_for(loaded.model, None)
    edits = [mask_heads(heads, kind, seed=seed) for heads in sets]
    found, plain = [], []
    for batch in drawn:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(device), "use_cache": False}
        done = scan(loaded.model, inputs, None, edits, loss(batch.labels), chunk, anatomy=parts)
        found.append((done.values - done.clean).double().cpu())
        plain.append(done.clean.double().cpu())
    values = xr.DataArray(torch.cat(found, 1).numpy(), dims=("set", "sample"), name="loss increase")
    values.attrs = {"task": task, "kind": kind, "length": length, "seed": seed, "units": "nat"}
    return values.assign_coords(plain=("sample", torch.cat(plain).numpy()))


def overlap(
    a: xr.DataArray, b: xr.DataArray, *, share: float = 0.2, draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """How far two tasks need the same heads: `|A and B| / min(|A|, |B|)` of the `share` most needed heads of each.

    Args:
        a, b: what `scan_heads` gave for the same model, of one kind.
        share: of all heads that make up a task's circuit.
        draws: random circuits of the same size, for the chance level.
        seed: of the draws.

    Returns:
        `overlap`; `chance`, its mean over random circuits, and `chance_99`, their 99th percentile; `heads` of the two
        circuits and the `shared` ones, as (layer, head), most needed first.
    """
    if a.sizes["layer"] != b.sizes["layer"] or a.sizes["head"] != b.sizes["head"]:
        raise ValueError(f"a and b must be scans of the same model, got heads {dict(a.sizes)} and {dict(b.sizes)}")
    if a.attrs.get("kind") != b.attrs.get("kind"):
        raise ValueError(f"a and b took heads out in different ways: {a.attrs.get('kind')}, {b.attrs.get('kind')}")
    circuits = [_circuit(x, share) for x in (a, b)]
    total = int(np.isfinite(a.mean("sample", skipna=False)).sum())
    sizes = [len(c) for c in circuits]
    shared = [head for head in circuits[0] if head in circuits[1]]
    generator = np.random.default_rng(seed)
    # The overlap of two random sets is hypergeometric.
    chance = generator.hypergeometric(sizes[0], total - sizes[0], sizes[1], size=draws) / min(sizes)
    return {
        "overlap": len(shared) / min(sizes),
        "chance": float(chance.mean()),
        "chance_99": float(np.quantile(chance, 0.99)),
        "heads": circuits,
        "shared": shared,
    }


def _circuit(scan: xr.DataArray, share: float) -> list[tuple[int, int]]:
    effect = scan.mean("sample").values
    order = np.argsort(-np.where(np.isnan(effect), -np.inf, effect), axis=None, kind="stable")
    size = max(1, round(share * int(np.isfinite(effect).sum())))
    return [tuple(map(int, divmod(n, effect.shape[1]))) for n in order[:size].tolist()]  # type: ignore[misc]
