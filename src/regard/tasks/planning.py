"""Sequences to make a plan on and others to measure it on, from a text and from needles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from regard.tasks.bytetext import StandardLibrary
from regard.tasks.needle import Needle, least_length
from regard.tasks.retoken import batches
from regard.tasks.testbeds import Loaded
from regard.tasks.text import most_tokens

__all__ = ["Material", "library_text", "needles", "windows"]

Inputs = dict[str, Any]


@dataclass
class Material:
    """What a plan is made on and what it is measured on: `model(**inputs)`, each a batch of one, with its kind."""

    calibration: list[Inputs] = field(default_factory=list)
    calibration_kinds: list[str] = field(default_factory=list)
    held_out: list[Inputs] = field(default_factory=list)
    held_out_kinds: list[str] = field(default_factory=list)

    def add(self, kind: str, calibration: list[Inputs], held_out: list[Inputs]) -> None:
        """More sequences of a kind."""
        self.calibration += calibration
        self.calibration_kinds += [kind] * len(calibration)
        self.held_out += held_out
        self.held_out_kinds += [kind] * len(held_out)


def library_text() -> str:
    """Held-out sources of this Python's standard library, which no shipped testbed was trained on."""
    return StandardLibrary("test").data.tobytes().decode(errors="replace")


def windows(
    loaded: Loaded, text: str, tokens: int, calibration: int, held_out: int
) -> tuple[list[Inputs], list[Inputs]]:
    """Stretches of ``tokens`` tokens of a text: every other one to plan on, the others to measure on.

    They do not overlap and are spread over the text. A text that gives fewer than asked for gives what it has, at least
    one of each.

    Raises:
        ValueError: the model has no tokenizer, takes fewer tokens, or the text has fewer than two stretches.
    """
    if loaded.tokenizer is None:
        raise ValueError(
            f"{loaded.name!r} has no tokenizer, so it takes no text; call regard.plan(model, inputs) in Python"
        )
    if loaded.model.config.is_encoder_decoder:
        raise ValueError(f"{loaded.name!r} reads on two sides; call regard.plan(model, inputs) in Python")
    most = most_tokens(loaded)
    if tokens < 2 or (most is not None and tokens > most):
        raise ValueError(f"tokens must be in 2..{most or 'any'} for {loaded.name!r}, got {tokens}")
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False).input_ids
    first = loaded.tokenizer("", return_tensors="pt").input_ids  # what the tokenizer puts before a text
    first = first[:, :1] if getattr(loaded.tokenizer, "bos_token_id", None) in first[0].tolist() else first[:, :0]
    room = tokens - first.shape[1]
    have = ids.shape[1] // room
    if have < 2:
        raise ValueError(
            f"text has {ids.shape[1]} tokens, less than two stretches of {room}, one to plan on and one to measure on; "
            f"give a longer text or fewer tokens (`--tokens {max(2, ids.shape[1] // 2)}` at most)"
        )
    wanted = min(calibration + held_out, have)
    starts = [n * have // wanted for n in range(wanted)]
    device = loaded.model.device
    made = [{"input_ids": torch.cat([first, ids[:, s * room : (s + 1) * room]], 1).to(device)} for s in starts]
    split = max(1, min(calibration, wanted - 1, round(wanted * calibration / (calibration + held_out))))
    mine = {round(n * wanted / split) for n in range(split)}
    return [x for n, x in enumerate(made) if n in mine], [x for n, x in enumerate(made) if n not in mine]


def needles(
    loaded: Loaded, length: int, calibration: int, held_out: int, seed: int = 0
) -> tuple[list[Inputs], list[Inputs]]:
    """Needles in a haystack of ``length`` bytes, in the model's own tokens; ``labels`` ask for their digits alone.

    Up to four other needles stand beside, as many as there is room for. Those planned on have names of the training
    split, those measured on of the test split.
    """
    made, others = [], max((n for n in range(5) if least_length(n) <= length), default=0)
    for n, split in ((calibration, "train"), (held_out, "test")):
        generator = torch.Generator().manual_seed(seed + (split == "test"))
        drawn = (
            batches(loaded, Needle(length, distractors=(min(1, others), others), split=split), n, generator, chunk=1)
            if n
            else []
        )
        device = loaded.model.device
        made.append([{"input_ids": b.input_ids.to(device), "labels": b.labels.to(device)} for b in drawn])
    return made[0], made[1]
