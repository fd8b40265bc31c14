"""Small videos with known answers: scikit-learn's digits and simple shapes that move over a canvas and bounce.

A prompt names what is to be seen: a set of words, one an object, filled up with "nothing"; its order says nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.vision import Split, digits

__all__ = ["NULL", "SHAPES", "SIDE", "WORDS", "MovingDigits", "Scenes", "Videos", "prompt", "spell"]

#: Side of an object in pixels.
SIDE = 8
SHAPES = ("square", "cross", "disc", "triangle")
#: The words of a prompt: no object, the ten digits, the shapes; `NULL` stands for a prompt left out (guidance).
WORDS = ("nothing", *map(str, range(10)), *SHAPES, "null")
NULL = len(WORDS) - 1
#: Objects a scene may have, and words of a prompt.
MOST = 3


class Scenes(NamedTuple):
    """What determines a batch of videos: objects with a kind (0: none), pixels, a start and a velocity; a canvas."""

    kind: Int[Tensor, "batch objects"]
    glyph: Float[Tensor, "batch objects 8 8"]
    start: Int[Tensor, "batch objects 2"]
    """(row, column) of the top left pixel in frame 0."""
    velocity: Int[Tensor, "batch objects 2"]
    """Pixels a move."""
    canvas: Float[Tensor, "batch height width"]
    """What stands still behind them."""


class Videos(NamedTuple):
    """Videos in [-1, 1] (-1: background) and the words of their prompts."""

    x: Float[Tensor, "batch 1 frames height width"]
    words: Int[Tensor, "batch objects"]

    def to(self, device: str | torch.device) -> Videos:
        """On another device."""
        return Videos(self.x.to(device), self.words.to(device))


def prompt(text: str) -> Int[Tensor, "words"]:
    """The words of a prompt such as "3 7 square", in their canonical order; "" asks for an empty canvas.

    Raises:
        ValueError: an unknown word or more than three.
    """
    said = text.split()
    unknown = [w for w in said if w not in WORDS[1:NULL]]
    if unknown:
        raise ValueError(f"text must be words among {', '.join(WORDS[1:NULL])}, got {unknown[0]!r}")
    if len(said) > MOST:
        raise ValueError(f"text must name at most {MOST} objects, got {len(said)}")
    ids = sorted((WORDS.index(w) for w in said), reverse=True)
    return torch.tensor(ids + [0] * (MOST - len(ids)))


def spell(words: Int[Tensor, "words"]) -> str:
    """The text of a prompt's words."""
    return " ".join(WORDS[i] for i in words.tolist() if i)


@functools.cache
def shapes() -> Float[Tensor, "shapes 8 8"]:
    """The shapes, drawn in [0, 1] with a margin of a pixel, in the order of `SHAPES`."""
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    y, x = (row - 3.5).abs(), (column - 3.5).abs()
    square = (torch.maximum(y, x) <= 2.5) & (torch.maximum(y, x) >= 1.5)
    cross = ((x <= 0.5) | (y <= 0.5)) & (torch.maximum(y, x) <= 2.5)
    disc = y**2 + x**2 <= 9
    triangle = (row >= 1) & (row <= 6) & (x <= (row - 0.5) / 2)
    return torch.stack([square, cross, disc, triangle]).float()


@dataclass(frozen=True)
class MovingDigits:
    """Scenes of up to `most` objects on a canvas, each with a constant velocity between bounces.

    Kinds are uniform over the fourteen words, digits over the split's images, velocities over whole steps a move up to
    `speed` in each axis. Of eight drawn layouts a scene takes the one whose objects overlap least, over all frames.

    Args:
        shape: (frames, height, width) in pixels; each side 8 and a multiple of `step`.
        most: objects a scene has at most; the number is uniform over 1..most.
        speed: of each axis, steps a move.
        split: which digits.
        texture: brightest pixel of the canvas, which is uniform noise that stands still; 0: a black canvas.
        step: objects start, and move, by multiples of so many pixels.
        hold: frames from a move to the next.
    """

    shape: tuple[int, int, int] = (8, 32, 32)
    most: int = MOST
    speed: int = 2
    split: Split = "train"
    texture: float = 0.0
    step: int = 1
    hold: int = 1

    def __post_init__(self) -> None:
        if self.shape[0] < 1 or min(self.shape[1:]) < SIDE:
            raise ValueError(f"shape must be (frames >= 1, height >= {SIDE}, width >= {SIDE}), got {self.shape}")
        if not 1 <= self.most <= MOST:
            raise ValueError(f"most must be in 1..{MOST}, got {self.most}")
        if self.speed < 0:
            raise ValueError(f"speed must be at least 0, got {self.speed}")
        if not 0 <= self.texture < 0.5:
            raise ValueError(f"texture must be in [0, 0.5), darker than objects are, got {self.texture}")
        for name in ("step", "hold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any((side - SIDE) % self.step for side in self.shape[1:]):
            raise ValueError(
                f"shape must have sides of {SIDE} and a multiple of step = {self.step}, got {self.shape[1:]}"
            )

    def scenes(self, n: int, generator: torch.Generator, words: Int[Tensor, "n objects"] | None = None) -> Scenes:
        """n scenes drawn with the generator; `words` fixes what is seen."""
        if words is None:
            kind = torch.randint(1, NULL, (n, MOST), generator=generator)
            count = torch.randint(1, self.most + 1, (n, 1), generator=generator)
            kind = torch.where(torch.arange(MOST) < count, kind, 0).sort(dim=1, descending=True).values
        else:
            if words.shape[0] != n or int(words.min()) < 0 or int(words.max()) >= NULL:
                raise ValueError(f"words must be {n} prompts of ids in 0..{NULL - 1}, got {tuple(words.shape)}")
            kind = words
        found = digits(self.split)
        draw = torch.randint(len(found.x), (n, kind.shape[1], 256), generator=generator)
        right = found.labels[draw] == (kind - 1)[..., None]  # of 256 images one has the class, or the first stands in
        chosen = draw.gather(2, right.int().argmax(2, keepdim=True))[..., 0]
        glyph = found.x[chosen, 0]
        drawn = shapes()[(kind - 11).clamp(0, len(SHAPES) - 1)]
        glyph = torch.where((kind >= 11)[..., None, None], drawn, glyph) * (kind > 0)[..., None, None]
        start, velocity = self._least_overlap(kind, generator)
        canvas = torch.zeros(n, *self.shape[1:])
        if self.texture:
            canvas = self.texture * torch.rand(canvas.shape, generator=generator)
        return Scenes(kind, glyph, start, velocity, canvas)

    def places(self, start: Int[Tensor, "*some 2"], velocity: Int[Tensor, "*some 2"]) -> Int[Tensor, "*some frames 2"]:
        """Top left pixels in every frame: the straight path, folded back at the walls."""
        room = torch.tensor([side - SIDE for side in self.shape[1:]])
        path = start[..., None, :] + velocity[..., None, :] * (torch.arange(self.shape[0]) // self.hold)[:, None]
        period = (2 * room).clamp(min=1)
        path = path % period
        return torch.minimum(path, 2 * room - path)

    def render(self, scenes: Scenes) -> Float[Tensor, "batch frames height width"]:
        """The pixels in [0, 1]: the brightest of objects and canvas at each place."""
        n, objects = scenes.kind.shape
        frames, height, width = self.shape
        place = self.places(scenes.start, scenes.velocity)
        side = torch.arange(SIDE)
        rows = place[..., 0, None, None] + side[:, None]
        columns = place[..., 1, None, None] + side
        flat = (rows * width + columns).flatten(3)
        values = scenes.glyph.flatten(2)[:, :, None].expand(n, objects, frames, SIDE * SIDE)
        canvas = scenes.canvas.flatten(1)[:, None].repeat(1, frames, 1)
        for one in range(objects):
            canvas.scatter_reduce_(2, flat[:, one], values[:, one], "amax")
        return canvas.unflatten(2, (height, width))

    def batch(self, n: int, generator: torch.Generator, words: Int[Tensor, "n objects"] | None = None) -> Videos:
        """n videos with their prompts."""
        scenes = self.scenes(n, generator, words)
        return Videos(self.render(scenes)[:, None] * 2 - 1, scenes.kind)

    def _least_overlap(self, kind: Tensor, generator: torch.Generator, draws: int = 8) -> tuple[Tensor, Tensor]:
        n, objects = kind.shape
        room = [(side - SIDE) // self.step + 1 for side in self.shape[1:]]
        start = torch.stack([torch.randint(r, (n, draws, objects), generator=generator) for r in room], -1)
        velocity = torch.randint(-self.speed, self.speed + 1, (n, draws, objects, 2), generator=generator)
        start, velocity = start * self.step, velocity * self.step
        place = self.places(start, velocity)  # [n, draws, objects, frames, 2]
        near = (SIDE - (place[:, :, :, None] - place[:, :, None]).abs()).clamp(min=0).prod(-1).sum(-1)
        both = self._pairs(kind)[:, None]
        best = (near * both).sum((2, 3)).argmin(1)
        row = torch.arange(n)
        return start[row, best], velocity[row, best]

    @staticmethod
    def _pairs(kind: Tensor) -> Bool[Tensor, "n objects objects"]:
        there = kind > 0
        return (there[:, :, None] & there[:, None]).triu(1)
