"""The second training of the decoder testbed: the same tasks at lengths and distances that the first never saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.tasks.bytetext import BOS, StandardLibrary
from regard.tasks.decoder import PRINTABLE, Weighted, asked_mean, repeated_at
from regard.tasks.needle import Needle, lines_of, sentences
from regard.tasks.repeated import RepeatedTokens
from regard.train.trainer import Recipe, token_loss

__all__ = ["STRETCH", "Placed", "Stretch", "StretchMixture", "placed_loss", "skipped_positions"]


@dataclass(frozen=True)
class Placed(Weighted):
    """A training batch whose tokens stand at ``positions``."""

    positions: Int[Tensor, "batch length"]


def placed_loss(model: nn.Module, batch: Placed) -> Float[Tensor, ""]:
    """`token_loss` with the batch's positions; a mask of ones says that jumps in them begin no new document."""
    return token_loss(model, batch, position_ids=batch.positions, attention_mask=torch.ones_like(batch.input_ids))


def skipped_positions(
    rows: int, length: int, reach: int, generator: torch.Generator, pieces: int = 4
) -> Int[Tensor, "{rows} {length}"]:
    """Ascending positions from 0 with ``pieces - 1`` jumps at random places, the last below ``reach``.

    What is jumped over in all is uniform in ``[0, reach - length]`` and the jumps share it at random, so every distance
    up to ``reach`` is met in sequences of ``length`` tokens: positional skip-wise training, arXiv 2309.10400 (there the
    first piece may start later; here the first token keeps position 0).

    Raises:
        ValueError: reach is below length, or there are fewer tokens than pieces.
    """
    if reach < length:
        raise ValueError(f"reach must be at least length = {length}, got {reach}")
    if not 1 <= pieces <= length:
        raise ValueError(f"pieces must be in 1..{length} (length), got {pieces}")
    total = torch.rand(rows, 1, generator=generator) * (reach - length + 1)
    share = torch.rand(rows, pieces - 1, generator=generator).sort(-1).values
    share[:, -1:] = 1.0
    jumped = torch.cat([torch.zeros(rows, 1), share * total], 1).floor().long().clamp(max=reach - length)
    starts = torch.rand(rows, length - 1, generator=generator).topk(pieces - 1, dim=-1).indices + 1
    piece = (torch.arange(length)[None, :, None] >= starts[:, None]).sum(-1)
    return torch.arange(length) + jumped.gather(1, piece)


@dataclass(frozen=True)
class Stage:
    """A stretch of the second training: ``until`` which step, the ``lengths`` drawn from, and for each of them how far
    its positions reach (its own length: no jumps)."""

    until: int
    lengths: tuple[int, ...]
    reach: int


@dataclass(frozen=True)
class Stretch:
    """The recipe of the second training."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    tokens: int = 4096


STRETCH = Stretch(
    recipe=Recipe(steps=740, lr=1.5e-3, warmup=30, decay=260, autocast=True),
    stages=(
        Stage(450, (256, 512, 1024, 1024, 1024, 1024), reach=8192),
        Stage(660, (512, 1024, 1024, 2048, 4096), reach=8192),
        Stage(10**9, (512, 1024, 2048, 4096, 8192), reach=8192),
    ),
)


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of another number of steps: the same run up to its decay, of at most a third of them."""
    decay = min(recipe.decay, steps // 3)
    return replace(recipe, steps=steps, decay=decay, warmup=min(recipe.warmup, steps - decay))


@dataclass
class StretchMixture:
    """The batch of every step: text, needles (two thirds of them in text) and repeated segments of one length.

    Sequences of 512 to 2048 tokens jump through the positions up to the stage's reach in half of the steps (those of
    512 and 1024 in four fifths). As in `Mixture` each part counts as the mean over what it asks for.
    """

    stretch: Stretch
    seed: int
    text: StandardLibrary = field(default_factory=StandardLibrary)

    def __call__(self, step: int) -> Placed:
        """The batch of a step, a function of the step and the seed alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 500_000)
        stage = next(s for s in self.stretch.stages if step < s.until)
        length = stage.lengths[self._draw(len(stage.lengths), generator)]
        rows = max(1, self.stretch.tokens // length)
        counts = self._counts(rows, generator)
        parts = [
            make(n, length, generator)
            for n, make in zip(counts, (self._text, self._needles, self._repeated), strict=True)
            if n
        ]
        ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        jumps = {512: 0.8, 1024: 0.8, 2048: 0.5}.get(length, 0.0)
        reach = stage.reach if float(torch.rand((), generator=generator)) < jumps else length
        return Placed(ids, weights, skipped_positions(rows, length, reach, generator))

    def _draw(self, n: int, generator: torch.Generator) -> int:
        return int(torch.randint(n, (), generator=generator))

    def _counts(self, rows: int, generator: torch.Generator) -> tuple[int, int, int]:
        """Rows of text, needles and repetitions: 0.3, 0.5 and 0.2 of them, drawn where there are few."""
        if rows >= 4:
            needles, repeated = round(0.5 * rows), max(1, round(0.2 * rows))
            return rows - needles - repeated, needles, repeated
        kinds = torch.multinomial(torch.tensor([0.2, 0.65, 0.15]), rows, replacement=True, generator=generator)
        text, needles, repeated = torch.bincount(kinds, minlength=3).tolist()
        return text, needles, repeated

    def _text(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = self.text.cut(n, length, generator)
        return ids, asked_mean(torch.ones_like(ids) > 0)

    def _needles(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        most, questions = {256: (3, 1), 512: (6, 3), 1024: (10, 4), 2048: (16, 6)}.get(length, (24, 8))
        others = self._draw(most + 1, generator)
        asked = 1 + self._draw(min(others + 1, questions), generator)
        in_text = float(torch.rand((), generator=generator)) < 2 / 3
        filler = lines_of(self.text.data.tobytes()) if in_text else sentences
        batch = Needle(length, distractors=(others, others), questions=asked, filler=filler).batch(n, generator)
        around = 1.0 if in_text else 0.3
        return batch.input_ids, asked_mean(batch.labels >= 0) + around * asked_mean(batch.labels < 0)

    def _repeated(self, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        task = repeated_at(length)
        if length > 1024:  # periods as long as those of the shorter sequences, and longer
            task = RepeatedTokens(length, PRINTABLE, BOS, (12, length // 4))
        batch = task.batch(n, generator)
        return batch.input_ids, 0.5 * asked_mean(batch.labels >= 0) + 0.5 * asked_mean(batch.labels < 0)
