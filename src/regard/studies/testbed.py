"""What studies run on: texts and needles in any model's own tokens, and whether a testbed is good enough."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.bytetext import BOS, StandardLibrary, decode
from regard.tasks.needle import Needle
from regard.tasks.testbeds import DECODER, Loaded


def is_bytes(loaded: Loaded) -> bool:
    """Whether the model's tokens are bytes after BOS, as the tasks make them."""
    return loaded.tokenizer is not None and loaded.tokenizer("az").input_ids == [BOS, 97, 122]


def below_gate(loaded: Loaded, *gates: str) -> str:
    """Which of the gates a testbed misses, as a reason not to measure; empty for none and for models without gates."""
    folder = DECODER if loaded.name.startswith("testbed:") else Path(loaded.name)
    record = folder / "training.json"
    if not record.is_file():
        return ""
    measured = json.loads(record.read_text())["gates"]
    missed = [
        f"{gate} {measured['values'][gate]:.3g} < {measured['thresholds'][gate]:g}"
        for gate in gates
        if measured["values"][gate] < measured["thresholds"][gate]
    ]
    return f"testbed below its gate: {', '.join(missed)}" if missed else ""


def texts(loaded: Loaded, n: int, length: int, seed: int) -> Int[Tensor, "n length"]:
    """n stretches of `length` tokens from the held-out sources of the standard library."""
    generator = torch.Generator().manual_seed(seed)
    library = StandardLibrary("test")
    if is_bytes(loaded):
        return library.cut(n, length, generator)
    # No tokenizer here makes a token of more than 16 bytes of source on average.
    rows = [loaded.tokenizer(decode(row)).input_ids[:length] for row in library.cut(n, 16 * length, generator)]
    return torch.tensor(rows)


def needles(loaded: Loaded, task: Needle, n: int, generator: torch.Generator, chunk: int = 8) -> list[Batch]:
    """n needles in batches; for a model with other tokens than bytes, retokenised, one by one.

    `task.length` counts bytes in either case.
    """
    whole = task.batch(n, generator)
    if is_bytes(loaded):
        return [whole[i : i + chunk] for i in range(0, n, chunk)]
    return [retokenised(one, loaded.tokenizer) for one in whole]


def retokenised(one: Batch, tokenizer: Any) -> Batch:
    """A sample of bytes in another tokenizer's tokens: a token belongs to a span if it shares a character with it."""
    text = decode(one.input_ids[0])
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    start, end = encoded["offset_mapping"][0].unbind(-1)

    def tokens_of(span: Tensor) -> Tensor:
        first, last = (span - 1).tolist()  # BOS has no character
        return ((end > first) & (start < last)).nonzero().flatten()

    spans = {}
    for name, span in one.spans.items():
        inside = tokens_of(span[0])
        spans[name] = torch.tensor([[int(inside[0]), int(inside[-1]) + 1]])
    ids = encoded["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    a, b = spans["answer"][0].tolist()
    labels[0, a:b] = ids[0, a:b]
    needle = torch.zeros_like(ids, dtype=torch.bool)
    a, b = spans["needle"][0].tolist()
    needle[0, a:b] = bool(one.groups["needle"].any())
    return Batch(ids, labels, spans, {"needle": needle})


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The attention implementation that hands out its weights, to compare with."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def dense_weights(model: Any, ids: Int[Tensor, "1 length"]) -> Tensor:
    """The weights of every layer of one sample as the model's eager attention gives them, [layer, head, row, key]."""
    with eager(model):
        return torch.stack([a[0].double() for a in model(input_ids=ids, output_attentions=True).attentions]).cpu()
