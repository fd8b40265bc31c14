"""Windows that point at each other: one token names a neighbouring window, and its class is asked for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.tasks.vision import IGNORED, Images

__all__ = ["STEPS", "WindowPointer"]

#: What a pointer names: (rows, columns) of windows to go, its own window among them.
STEPS = tuple(itertools.product((-1, 0, 1), repeat=2))


@dataclass(frozen=True)
class WindowPointer:
    """A map of windows of a class each; in every window one token points at a window beside it, or at its own.

    Every token shows the class of its window (channel ``9 + class``). A random token of each window also shows one of
    the nine `STEPS` (channels 0 to 8), drawn among those that stay on the map; at this token the class of the window it
    points at is asked for, everywhere else nothing. Classes are uniform and independent of each other and of the
    pointers, so a model that never leaves the window is right with its own class and by chance else: `blind`.

    Args:
        shape: (height, width), divisible by the window.
        window: side of a window.
        classes: at least 2.
    """

    shape: tuple[int, int] = (16, 16)
    window: int = 4
    classes: int = 4

    def __post_init__(self) -> None:
        if self.window < 1 or any(n % self.window for n in self.shape):
            raise ValueError(f"window must divide both sides of {self.shape}, got {self.window}")
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(STEPS) + self.classes

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return self.shape[0] // self.window, self.shape[1] // self.window

    @property
    def blind(self) -> float:
        """The best expected accuracy without leaving the window."""
        own = 1 / self._stays().double().sum(-1)  # how often the pointer stays, and its own class is the answer
        return float((own + (1 - own) / self.classes).mean())

    def _stays(self) -> Tensor:
        """Which steps stay on the map, ``[rows, columns, 9]``."""
        rows, columns = (torch.arange(n) for n in self.windows)
        step = torch.tensor(STEPS)
        to = rows[:, None, None] + step[:, 0], columns[None, :, None] + step[:, 1]
        return (to[0] >= 0) & (to[0] < len(rows)) & (to[1] >= 0) & (to[1] < len(columns))

    def batch(self, n: int, generator: torch.Generator) -> Images:
        """n images drawn with the generator."""
        (rows, columns), w = self.windows, self.window
        kind = torch.randint(self.classes, (n, rows, columns), generator=generator)
        share = self._stays().float().flatten(0, 1)
        step = torch.multinomial(share, n, replacement=True, generator=generator).T.view(n, rows, columns)
        place = torch.randint(w * w, (n, rows, columns), generator=generator)
        which = torch.tensor(STEPS)[step]
        to_row, to_column = torch.arange(rows)[:, None] + which[..., 0], torch.arange(columns) + which[..., 1]
        answer = kind[torch.arange(n)[:, None, None], to_row, to_column]
        at_row, at_column = torch.arange(rows)[:, None] * w + place // w, torch.arange(columns) * w + place % w
        image = torch.arange(n)[:, None, None]
        x = torch.zeros(n, self.channels, *self.shape)
        shown = kind.repeat_interleave(w, 1).repeat_interleave(w, 2)
        x.scatter_(1, len(STEPS) + shown[:, None], 1.0)
        x[image, step, at_row, at_column] = 1.0
        labels = torch.full((n, *self.shape), IGNORED)
        labels[image, at_row, at_column] = answer
        return Images(x, labels)

    def solve(self, image: Float[Tensor, "channels height width"]) -> Int[Tensor, "height width"]:
        """The labels of one image, from the image alone."""
        labels = torch.full(self.shape, IGNORED)
        for step, row, column in image[: len(STEPS)].nonzero().tolist():
            down, right = STEPS[step]
            target = image[len(STEPS) :, row + down * self.window, column + right * self.window]
            labels[row, column] = int(target.argmax())
        return labels
