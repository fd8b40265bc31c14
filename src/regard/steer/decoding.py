"""Decoding rules that look at more than probabilities: saliency-guided rejection sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.steer.saliency import token_saliency
from regard.watch.anatomy import Anatomy
from regard.watch.places import find_logits

__all__ = ["Rejection", "saliency_sampling"]


@dataclass(frozen=True)
class Rejection:
    """What `saliency_sampling` gives.

    Attributes:
        words: the new tokens; after `eos` the padding.
        saliency: of each token that was taken, [batch, words]; NaN for padding.
        rejected: how many draws were turned down, a sample.
        fell_back: how many tokens were taken for want of an accepted draw, a sample.
    """

    words: Int[Tensor, "batch words"]
    saliency: Float[Tensor, "batch words"]
    rejected: Int[Tensor, "batch"]
    fell_back: Int[Tensor, "batch"] = field(repr=False)


def saliency_sampling(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: Sequence[int],
    eos: int,
    pad: int,
    most: int,
    top: int = 5,
    alpha: float | int = 0.6,
    window: int = 5,
    tries: int = 3,
    never: Sequence[int] = (),
    generator: torch.Generator | None = None,
    anatomy: Anatomy | None = None,
) -> Rejection:
    """SGRS (arXiv 2601.20279): sample among the `top` words and take what rests enough on the output so far.

    A draw c from the `top` words (their probabilities, renormalised) is taken if ``S(c) >= alpha *`` the mean S of the
    last `window` tokens taken, S as in `token_saliency`; after `tries` draws the one of the `top` words with the
    largest S. The first tokens, before there is a saliency to compare with, are taken as drawn.

    Gradients through a cache are not to be had, so every step reads the whole sequence, once a candidate.

    Args:
        model: a causal model called with ``inputs``.
        inputs: the prompts, ``input_ids`` all of one length, and whatever else the model is called with.
        layers: whose saliency counts.
        eos, pad: ids of the last word and of padding.
        most: words at most.
        alpha: 0 accepts every draw.
        never: words that are not drawn, such as those that stand for pictures.
        generator: of the draws, on the CPU.
        anatomy: the model's parts.
    """
    if top < 1 or window < 1 or tries < 1 or most < 1:
        raise ValueError(f"top, window, tries and most must be at least 1, got {top}, {window}, {tries}, {most}")
    ids = inputs["input_ids"]
    prompt, batch = ids.shape[1], len(ids)
    taken: list[Tensor] = []
    salient: list[Tensor] = []
    done = torch.zeros(batch, dtype=torch.bool)
    rejected, fell_back = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    while len(taken) < most and not bool(done.all()):
        now = {**inputs, "input_ids": ids}
        with torch.no_grad():
            logits = find_logits(model(**now, use_cache=False))[0][:, -1].float()
        logits[:, list(never)] = float("-inf")
        best = logits.topk(min(top, logits.shape[-1]), dim=-1)
        candidates, chance = best.indices, best.values.softmax(-1).cpu()
        each = token_saliency(model, now, candidates, prompt=prompt, layers=layers, anatomy=anatomy).cpu()
        before = salient[1:][-window:]  # the first token has no output before it
        least = alpha * torch.stack(before).nanmean(0) if before else torch.zeros(batch)
        choice = torch.full((batch,), -1)
        for _ in range(tries):
            draw = torch.multinomial(chance, 1, generator=generator)[:, 0]
            open_ = choice < 0
            good = each.gather(1, draw[:, None])[:, 0] >= least
            choice = torch.where(open_ & good, draw, choice)
            rejected += open_ & ~good & ~done
        fell_back += (choice < 0) & ~done
        choice = torch.where(choice < 0, each.argmax(-1), choice)
        word = candidates.cpu().gather(1, choice[:, None])[:, 0]
        salient.append(torch.where(done, torch.nan, each.gather(1, choice[:, None])[:, 0]))
        taken.append(torch.where(done, pad, word))
        done = done | (word == eos)
        ids = torch.cat([ids, taken[-1][:, None].to(ids)], dim=1)
    return Rejection(torch.stack(taken, 1), torch.stack(salient, 1), rejected, fell_back)
