"""The byte-level tasks in any model's own tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch
from regard.tasks.bytetext import BOS, StandardLibrary, decode
from regard.tasks.testbeds import Loaded


def is_bytes(tokenizer: Any) -> bool:
    """Whether the tokens are bytes after BOS, as the tasks make them."""
    return tokenizer is not None and tokenizer("az").input_ids == [BOS, 97, 122]


def texts(loaded: Loaded, n: int, length: int, seed: int) -> Int[Tensor, "n length"]:
    """n stretches of `length` tokens from the held-out sources of the standard library."""
    generator = torch.Generator().manual_seed(seed)
    library = StandardLibrary("test")
    if is_bytes(loaded.tokenizer):
        return library.cut(n, length, generator)
    rows = [loaded.tokenizer(decode(row)).input_ids[:length] for row in library.cut(n, 32 * length, generator)]
    if short := [len(row) for row in rows if len(row) < length]:
        raise ValueError(
            f"{32 * length} bytes of source give only {min(short)} tokens of {loaded.name!r}, {length} needed"
        )
    return torch.tensor(rows)


def batches(loaded: Loaded, task: Any, n: int, generator: torch.Generator, chunk: int = 8) -> list[Batch]:
    """n samples of a byte-level task (`Needle` and the like), `chunk` at a time.

    For a model with other tokens than bytes each sample is retokenised and stands alone; the task's lengths count bytes
    in either case.
    """
    whole = task.batch(n, generator)
    if is_bytes(loaded.tokenizer):
        return [whole[i : i + chunk] for i in range(0, n, chunk)]
    return [retokenised(one, loaded.tokenizer) for one in whole]


def retokenised(one: Batch, tokenizer: Any) -> Batch:
    """A sample of bytes in another tokenizer's tokens.

    A token belongs to a span if it shares a character with it; spans keep their names, groups of keys are left out.
    """
    text = decode(one.input_ids[0])
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    start, end = encoded["offset_mapping"][0].unbind(-1)
    spans = {}
    for name, span in one.spans.items():
        first, last = (span[0] - 1).tolist()  # BOS has no character
        inside = ((end > first) & (start < last)).nonzero().flatten()
        spans[name] = torch.tensor([[int(inside[0]), int(inside[-1]) + 1]])
    ids = encoded["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    if "answer" in spans:
        a, b = spans["answer"][0].tolist()
        labels[0, a:b] = ids[0, a:b]
    return Batch(ids, labels, spans)
