"""The video testbed: a small diffusion transformer on moving digits, its training and the gates it must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.models.dit import DiTConfig, VideoDiT, flow_loss
from regard.tasks.moving_digits import NULL, WORDS, MovingDigits, Videos
from regard.tasks.vision import Split
from regard.train.trainer import Recipe

__all__ = ["SHAPE", "SIZES", "Noised", "Phase", "Size", "VideoMixture", "build", "video_loss"]

#: (frames, height, width) in pixels of the videos it is made for: 8 x 16 x 16 tokens.
SHAPE = (8, 64, 64)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: until which step, and the (videos, objects, shape in pixels) that its steps draw from.

    ``shift``: of its times, instead of its size's.
    """

    until: int
    draws: tuple[tuple[int, int, tuple[int, int, int]], ...]
    shift: float | None = None


@dataclass(frozen=True)
class Size:
    """A size of the testbed.

    ``drop``: share of prompts left out, for guidance. ``shift``: pushes the times trained on towards noise, as in
    `regard.models.dit.timesteps`. ``speed``, ``texture``, ``step``, ``hold``: of `MovingDigits`.
    """

    model: DiTConfig
    recipe: Recipe
    phases: tuple[Phase, ...]
    drop: float = 0.12
    shift: float = 1.0
    speed: int = 1
    texture: float = 0.3
    step: int = 4
    hold: int = 2

    def task(self, shape: tuple[int, int, int], most: int, split: Split = "train") -> MovingDigits:
        """Its videos of a shape."""
        return MovingDigits(shape, most, self.speed, split, self.texture, self.step, self.hold)


_MODEL = DiTConfig(words=len(WORDS), patch=(1, 4, 4), theta=30.0, lean=6.0)

SIZES = {
    # Small canvases, on which a step sees many videos: one object, then two, then three; at last `SHAPE`.
    "full": Size(
        model=_MODEL,
        recipe=Recipe(steps=3300, lr=3e-3, warmup=30, decay=900, autocast=True),
        phases=(
            Phase(150, ((24, 1, (8, 16, 16)),)),
            Phase(2400, ((24, 1, (8, 16, 16)), (12, 2, (8, 24, 24)), (7, 1, (8, 32, 32)), (7, 3, (8, 32, 32)))),
            Phase(10**9, ((2, 1, SHAPE), (2, 3, SHAPE))),
        ),
        shift=2.0,
    ),
    # A second training, from the weights of the first: mostly one object, on that canvas, at times nearer to noise.
    "long": Size(
        model=_MODEL,
        recipe=Recipe(steps=1100, lr=2e-3, warmup=20, decay=700, autocast=True),
        phases=(Phase(10**9, ((2, 1, SHAPE), (2, 1, SHAPE), (2, 3, SHAPE), (7, 1, (8, 32, 32)))),),
        shift=3.0,
    ),
    "smoke": Size(
        model=replace(_MODEL, dim=32, layers=2, heads=2, pairs=(2, 3, 3)),
        recipe=Recipe(steps=20, lr=3e-3, warmup=4, decay=8),
        phases=(Phase(10**9, ((4, 1, (4, 16, 16)),)),),
    ),
}


class Noised(NamedTuple):
    """A training batch: videos, prompts (some left out), noise and times."""

    x: Float[Tensor, "batch 1 frames height width"]
    words: Int[Tensor, "batch words"]
    noise: Float[Tensor, "batch 1 frames height width"]
    t: Float[Tensor, "batch"]


def video_loss(model: nn.Module, batch: Noised) -> Tensor:
    """The flow-matching loss of a batch."""
    return flow_loss(model, batch.x, batch.noise, batch.t, batch.words)


def build(size: Size, seed: int) -> VideoDiT:
    """The untrained model."""
    torch.manual_seed(seed)
    return VideoDiT(size.model)


@dataclass(frozen=True)
class VideoMixture:
    """The batch of every step, a function of the step and the seed alone; each step has one shape of its phase."""

    size: Size
    seed: int

    def __call__(self, step: int) -> Noised:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        phase = next(p for p in self.size.phases if step < p.until)
        which = int(torch.randint(len(phase.draws), (), generator=generator))
        videos, most, shape = phase.draws[which]
        shift = self.size.shift if phase.shift is None else phase.shift
        return noised(self.size.task(shape, most).batch(videos, generator), self.size, generator, shift)


def noised(videos: Videos, size: Size, generator: torch.Generator, shift: float | None = None) -> Noised:
    """Videos with noise, logistic-normal times (shifted as the size says, or `shift`) and some prompts left out."""
    n = len(videos.x)
    noise = torch.randn(videos.x.shape, generator=generator)
    t = torch.randn(n, generator=generator).sigmoid()
    shift = size.shift if shift is None else shift
    t = shift * t / (1 + (shift - 1) * t)
    dropped = torch.rand(n, 1, generator=generator) < size.drop
    return Noised(videos.x, torch.where(dropped, NULL, videos.words), noise, t)


def evaluation(size: Size, n: int = 8, seed: int = 10_000_019) -> Callable[[nn.Module], dict[str, float]]:
    """Figures of the loss curve: the loss on held-out digits that training does not draw, at two grids."""
    full = size.model.layers > 2
    shapes = {"loss_small": (4 * n, (8, 16, 16), 1)} | ({"loss_full": (n // 2, SHAPE, 3)} if full else {})

    def measure(model: nn.Module) -> dict[str, float]:
        found = {}
        for name, (videos, shape, most) in shapes.items():
            generator = torch.Generator().manual_seed(seed)
            batch = noised(size.task(shape, most, "test").batch(videos, generator), size, generator)
            with torch.no_grad():
                found[name] = float(video_loss(model, batch))
        return found

    return measure
