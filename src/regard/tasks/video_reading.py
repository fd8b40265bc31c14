"""What a video of moving digits shows, read from its pixels: how many objects, which, and whether they stay."""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import conv2d

from regard.tasks.moving_digits import SHAPES, SIDE, shapes
from regard.tasks.vision import digits

__all__ = ["counts", "kinds", "sharpness", "steadiness"]

#: A pixel of an object, in [-1, 1]; and the pixels that make one.
LEVEL, LEAST = -0.2, 6


def counts(x: Float[Tensor, "batch 1 frames height width"]) -> Int[Tensor, "batch frames"]:
    """Objects in each frame: components of bright pixels of at least `LEAST` pixels, gaps of one pixel bridged.

    Objects that touch count as one, so even true videos with several objects are not all read rightly.
    """
    from scipy.ndimage import binary_dilation, label

    found = torch.zeros(x.shape[0], x.shape[2], dtype=torch.long)
    bright = (x[:, 0] > LEVEL).numpy()
    for at in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        frame = bright[tuple(at)]
        parts, n = label(binary_dilation(frame, iterations=1), structure=[[1] * 3] * 3)
        sizes = torch.bincount(torch.from_numpy(parts[frame]).long(), minlength=n + 1)[1:]
        found[tuple(at)] = int((sizes >= LEAST).sum())
    return found


def _bright(x: Tensor) -> Tensor:
    """Objects alone in [0, 1]: what is darker than `LEVEL`, as a textured canvas, is black."""
    return torch.where(x > LEVEL, (x.clamp(-1, 1) + 1) / 2, 0.0)


@functools.cache
def _templates() -> tuple[Tensor, Tensor]:
    """Unit vectors of the training digits and the shapes as 8 x 8 kernels, and the word of each."""
    found = digits("train")
    glyphs = torch.cat([found.x[:, 0], shapes()])
    words = torch.cat([found.labels + 1, torch.arange(11, 11 + len(SHAPES))])
    return (glyphs / glyphs.flatten(1).norm(dim=1)[:, None, None])[:, None], words


def kinds(x: Float[Tensor, "batch 1 frames height width"]) -> Int[Tensor, "batch"]:
    """The word of the one object of each video: the class whose best template fits best, on average over the frames.

    Fit: the cosine of a template with the bright pixels under it, at the best place of those that hold at least half
    of the frame's bright energy.
    """
    kernels, words = _templates()
    said = []
    for video in x:
        frames = _bright(video[0, :, None])
        inner = conv2d(frames, kernels)
        energy = conv2d(frames.square(), torch.ones(1, 1, SIDE, SIDE))
        whole = frames.square().sum((1, 2, 3), keepdim=True)
        fit = torch.where(energy >= whole / 2, inner / energy.clamp(min=1e-6).sqrt(), -1.0).amax((2, 3))
        best = torch.full((len(frames), int(words.max()) + 1), -1.0)
        best.scatter_reduce_(1, words.expand(len(frames), -1), fit, "amax")
        said.append(best.mean(0).argmax())
    return torch.stack(said)


def steadiness(x: Float[Tensor, "batch 1 frames height width"], reach: int = 3) -> Float[Tensor, "batch"]:
    """How much each frame is the one before it, moved: the best cosine over moves of up to ``reach`` pixels, averaged.

    1 for one object away from the walls' bounces; a flickering object scores less.
    """
    frames = _bright(x[:, 0])
    now, after = frames[:, :-1], frames[:, 1:]
    moves = range(-reach, reach + 1)
    fits = [(now.roll((dy, dx), (2, 3)) * after).sum((2, 3)) for dy in moves for dx in moves]
    norms = now.square().sum((2, 3)).sqrt() * after.square().sum((2, 3)).sqrt()
    return (torch.stack(fits).amax(0) / norms.clamp(min=1e-6)).mean(1)


def sharpness(x: Float[Tensor, "batch 1 frames height width"]) -> Float[Tensor, "batch"]:
    """Gradient energy: the mean square of the differences between neighbouring pixels of a frame."""
    video = x.clamp(-1, 1)
    down = (video[..., 1:, :] - video[..., :-1, :]).square().flatten(1).mean(1)
    right = (video[..., :, 1:] - video[..., :, :-1]).square().flatten(1).mean(1)
    return down + right
