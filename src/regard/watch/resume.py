"""Running a model from one of its blocks on: what comes before is given, not computed again.

An edit in block l changes nothing in the blocks before it, so a scan over the edits of a model with n blocks needs
little more than half of each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy
from regard.watch.probe import run
from regard.watch.site import Site


def first_block(sites: list[Site], parts: Anatomy) -> int:
    """The first block in which a site lies; 0 for the embeddings, the last one for what comes after all blocks."""
    last = len(parts) - 1
    blocks = [
        parts.block(site.layer) if site.layer is not None else 0 if site.part == "embed" else last for site in sites
    ]
    return min(blocks, default=0)


def resumable(model: nn.Module, parts: Anatomy) -> bool:
    """Whether the blocks are a plain chain: each one runs once, in order, and there is one such chain."""
    names = dict(model.named_modules(remove_duplicate=False))
    blocks = [names[name] for name in parts.blocks]
    return len(blocks) > 1 and not any(parts.decoder) and len({id(b) for b in blocks}) == len(blocks)


class Prefix:
    """What the blocks before `at` give for some inputs. Made at block 0; `advance` moves it on, computing once."""

    def __init__(self, model: nn.Module, inputs: Any, parts: Anatomy, batch: int):
        names = dict(model.named_modules(remove_duplicate=False))
        self.model, self.inputs, self.batch = model, inputs, batch
        self.blocks = [names[name] for name in parts.blocks]
        self.at = 0
        self.output: Any = None

    def advance(self, to: int) -> None:
        """Move on to block `to`, by one run from where it stands."""
        if to <= self.at:
            return
        kept: list[Any] = []
        handle = self.blocks[to - 1].register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            with torch.no_grad(), self.running(1):
                run(self.model, self.inputs)
        finally:
            handle.remove()
        if len(kept) != 1:
            raise RuntimeError(f"block {to - 1} ran {len(kept)} times in one forward pass")
        self.at, self.output = to, kept[0]

    @contextmanager
    def running(self, copies: int) -> Iterator[None]:
        """The model starts at block `at`, on `copies` copies of the inputs stacked along the batch."""
        if self.at == 0:
            yield
            return
        given = _repeat(self.output, copies, self.batch)
        before = [block.__dict__.get("forward") for block in self.blocks[: self.at]]
        try:
            for block in self.blocks[: self.at]:
                block.forward = lambda *args, **kwargs: given
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=False):
                if forward is None:
                    del block.forward
                else:  # another library's wrapper
                    block.forward = forward


def _repeat(value: Any, copies: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        alike = value.ndim > 0 and len(value) == batch and copies > 1
        return value.repeat(copies, *[1] * (value.ndim - 1)) if alike else value
    if isinstance(value, Mapping):
        return type(value)(**{k: _repeat(v, copies, batch) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(_repeat(v, copies, batch) for v in value)
    return value
