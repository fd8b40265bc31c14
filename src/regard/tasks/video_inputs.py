"""What a video model is watched on: a true video of a prompt, noised to several times of the flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.models.dit import VideoDiT
from regard.patterns import Blocks
from regard.tasks.fidelity import noise_for
from regard.tasks.moving_digits import MOST, Videos, prompt
from regard.tasks.video import SHAPE, SIZES
from regard.watch.atlas import Atlas
from regard.watch.recorder import watch
from regard.watch.settings import Watch

__all__ = ["TIMES", "held_out", "inputs_of", "run_noised", "watch_video"]

#: Times of the flow at which heads are judged; at pure noise there is nothing to see.
TIMES = (0.8, 0.6, 0.4, 0.2)


def held_out(n: int, seed: int, words: Int[Tensor, "n words"] | None = None) -> Videos:
    """n held-out videos at the trained size; `words` fixes what is seen."""
    return SIZES["long"].task(SHAPE, MOST, "test").batch(n, torch.Generator().manual_seed(seed), words)


def run_noised(
    model: VideoDiT,
    x: Float[Tensor, "batch 1 frames height width"],
    words: Int[Tensor, "batch words"],
    times: Sequence[float],
    seed: int,
) -> None:
    """Calls the model on the videos noised to each of the times, for whoever looks on."""
    device = next(model.parameters()).device
    noise = noise_for(len(x), (x.shape[2], x.shape[3], x.shape[4]), seed).to(device)
    x, words = x.to(device), words.to(device)
    for t in times:
        model((1 - t) * x + t * noise, torch.full((len(x),), float(t), device=device), words)


def inputs_of(text: str, t: float | int = 0.4, *, seed: int = 0) -> dict[str, Tensor]:
    """``model(**inputs_of("3 7 square"))``: a held-out video of the prompt at the trained size, noised to time t.

    Raises:
        ValueError: a word that is no object's name, or more than three of them.
    """
    x, words = held_out(1, seed, prompt(text)[None])
    return {"x": (1 - t) * x + t * noise_for(1, SHAPE, seed), "t": torch.tensor([float(t)]), "words": words}


@torch.no_grad()
def watch_video(
    model: VideoDiT,
    x: Float[Tensor, "batch 1 frames height width"],
    words: Int[Tensor, "batch words"],
    statistics: str | Sequence[str] = "default",
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    **how: Any,
) -> Atlas:
    """The atlas of all self-attention on videos noised to each of the times.

    The period of the role "multi-diagonal" is the tokens of a frame; the role "block" is the own frame.
    """
    _, rows, columns = model.config.grid((x.shape[2], x.shape[3], x.shape[4]))
    frame = rows * columns
    settings = Watch(statistics, period=frame, templates={"block": Blocks(frame)}, layers=("*self_attention",), **how)
    with watch(model, statistics=settings) as watched:
        run_noised(model, x, words, times, seed)
    return watched.atlas
