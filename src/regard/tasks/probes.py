"""Two short tests that show what a plain text may not: which heads copy a needle, which ones continue a repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr

from regard.measures.roles import RoleTable, name_heads
from regard.measures.scores import role_scores
from regard.tasks.batch import Batch
from regard.tasks.bytetext import BOS
from regard.tasks.needle import Needle
from regard.tasks.repeated import RepeatedTokens
from regard.tasks.retoken import batches, is_bytes
from regard.tasks.testbeds import Loaded
from regard.watch.atlas import Atlas
from regard.watch.recorder import watch
from regard.watch.settings import Watch

RETRIEVAL = ("retrieval",)
INDUCTION = ("induction", "induction/lift")


def watch_needles(model: Any, needles: Sequence[Batch]) -> Atlas:
    """Watch a causal model answer needles, teacher-forced: an atlas for the measure `retrieval`.

    The needle is the code that the answer repeats, so that a head which copies all of it has rate 1.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), watch(model, statistics=Watch((), per_sample=("copy_hits",), tokens=False)) as watched:
        for batch in needles:
            watched.annotate(spans={"needle": batch.spans["value"], "answer": batch.spans["answer"]})
            model(input_ids=batch.input_ids.to(device), use_cache=False)
    return watched.atlas


def watch_repetition(loaded: Loaded, n: int, length: int, generator: torch.Generator) -> Atlas:
    """Watch a causal model read n random segments that repeat: an atlas for the measure `induction`."""
    if is_bytes(loaded.tokenizer):
        bos, tokens = BOS, list(range(32, 127))  # printable
    else:
        special = set(loaded.tokenizer.all_special_ids)
        first = loaded.tokenizer.bos_token_id
        tokens = [i for i in range(len(loaded.tokenizer)) if i not in special]
        bos = tokens.pop() if first is None else first
    task = RepeatedTokens(length, tokens, bos, (length // 8, length // 2 - 1))
    with torch.no_grad(), watch(loaded.model, statistics=("relation",), tokens=False) as watched:
        for batch in task.batch(n, generator):
            loaded.model(input_ids=batch.input_ids.to(loaded.model.device), use_cache=False)
    return watched.atlas


def probe(loaded: Loaded, *, n: int = 8, length: int = 256, seed: int = 0) -> xr.DataArray:
    """The retrieval and induction scores of a causal language model, [layer, head, role].

    Args:
        loaded: model and tokenizer.
        n: needles, and repeated segments.
        length: bytes of a needle's sequence; tokens of a repeated one.
        seed: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    needles = batches(loaded, Needle(length, split="test"), n, generator)
    copying = role_scores(watch_needles(loaded.model, needles)).sel(role=list(RETRIEVAL))
    repeating = role_scores(watch_repetition(loaded, n, length, generator)).sel(role=list(INDUCTION))
    return xr.concat([copying, repeating], dim="role", combine_attrs="drop")


def probed_roles(atlas: Atlas, loaded: Loaded, **how: int) -> RoleTable:
    """Roles of an atlas, with the retrieval and induction scores of `probe` in place of the text's own."""
    scores = role_scores(atlas)
    found = probe(loaded, **how)
    for role in found["role"].values:
        scores.loc[{"role": role}] = found.sel(role=role, drop=True).reindex_like(scores, fill_value=float("nan"))
    missing = {k: v for k, v in scores.attrs["missing"].items() if k not in found["role"].values}
    return name_heads(scores.assign_attrs(missing=missing))
