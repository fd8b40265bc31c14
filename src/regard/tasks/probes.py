"""Two short tests that show what a plain text may not: which heads copy a needle, which ones continue a repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regard.tasks.batch import Batch
from regard.tasks.bytetext import BOS
from regard.tasks.needle import Needle
from regard.tasks.repeated import RepeatedTokens
from regard.tasks.retoken import batches, is_bytes
from regard.tasks.testbeds import Loaded
from regard.watch.atlas import Atlas
from regard.watch.recorder import watch
from regard.watch.settings import Watch


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
    task = repeated_for(loaded, length)
    with torch.no_grad(), watch(loaded.model, statistics=("relation",), tokens=False) as watched:
        for batch in task.batch(n, generator):
            loaded.model(input_ids=batch.input_ids.to(loaded.model.device), use_cache=False)
    return watched.atlas


def repeated_for(loaded: Loaded, length: int) -> RepeatedTokens:
    """Segments of random tokens of this model that repeat, `length` tokens with the first one."""
    if is_bytes(loaded.tokenizer):
        bos, tokens = BOS, list(range(32, 127))  # printable
    else:
        special = set(loaded.tokenizer.all_special_ids)
        first = loaded.tokenizer.bos_token_id
        tokens = [i for i in range(len(loaded.tokenizer)) if i not in special]
        bos = tokens.pop() if first is None else first
    return RepeatedTokens(length, tokens, bos, (length // 8, length // 2 - 1))


def probe(loaded: Loaded, *, n: int = 8, length: int = 256, seed: int = 0) -> dict[str, Atlas]:
    """What the retrieval and induction roles of a causal language model are judged by: {role: atlas}.

    `regard.report.build_report(..., probes=probe(loaded))` and `regard roles --probe` take these scores in place of
    the text's own.

    Args:
        loaded: model and tokenizer.
        n: needles, and repeated segments.
        length: bytes of a needle's sequence; tokens of a repeated one.
        seed: of both.
    """
    generator = torch.Generator().manual_seed(seed)
    needles = batches(loaded, Needle(length, split="test"), n, generator)
    return {
        "retrieval": watch_needles(loaded.model, needles),
        "induction": watch_repetition(loaded, n, length, generator),
    }
