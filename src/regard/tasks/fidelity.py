"""How near a changed model's samples stay to those of the model as it is, from the same noise."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.models.dit import VideoDiT, sample

__all__ = ["Fidelity", "beside_dense", "noise_for", "psnr"]


class Fidelity(NamedTuple):
    """Samples of the model as it is and of the changed one, and the PSNR of each video in dB."""

    dense: Float[Tensor, "batch channels frames height width"]
    changed: Float[Tensor, "batch channels frames height width"]
    psnr: Float[Tensor, "batch"]


def psnr(
    x: Float[Tensor, "batch *video"], reference: Float[Tensor, "batch *video"], peak: float | int = 2.0
) -> Float[Tensor, "batch"]:
    """``10 log10(peak^2 / mean (x - reference)^2)`` of each sample, in dB; infinite where they are equal.

    Both are clamped to ``[-peak / 2, peak / 2]`` first, as they are when shown.

    Args:
        x, reference: videos around 0.
        peak: largest less smallest value, 2 for videos in [-1, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != reference.shape:
        raise ValueError(f"x must have the shape of reference, {tuple(reference.shape)}, got {tuple(x.shape)}")
    bound = peak / 2
    error = (x.clamp(-bound, bound).double() - reference.clamp(-bound, bound).double()).square().flatten(1).mean(1)
    return (10 * (peak**2 / error).log10()).to(torch.float32)


def noise_for(n: int, shape: tuple[int, int, int], seed: int) -> Float[Tensor, "n 1 frames height width"]:
    """The noise of n videos of (frames, height, width) pixels, each drawn with a seed of its own.

    Video i has the same noise whatever n is.
    """
    drawn = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(n)]
    return torch.stack(drawn)


def beside_dense(
    model: VideoDiT,
    changed: AbstractContextManager[object],
    noise: Float[Tensor, "batch channels frames height width"],
    words: Int[Tensor, "batch words"],
    *,
    dense: Float[Tensor, "batch channels frames height width"] | None = None,
    steps: int = 20,
    guidance: float | int = 2.0,
    shift: float | int = 3.0,
) -> Fidelity:
    """Samples the model as it is and then inside ``changed``, both from the same noise.

    Args:
        model: the video model.
        changed: what changes it while open: `regard.attend_with(model, ...)`, `plan.applied(model)`.
        noise, words: as in `regard.models.dit.sample`.
        dense: the samples of the model as it is, where they were made before with the same arguments.
        steps, guidance, shift: as in `regard.models.dit.sample`.
    """
    if dense is None:
        dense = sample(model, noise, words, steps=steps, guidance=guidance, shift=shift)
    with changed:
        other = sample(model, noise, words, steps=steps, guidance=guidance, shift=shift)
    return Fidelity(dense, other, psnr(other, dense))
