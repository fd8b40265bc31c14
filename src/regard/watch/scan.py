"""Many interventions on one pair of inputs, several in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.watch.anatomy import Anatomy, anatomy_for
from regard.watch.edits import Edit
from regard.watch.effects import damage, recovery
from regard.watch.places import find_logits
from regard.watch.probe import run
from regard.watch.resume import Prefix, first_block, resumable
from regard.watch.running import Backend
from regard.watch.session import Session
from regard.watch.site import Site
from regard.watch.trace import trace

# Arguments whose first dimension is never the batch.
_SHARED = ("cache_position",)


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
        direction: which run is edited.
        resume: False: run every block each time. Models whose blocks are no plain chain (encoder-decoders, blocks that
            are used twice) are always run whole.
        anatomy, valid, backend: as in `intervene`; clean and corrupt have the same padding.

    Returns:
        A `Scan`; `values[e]` is the metric under `edits[e]`.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction={direction!r}; accepted: 'denoise' (clean into corrupt), 'noise'")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; give at least 1")
    groups = [[e] if isinstance(e, (Edit, Site)) else list(e) for e in edits]
    patches = list(dict.fromkeys(e for group in groups for e in group if isinstance(e, Site)))
    if patches and corrupt is None:
        raise ValueError(
            "a Site stands for a patch from the other run, but corrupt=None: give Edits, or corrupt inputs"
        )
    base, other = (clean, corrupt) if direction == "noise" or corrupt is None else (corrupt, clean)
    how: dict[str, Any] = {"anatomy": anatomy, "backend": backend}
    values = trace(model, other, patches, valid=valid, **how) if patches else {}
    ready = [[Edit(e, "set", value=values[e]) if isinstance(e, Site) else e for e in group] for group in groups]
    results: dict[int, Tensor] = {}
    with torch.no_grad():
        plain = {name: score(model, x, metric, anatomy=anatomy, backend=backend) for name, x in _named(clean, corrupt)}
        batch = len(plain["clean"])
        parts = anatomy_for(model, base, anatomy) if resume and ready else None
        prefix = Prefix(model, base, parts, batch) if parts is not None and resumable(model, parts) else None
        starts = [first_block([e.site for e in g], parts) if parts is not None and prefix else 0 for g in ready]
        order = sorted(range(len(ready)), key=starts.__getitem__)
        for begin in range(0, len(order), chunk):
            some = order[begin : begin + chunk]
            actions = [(e, slice(i * batch, (i + 1) * batch)) for i, n in enumerate(some) for e in ready[n]]
            inputs = stack(base, len(some), batch)
            rows = None if valid is None else stack(valid, len(some), batch)
            if prefix is not None:
                prefix.advance(starts[some[0]])
            with (
                prefix.running(len(some)) if prefix is not None else nullcontext(),
                Session(model, actions, parts=anatomy, inputs=base, valid=rows, backend=backend),
            ):
                logits = find_logits(run(model, inputs))[0]
            results |= {n: metric(part) for n, part in zip(some, logits.split(batch), strict=True)}
    stacked = torch.stack([results[n] for n in range(len(ready))]) if results else plain["clean"].new_zeros(0, batch)
    return Scan(stacked, plain["clean"], plain.get("corrupt"))


def stack(inputs: Any, copies: int, batch: int) -> Any:
    """The inputs with every tensor of `batch` samples repeated `copies` times along them."""
    if isinstance(inputs, Mapping):
        return {name: x if name in _SHARED else stack(x, copies, batch) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(stack(x, copies, batch) for x in inputs)
    if isinstance(inputs, Tensor) and inputs.ndim and len(inputs) == batch:
        return inputs.repeat(copies, *[1] * (inputs.ndim - 1))
    if hasattr(inputs, "get_seq_length"):
        raise ValueError("inputs hold a key-value cache, which the copies would share: scan needs inputs without one")
    return inputs


def _named(clean: Any, corrupt: Any) -> list[tuple[str, Any]]:
    return [("clean", clean)] + ([] if corrupt is None else [("corrupt", corrupt)])


def score(
    model: nn.Module,
    inputs: Any,
    metric: Callable[[Tensor], Tensor],
    *,
    anatomy: Anatomy | None = None,
    valid: Bool[Tensor, "batch length"] | None = None,
    backend: Backend = "fused",
) -> Float[Tensor, "batch"]:
    """The metric of a plain run.

    Raises:
        ValueError: the metric does not give one number a sample.
    """
    with Session(model, parts=anatomy, inputs=inputs, valid=valid, backend=backend):
        scores = metric(find_logits(run(model, inputs))[0])
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"metric must give one number a sample, shape [batch]; it gave {got}")
    return scores
