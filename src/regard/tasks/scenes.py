"""Synthetic scenes: small pictures of objects that go together, whose captions sometimes name what is not there.

Four contexts of two pairs each. Of a pair the leader comes by itself and the partner mostly with it. Where captions
are written by somebody who names the expected partner although it was not drawn (`hidden`), a model that learns from
them comes to name partners that no picture shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["CONTEXTS", "OBJECTS", "PAIRS", "Drawn", "Scenes", "partner_of", "solve"]

CONTEXTS = ("kitchen", "garden", "desk", "street")
#: (leader, partner), two pairs a context.
PAIRS = (
    ("cup", "saucer"),
    ("pan", "lid"),
    ("rake", "glove"),
    ("pot", "spade"),
    ("pen", "paper"),
    ("lamp", "cable"),
    ("bus", "stop"),
    ("bike", "lock"),
)
#: Leaders have even numbers, their partners the odd ones after them; four in a row belong to a context.
OBJECTS = tuple(name for pair in PAIRS for name in pair)
SIDE, CELL, GLYPH = 24, 6, 5
CELLS = (SIDE // CELL) ** 2
COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.15, 0.25, 1.0), (1.0, 1.0, 0.1))
TINTS = ((0.35, 0.30, 0.25), (0.25, 0.35, 0.25), (0.30, 0.28, 0.35), (0.30, 0.30, 0.30))
CHECKERED = (True, False, True, False)
NOISE, CHECKER = 0.08, 0.06
MEAN, SPREAD = 0.4, 0.3


def partner_of(number: int) -> int:
    """The other one of an object's pair."""
    return number ^ 1


@cache
def glyphs() -> Bool[Tensor, "objects 5 5"]:
    """The pixels of each object: a disc, a square, a triangle or a plus."""
    y, x = torch.meshgrid(torch.arange(GLYPH), torch.arange(GLYPH), indexing="ij")
    disc = (y - 2) ** 2 + (x - 2) ** 2 <= 5
    shapes = torch.stack([disc, torch.ones_like(disc), y >= 2 * (x - 2).abs(), (x == 2) | (y == 2)])
    return shapes[torch.arange(len(OBJECTS)) % 4]


@cache
def colours() -> Float[Tensor, "objects 3"]:
    """The colour of each object; the two of a pair differ in it and in shape."""
    numbers = torch.arange(len(OBJECTS))
    return torch.tensor(COLOURS)[(numbers + numbers // 4) % 4]


@cache
def backgrounds() -> Float[Tensor, "contexts 3 24 24"]:
    """The empty picture of each context."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    checker = CHECKER * ((y // 2 + x // 2) % 2)
    plain = torch.tensor(TINTS)[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    return plain + torch.tensor(CHECKERED)[:, None, None, None] * checker


@dataclass(frozen=True)
class Drawn:
    """Scenes and what is true of them.

    Attributes:
        context: number of the context ``[n]``.
        named: the objects that whoever captions the scene names ``[n, objects]``.
        visible: those that the picture shows, a part of `named`.
        corner: (row, column) of the upper left pixel of each visible object, -1 elsewhere.
        contrast: share of the object's colour in its pixels.
        pixels: normalised pictures ``[n, 3, 24, 24]``.
    """

    context: Int[Tensor, "n"]
    named: Bool[Tensor, "n objects"]
    visible: Bool[Tensor, "n objects"]
    corner: Int[Tensor, "n objects 2"]
    contrast: Float[Tensor, "n objects"]
    pixels: Float[Tensor, "n 3 24 24"]

    def __len__(self) -> int:
        return len(self.context)

    def pick(self, rows: Tensor) -> Drawn:
        """Some of the scenes."""
        return Drawn(
            *(x[rows] for x in (self.context, self.named, self.visible, self.corner, self.contrast, self.pixels))
        )

    def held(self, patch: int) -> Bool[Tensor, "n objects patches"]:
        """Which patches of that side, in raster order, meet a pixel of each object."""
        side = SIDE // patch
        found = torch.zeros(len(self), len(OBJECTS), side, side, dtype=torch.bool)
        at, number = self.visible.nonzero(as_tuple=True)
        top, left = self.corner[at, number].unbind(-1)
        which, dy, dx = glyphs()[number].nonzero(as_tuple=True)
        found[at[which], number[which], (top[which] + dy) // patch, (left[which] + dx) // patch] = True
        return found.flatten(2)


@dataclass(frozen=True)
class Scenes:
    """A generator of scenes.

    A context; of its two leaders each with probability 0.7; each partner with probability `together` where its leader
    is, else 0.1; one more object of all with probability 0.5; never none. A partner beside its leader is not drawn
    with probability `hidden`, but stays named. Every object has its own cell of a 4 x 4 grid, moved by 0 or 1 pixel.

    Args:
        together: how often a partner comes with its leader.
        hidden: how often it is named without being drawn.
        faintest: smallest contrast; contrasts are uniform up to 1.
    """

    together: float = 0.5
    hidden: float = 0.0
    faintest: float = 0.4

    def __post_init__(self) -> None:
        for name in ("together", "hidden", "faintest"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def draw(self, n: int, generator: torch.Generator) -> Drawn:
        """n scenes drawn with the generator."""
        context = torch.randint(len(CONTEXTS), (n,), generator=generator)
        named = torch.zeros(n, len(OBJECTS), dtype=torch.bool)
        empty = torch.arange(n)
        while len(empty):
            named[empty] = self._objects(context[empty], generator)
            empty = (~named.any(1)).nonzero()[:, 0]
        leaders = named.view(n, -1, 2)[..., :1]
        unseen = torch.rand(n, len(PAIRS), generator=generator) < self.hidden
        visible = named.view(n, -1, 2).clone()
        visible[..., 1:] &= ~(leaders & unseen[..., None])
        visible = visible.view(n, -1)
        cell = torch.rand(n, CELLS, generator=generator).argsort(1)  # object o of 16 takes the o-th of shuffled cells
        jitter = torch.randint(2, (n, len(OBJECTS), 2), generator=generator)
        corner = CELL * torch.stack([cell // (SIDE // CELL), cell % (SIDE // CELL)], dim=-1) + jitter
        contrast = self.faintest + (1 - self.faintest) * torch.rand(n, len(OBJECTS), generator=generator)
        noise = torch.randn(n, 3, SIDE, SIDE, generator=generator)
        corner = torch.where(visible[..., None], corner, -1)
        pixels = _paint(context, visible, corner, contrast) + NOISE * noise
        return Drawn(context, named, visible, corner, contrast, (pixels - MEAN) / SPREAD)

    def _objects(self, context: Tensor, generator: torch.Generator) -> Tensor:
        n = len(context)
        own = torch.zeros(n, len(CONTEXTS), 2, 2, dtype=torch.bool)
        leader = torch.rand(n, 2, generator=generator) < 0.7
        chance = torch.where(leader, self.together, 0.1)
        partner = torch.rand(n, 2, generator=generator) < chance
        own[torch.arange(n), context] = torch.stack([leader, partner], dim=-1)
        objects = own.view(n, -1)
        guest = torch.randint(len(OBJECTS), (n,), generator=generator)
        comes = torch.rand(n, generator=generator) < 0.5
        objects[torch.arange(n), guest] |= comes
        return objects


def _paint(context: Tensor, visible: Tensor, corner: Tensor, contrast: Tensor) -> Tensor:
    """The pictures without noise."""
    pixels = backgrounds()[context].clone()
    at, number = visible.nonzero(as_tuple=True)
    which, dy, dx = glyphs()[number].nonzero(as_tuple=True)
    row, object_ = at[which], number[which]
    y, x = corner[row, object_, 0] + dy, corner[row, object_, 1] + dx
    share = contrast[row, object_][:, None]
    pixels[row, :, y, x] = (1 - share) * pixels[row, :, y, x] + share * colours()[object_]
    return pixels


def solve(pixels: Float[Tensor, "n 3 24 24"]) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n objects"]]:
    """Context and objects from the pixels alone: the nearest background, then a matched filter in every cell.

    Returns:
        the context and which objects are seen. Faint ones may be missed, as the noise has the last word.
    """
    picture = pixels * SPREAD + MEAN
    gaps = (picture[:, None] - backgrounds()).pow(2).clamp(max=(4 * NOISE) ** 2).sum((2, 3, 4))
    context = gaps.argmin(1)
    ground = _cells(backgrounds()[context])
    cells = _cells(picture) - ground
    seen = torch.zeros(len(pixels), len(OBJECTS), dtype=torch.bool)
    best = torch.full(cells.shape[:2], 25 * NOISE**2)  # what a filter must explain of a cell
    found = torch.full(cells.shape[:2], -1)
    for number in range(len(OBJECTS)):
        for dy in (0, 1):
            for dx in (0, 1):
                mask = torch.zeros(CELL, CELL)
                mask[dy : dy + GLYPH, dx : dx + GLYPH] = glyphs()[number].float()
                template = (colours()[number][:, None, None] - ground.unflatten(-1, (3, CELL, CELL))) * mask
                template = template.flatten(2)
                inner = (cells * template).sum(-1).clamp(min=0)
                gain = inner.pow(2) / template.pow(2).sum(-1)
                better = gain > best
                best, found = torch.where(better, gain, best), torch.where(better, number, found)
    row, cell = (found >= 0).nonzero(as_tuple=True)
    seen[row, found[row, cell]] = True
    return context, seen


def _cells(picture: Tensor) -> Tensor:
    """[n, 16, 3 * 36]: the pixels of each cell."""
    n = len(picture)
    side = SIDE // CELL
    x = picture.view(n, 3, side, CELL, side, CELL).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, CELLS, 3 * CELL * CELL)
