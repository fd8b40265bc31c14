"""Routed patterns compared by value, written and read: safetensors, patterns as JSON in the header."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.patterns.text import from_plain, to_plain

if TYPE_CHECKING:
    from regard.patterns.decided import Routed

__all__ = ["load", "same", "save"]


def _split(routed: Routed) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fields that are tensors, and the others."""
    values = {f.name: getattr(routed, f.name) for f in fields(routed)}
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in values.items() if name not in tensors}


def same(a: Routed, b: Routed) -> bool:
    """Every field alike; tensors by value, on whatever device."""
    (mine, told), (its, told_too) = _split(a), _split(b)
    if mine.keys() != its.keys() or told != told_too:
        return False
    return all(mine[n].dtype == its[n].dtype and torch.equal(mine[n].cpu(), its[n].cpu()) for n in mine)


def save(routed: Routed, path: str | Path) -> None:
    """Write it; scores without their gradient.

    Raises:
        ValueError: for a pattern that JSON cannot say (see `to_plain`).
    """
    from safetensors.torch import save_file

    tensors, told = _split(routed)
    tensors = {n: x.detach().cpu().contiguous().clone() for n, x in tensors.items()}
    header = {"regard.routed": json.dumps({name: to_plain(x, tensors) for name, x in told.items()})}
    save_file(tensors, str(path), header)


def load(path: str | Path) -> Routed:
    """What `save` wrote.

    Raises:
        ValueError: for a file that is none of these, or whose blocks are not as `Routed.blocks` wants them.
    """
    from safetensors import safe_open

    from regard.patterns import listed as ls
    from regard.patterns.decided import Routed

    with safe_open(str(path), "pt") as file:
        header = (file.metadata() or {}).get("regard.routed")
        if header is None:
            raise ValueError(f"{path} was not written by Routed.save")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    told = {name: from_plain(x, tensors) for name, x in json.loads(header).items()}
    names = {f.name for f in fields(Routed)}
    made = Routed(**{n: x for n, x in tensors.items() if n in names}, **told)
    if made.index is not None:
        ls.check_blocks(made.index, made.count, made.n_rows, made.n_columns, True)
    if made.start is not None and made.stop is not None:
        ls.check_spans(made.start, made.stop, made.n_rows, made.kv_len, True)
    return made
