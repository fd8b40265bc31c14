"""Continuations drawn from a model with random numbers of the caller's, so that runs can be compared draw by draw."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: Any,
    prompt: Int[Tensor, "n length"],
    uniform: Float[Tensor, "n steps"],
    *,
    temperature: float | int = 1.0,
    among: Bool[Tensor, "vocab"] | None = None,
) -> Int[Tensor, "n steps"]:
    """What a causal model writes after prompts of equal length.

    Step t of row i takes the first token at which the cumulative probability exceeds `uniform[i, t]`: rows that share
    their numbers differ by their probabilities alone. Run inside `intervene`, edits act at every step.

    Args:
        model: a transformers causal model with a cache.
        prompt: token ids.
        uniform: numbers in [0, 1), such as `torch.rand` gives; one column a token.
        temperature: the scores are divided by it.
        among: the tokens that may come; the others' probability goes to these.

    Raises:
        ValueError: a temperature that is not positive, or other rows in `uniform` than in `prompt`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(uniform) != len(prompt):
        raise ValueError(f"uniform must have a row a prompt, {len(prompt)}, got {len(uniform)}")
    ids, cache, drawn = prompt, None, []
    for numbers in uniform.to(prompt.device).unbind(1):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        scores, cache = out.logits[:, -1].double() / temperature, out.past_key_values
        if among is not None:
            scores = scores.masked_fill(~among.to(scores.device), -torch.inf)
        total = scores.softmax(-1).cumsum(-1)
        # Scaled by the last sum, which rounding may leave below 1; the last token with any mass at most.
        ids = torch.searchsorted(total, (numbers.double() * total[:, -1])[:, None], right=True)
        drawn.append(ids[:, 0])
    return torch.stack(drawn, 1) if drawn else prompt[:, :0]
