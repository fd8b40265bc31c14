"""Many interventions on one pair of inputs, several in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.edits import Edit
from regard.watch.effects import damage, recovery
from regard.watch.pieces import SHARED, Gathered, part_of, pieces
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.resume import Prefix, first_block, resumable
from regard.watch.running import Backend
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace


@dataclass(frozen=True, eq=False)
class Scan:
    """The metric of each edit and of the two plain runs; `corrupt` is None if there was one input only."""

    values: Float[Tensor, "edits batch"]
    clean: Float[Tensor, "batch"]
    corrupt: Float[Tensor, "batch"] | None

    def recovery(self, spread: float | None = None) -> Float[Tensor, "edits batch"]:
        """`(m_patched - m_corrupt) / (m_clean - m_corrupt)`: of a scan that puts clean values in."""
        return recovery(self.values, self.clean, self._corrupt(), spread)

    def damage(self, spread: float | None = None) -> Float[Tensor, "edits batch"]:
        """`(m_patched - m_clean) / (m_corrupt - m_clean)`: of a scan that puts corrupted values in."""
        return damage(self.values, self.clean, self._corrupt(), spread)

    def _corrupt(self) -> Tensor:
        if self.corrupt is None:
            raise ValueError("the scan had no corrupt inputs, so there is no difference to compare with")
        return self.corrupt


def scan(
    model: nn.Module,
    clean: Any,
    corrupt: Any,
    edits: Sequence[Edit | Site | Sequence[Edit | Site]],
    metric: Callable[[Tensor], Tensor],
    chunk: int = 8,
    *,
    rows: int | None = None,
    direction: str = "denoise",
    resume: bool = True,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "fused",
) -> Scan:
    """The metric under each of many edits, `chunk` of them stacked along the batch in one forward pass.

    Each edit (or group of edits) acts on its own copy of the inputs, with the numbers it would give alone, to the
    rounding of the kernels. Blocks before the first edited one are run once and not again for every edit.

    Args:
        model: the module to run, without gradients.
        clean, corrupt: inputs as for `trace`, aligned token by token. `corrupt=None`: edits act on `clean`.
        edits: each an Edit, or a Site, or a list of these that act together. A Site stands for `set` to what the other
            run has there: with `direction="denoise"` the corrupted run gets clean values, with "noise" the clean run
            gets corrupted ones.
        metric: logits [batch, ...] -> one number a sample.
        chunk: how many copies run together.
        rows: how many samples of each copy run together. None: all, but on a CPU no more than make 2,048 tokens with
            the copies, where the inputs are token numbers and no edit tells samples apart.
        direction: which run is edited.
        resume: False: run every block each time. Models whose blocks are no plain chain (encoder-decoders, blocks that
            are used twice) are always run whole.
        anatomy, valid, backend: as in `intervene`; clean and corrupt have the same padding.

    Returns:
        A `Scan`; `values[e]` is the metric under `edits[e]`.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; accepted: 'denoise' (clean into corrupt), 'noise'")
    if chunk < 1 or (rows is not None and rows < 1):
        raise ValueError(f"chunk={chunk}, rows={rows}; give at least 1")
    groups = [[e] if isinstance(e, (Edit, Site)) else list(e) for e in edits]
    patches = list(dict.fromkeys(e for group in groups for e in group if isinstance(e, Site)))
    if patches and corrupt is None:
        raise ValueError(
            "a Site stands for a patch from the other run, but corrupt=None: give Edits, or corrupt inputs"
        )
    base, other = (clean, corrupt) if direction == "noise" or corrupt is None else (corrupt, clean)
    how: dict[str, Any] = {"anatomy": anatomy, "backend": backend}
    values = trace(model, other, patches, valid=valid, **how) if patches else {}
    split = pieces(model, base, min(chunk, max(1, len(groups))), rows, [e for g in groups for e in g])
    results: dict[int, Tensor] = {}
    with torch.no_grad():
        plain = {
            name: score(model, x, metric, split, anatomy=anatomy, backend=backend) for name, x in _named(clean, corrupt)
        }
        batch = len(plain["clean"])
        parts = anatomy_for(model, base, anatomy) if resume and groups else None
        chain = parts is not None and resumable(model, parts)
        runs = [
            _Run(model, base, piece, batch, parts if chain else None, valid, values)
            for piece in ([None] if split is None else split)
        ]
        starts = [first_block([_site(e) for e in g], parts) if parts is not None and chain else 0 for g in groups]
        order = sorted(range(len(groups)), key=starts.__getitem__)
        for begin in range(0, len(order), chunk):
            some = order[begin : begin + chunk]
            gathered = Gathered(len(some))
            here = [groups[n] for n in some]
            for _, alike in groupby(runs, key=lambda r: r.key):
                _edited(model, list(alike), here, starts[some[0]], gathered, anatomy, backend)
            results |= {n: metric(logits) for n, logits in zip(some, gathered.logits, strict=True)}
    stacked = torch.stack([results[n] for n in range(len(groups))]) if results else plain["clean"].new_zeros(0, batch)
    return Scan(stacked, plain["clean"], plain.get("corrupt"))


class _Run:
    """Some samples of a batch, or all; what comes before the edited block is computed once."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        piece: slice | None,
        batch: int,
        parts: Anatomy | None,
        valid: Tensor | None,
        values: Mapping[Site, Tensor],
    ) -> None:
        self.piece, self.batch = piece, batch
        self.inputs = inputs if piece is None else part_of(inputs, piece, batch)
        self.valid = valid if piece is None or valid is None else valid[piece]
        self.values = values if piece is None else {site: value[piece] for site, value in values.items()}
        self.size = batch if piece is None else piece.stop - piece.start
        self.prefix = None if parts is None else Prefix(model, self.inputs, parts, self.size)
        # Runs of one key can share a session, whose opening goes over all modules.
        own = piece is not None and (self.valid is not None or self.values)
        self.key = (self.size, piece.start if piece is not None and own else -1)


def _edited(
    model: nn.Module,
    runs: Sequence[_Run],
    groups: Sequence[Sequence[Edit | Site]],
    start: int,
    gathered: Gathered,
    anatomy: Anatomy | None,
    backend: Backend,
) -> None:
    """The logits of a copy of each run's samples for each group of edits, computed from block `start` on."""
    first, copies, n = runs[0], len(groups), runs[0].size
    actions = [
        (
            Edit(e, "set", value=first.values[e]) if isinstance(e, Site) else e,
            slice(i * first.size, (i + 1) * first.size),
        )
        for i, group in enumerate(groups)
        for e in group
    ]
    valid = None if first.valid is None else stack(first.valid, copies, n)
    for run_ in runs:
        if run_.prefix is not None:
            run_.prefix.advance(start)
    with Session(model, actions, parts=anatomy, inputs=first.inputs, valid=valid, backend=backend):
        for run_ in runs:
            with run_.prefix.running(copies) if run_.prefix is not None else nullcontext():
                logits = find_logits(run(model, stack(run_.inputs, copies, n)))[0]
            gathered.add(logits, run_.piece, run_.batch)


def stack(inputs: Any, copies: int, batch: int) -> Any:
    """The inputs with every tensor of `batch` samples repeated `copies` times along them."""
    if isinstance(inputs, Mapping):
        return {name: x if name in SHARED else stack(x, copies, batch) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(stack(x, copies, batch) for x in inputs)
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs) == batch:
        return inputs.repeat(copies, *[1] * (inputs.ndim - 1))
    if hasattr(inputs, "get_seq_length"):
        raise ValueError("inputs hold a key-value cache, which the copies would share: scan needs inputs without one")
    return inputs


def _site(change: Edit | Site) -> Site:
    return change if isinstance(change, Site) else change.site


def _named(clean: Any, corrupt: Any) -> list[tuple[str, Any]]:
    return [("clean", clean)] + ([] if corrupt is None else [("corrupt", corrupt)])


def score(
    model: nn.Module,
    inputs: Any,
    metric: Callable[[Tensor], Tensor],
    split: Sequence[slice] | None = None,
    *,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "fused",
) -> Float[Tensor, "batch"]:
    """The metric of a plain run, of `split` samples at a time.

    Raises:
        ValueError: the metric does not give one number a sample.
    """
    gathered = Gathered(1)
    with Session(model, parts=anatomy, inputs=inputs, valid=valid, backend=backend):
        for piece in [None] if split is None else split:
            batch = 0 if split is None else split[-1].stop
            some = inputs if piece is None else part_of(inputs, piece, batch)
            gathered.add(find_logits(run(model, some))[0], piece, batch)
    scores = metric(gathered.logits[0])
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"metric must give one number a sample, shape [batch]; it gave {got}")
    return scores
