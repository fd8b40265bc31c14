"""Small images with known answers: two marks on a blank map, and scikit-learn's digits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
BLANK, DIGIT_CLASSES = 16, 10
Split = Literal["train", "test"]


class Images(NamedTuple):
    """Images and what is asked: a class each, or a class a token (-100: not asked)."""

    x: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, "batch"] | Int[Tensor, "batch height width"]

    def to(self, device: str | torch.device) -> Images:
        """On another device."""
        return Images(self.x.to(device), self.labels.to(device))


def asked_loss(model: Any, images: Images) -> Tensor:
    """Cross-entropy of what is asked; the model gives logits ``[batch, classes]`` or ``[batch, classes, h, w]``."""
    return torch.nn.functional.cross_entropy(model(images.x), images.labels, ignore_index=IGNORED)


@torch.no_grad()
def asked_accuracy(model: Any, images: Images, batch: int = 256) -> float:
    """Share of what is asked that the model gets right."""
    parts = zip(images.x.split(batch), images.labels.split(batch), strict=True)
    right = torch.cat([(model(x).argmax(1) == labels)[labels != IGNORED] for x, labels in parts])
    return float(right.double().mean())


@dataclass(frozen=True)
class SameMark:
    """Two coloured marks on a blank map; at each mark: has the other one the same colour (1) or another (0)?

    Balanced: half of the images have equal colours, and the places are drawn without looking at the colours. So nothing
    that only one mark's window holds tells the answer, and 0.5 is chance for a model whose windows never meet.
    Channel c is 1 at marks of colour c. Labels are ignored where there is no mark.

    Args:
        shape: (height, width).
        colours: at least 2.
        window: side of the windows.
        apart: the marks lie in different windows; False: both in one (the control, which windows can solve).
    """

    shape: tuple[int, int] = (8, 8)
    colours: int = 4
    window: int = 4
    apart: bool = True

    def __post_init__(self) -> None:
        if self.colours < 2:
            raise ValueError(f"colours must be at least 2, got {self.colours}")
        if not 1 <= self.window <= min(self.shape):
            raise ValueError(f"window must be in 1..{min(self.shape)}, got {self.window}")
        if self.apart and self.window >= max(self.shape):
            raise ValueError(f"window must leave at least two windows of {self.shape} to be apart, got {self.window}")
        if not self.apart and self.window < 2:
            raise ValueError(f"window must be at least 2 to hold both marks, got {self.window}")

    def batch(self, n: int, generator: torch.Generator) -> Images:
        """n images drawn with the generator."""
        height, width = self.shape
        window = self._windows()
        first = torch.randint(height * width, (n,), generator=generator)
        same_window = window[first][:, None] == window[None]
        allowed = ~same_window if self.apart else same_window
        allowed[torch.arange(n), first] = False
        alone = ~allowed.any(1)  # a window of one token, at a border that the window does not divide
        if bool(alone.any()):
            raise ValueError(
                f"window must leave every token another one to pair with in {self.shape}, got {self.window}"
            )
        second = torch.multinomial(allowed.float(), 1, generator=generator)[:, 0]
        equal = torch.randperm(n, generator=generator) < n // 2
        colour = torch.randint(self.colours, (n,), generator=generator)
        step = torch.randint(1, self.colours, (n,), generator=generator)
        other = torch.where(equal, colour, (colour + step) % self.colours)
        x = torch.zeros(n, self.colours, height * width)
        labels = torch.full((n, height * width), IGNORED)
        row = torch.arange(n)
        for place, mark in ((first, colour), (second, other)):
            x[row, mark, place] = 1.0
            labels[row, place] = equal.long()
        return Images(x.unflatten(2, self.shape), labels.unflatten(1, self.shape))

    def solve(self, image: Float[Tensor, "channels height width"]) -> Int[Tensor, "height width"]:
        """The labels of one image, from the image alone."""
        marks = image.flatten(1).nonzero()  # (colour, place) of the two
        labels = torch.full((image[0].numel(),), IGNORED)
        labels[marks[:, 1]] = int(marks[0, 0] == marks[1, 0])
        return labels.unflatten(0, tuple(image.shape[1:]))

    def _windows(self) -> Tensor:
        """The window of each place, row-major."""
        rows, columns = (torch.arange(n) // self.window for n in self.shape)
        return (rows[:, None] * (int(columns.max()) + 1) + columns[None]).flatten()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise ImportError(
            "digits are those that scikit-learn ships: pip install 'regard[vision]' (or pip install scikit-learn)"
        ) from missing
    found: Any = load_digits()
    return torch.from_numpy(found.images).float(), torch.from_numpy(found.target).long()


def digits(split: Split) -> Images:
    """scikit-learn's 8 x 8 digits in [0, 1], ``[n, 1, 8, 8]``, with their classes: every fifth one is test.

    Raises:
        ImportError: scikit-learn is not installed; the message says how to install it.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    images, classes = _digits()
    chosen = (torch.arange(len(images)) % 5 == 0) == (split == "test")
    return Images(images[chosen][:, None] / BLANK, classes[chosen])


def normalised(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [0, 1] as image models of transformers take them by default: ``(x - 0.5) / 0.5``."""
    return (x - 0.5) / 0.5


def jitter(images: Images, generator: torch.Generator, most: int = 1) -> Images:
    """Each image moved by -most..most pixels down and right, on its own; what comes in is blank (0)."""
    x = images.x
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (most,) * 4)
    place = torch.randint(2 * most + 1, (2, n, 1), generator=generator)
    rows, columns = place[0] + torch.arange(height), place[1] + torch.arange(width)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return Images(moved.permute(0, 3, 1, 2).contiguous(), images.labels)


def nearest_digit(x: Float[Tensor, "n 1 8 8"], known: Images | None = None) -> Int[Tensor, "n"]:
    """The solver: the class of the training digit at the least Euclidean distance, from the pixels alone."""
    known = digits("train") if known is None else known
    return known.labels[torch.cdist(x.flatten(1), known.x.flatten(1)).argmin(1)]


def quantised(levels: int, split: Split) -> Int[Tensor, "n 1 8 8"]:
    """The digits as whole levels 0..levels-1, ``floor(pixel * levels / 17)`` of their 17 grey values."""
    if not 2 <= levels <= BLANK + 1:
        raise ValueError(f"levels must be in 2..{BLANK + 1}, got {levels}")
    return (digits(split).x * BLANK).round().long() * levels // (BLANK + 1)


@dataclass(frozen=True)
class Digits:
    """The digits as they are, or each at a random place of a larger blank image.

    Args:
        split: "train" or "test".
        size: side of the image, at least 8.
    """

    split: Split = "train"
    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size must be at least 8, the side of a digit, got {self.size}")

    def batch(self, n: int, generator: torch.Generator) -> Images:
        """n images drawn with replacement."""
        found = digits(self.split)
        index = torch.randint(len(found.x), (n,), generator=generator)
        return self._placed(Images(found.x[index], found.labels[index]), generator)

    def all(self, generator: torch.Generator) -> Images:
        """Every digit of the split once, in order; the generator draws the places."""
        return self._placed(digits(self.split), generator)

    def _placed(self, images: Images, generator: torch.Generator) -> Images:
        if self.size == 8:
            return images
        n = len(images.x)
        place = torch.randint(self.size - 7, (2, n, 1), generator=generator) + torch.arange(8)
        x = torch.zeros(n, 1, self.size, self.size)
        x[torch.arange(n)[:, None, None], 0, place[0][:, :, None], place[1][:, None, :]] = images.x[:, 0]
        return Images(x, images.labels)
