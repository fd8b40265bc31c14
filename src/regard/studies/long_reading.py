"""Small decoders learn to answer for a key in short texts and then read long ones, with several ways to leave out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.studies.protocol import Finding

__all__ = ["Read", "answered", "learn", "read_long", "unmeasured"]


def learn(
    model: Any,
    length: int,
    device: str,
    seed: int,
    *,
    batch: int,
    steps: int,
    lr: float,
    warmup: int,
    prepare: Any = None,
) -> Any:
    """The model, trained on the answers of `KeyedPasskey` texts; ``prepare(ids)`` makes what it reads of a prompt."""
    from torch.nn.functional import cross_entropy

    from regard.tasks.recall import KeyedPasskey
    from regard.train.simple import fit

    task = KeyedPasskey(length)

    def loss(model: Any, drawn: Any) -> Any:
        ids = drawn.input_ids[:, :-1] if prepare is None else prepare(drawn.input_ids[:, :-1])
        return cross_entropy(model(ids.to(device))[:, -1, : task.vocab], drawn.input_ids[:, -1].to(device))

    model = model.to(device)
    fit(model, loss, lambda g: task.batch(batch, g), steps, lr, seed, warmup=min(warmup, steps))
    return model


def answered(batch: Any, read: Callable[[Any], Any], rows: int) -> Any:
    """1 for every right answer; ``read(prompts)`` gives the logits after some of them, ``rows`` at a time."""
    import torch

    right = []
    with torch.no_grad():
        for part in batch.input_ids.split(rows):
            right.append((read(part[:, :-1]).argmax(-1).cpu() == part[:, -1]).numpy())
    return np.concatenate(right).astype(float)


@dataclass(frozen=True)
class Read:
    """What the ways of reading answered: ``[seeds, questions]`` of 0 and 1 at the trained length and, by arm, a longer
    one; ``means`` in points of 100."""

    short: Any
    arms: dict[str, Any]
    told: str

    @property
    def means(self) -> dict[str, float]:
        """Points of each arm."""
        return {arm: 100 * float(x.mean()) for arm, x in self.arms.items()}

    def better(self, *controls: str) -> str:
        """The control with more points."""
        return max(controls, key=lambda arm: self.means[arm])

    @property
    def details(self) -> dict[str, Any]:
        """What a finding keeps."""
        by_seed = {arm: x.mean(1).tolist() for arm, x in self.arms.items()} | {"trained": self.short.mean(1).tolist()}
        return {"accuracy": self.means, "by_seed": by_seed}


def read_long(
    models: Sequence[Any],
    answers: Callable[[Any, Any, str], Any],
    arms: Sequence[str],
    *,
    trained: int,
    tested: int,
    questions: int,
    seed: int,
    first: str,
    what: str,
    gate: float,
    steps: int,
) -> Read | str:
    """Every model's answers, or why they say nothing: the share that is right at the trained length is below the gate.

    Args:
        answers: of a model, a batch and an arm.
        arms: ways to read ``tested`` tokens; ``first`` is the one in which the trained length is read.
        what: is left of the long text, for `Read.told`.
    """
    import torch

    from regard.tasks.recall import KeyedPasskey

    def right(length: int, arm: str) -> Any:
        batch = KeyedPasskey(length).batch(questions, torch.Generator().manual_seed(1_000_000_007 + seed))
        return np.stack([answers(model, batch, arm) for model in models])

    short = right(trained, first)
    if short.mean() < gate:
        return f"premise not met: {100 * short.mean():.0f} of 100 right at the trained length after {steps} steps"
    found = Read(short, {arm: right(tested, arm) for arm in arms}, "")
    shown = ", ".join(f"{arm} {mean:.1f}" for arm, mean in found.means.items())
    told = (
        f"of 100 right at {tested} tokens, {what}, {len(models)} seeds: {shown}; at the trained {trained} "
        f"{100 * short.mean():.1f}; the value of any pair shown gives {100 * KeyedPasskey().floor:.0f}"
    )
    return Read(short, found.arms, told)


def unmeasured(reason: str, *claims: str) -> list[Finding]:
    """Findings of claims that share a reason."""
    return [Finding(name, "not measured", reason=reason) for name in claims]
