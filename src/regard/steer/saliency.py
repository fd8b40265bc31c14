"""How much a token to come rests on the output before it: weights times their gradient, in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.steer.flow import attention_x_grad
from regard.watch.anatomy import Anatomy
from regard.watch.scan import stack

__all__ = ["token_saliency"]


def token_saliency(
    model: nn.Module,
    inputs: Mapping[str, Any],
    candidates: Int[Tensor, "batch some"],
    *,
    prompt: int,
    layers: Sequence[int],
    anatomy: Anatomy | None = None,
) -> Float[Tensor, "batch some"]:
    """Saliency of the earlier output for each candidate of the next token (arXiv 2601.20279).

    ``S(c) = mean over layers and output keys j of s_j``, ``s = |P_i * d(-log p(c)) / dP_i|`` averaged over heads and
    divided by its norm over all keys; i the last row, which predicts c. Output keys are the columns from `prompt` on.
    The predicting row is that of the token before c: the candidate's own row has no gradient.

    Args:
        model: called with ``inputs``; its logits are [batch, length, words].
        inputs: the whole sequence so far, without a cache and without padding on the right.
        candidates: words that may come next.
        prompt: tokens before the first output token.
        layers: of the anatomy, those that count (the paper: 6 to 8 of 32).
        anatomy: the model's parts, where they cannot be found.

    Returns:
        numbers in [0, 1]; 0 where there is no output yet.
    """
    batch, some = candidates.shape
    if not layers:
        raise ValueError("layers must name at least one layer")
    wanted = candidates.T.flatten()  # copy by copy, as `stack` lays them

    def unlikely(logits: Tensor) -> Tensor:
        return -logits[:, -1].log_softmax(-1).gather(-1, wanted.to(logits.device)[:, None])[:, 0]

    copies = stack(inputs, some, batch)
    with torch.enable_grad():
        whole = attention_x_grad(model, copies, unlikely, rows=-1, anatomy=anatomy)[list(layers), :, :, 0]
    rows = whole.mean(2)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    output = rows[..., prompt:]
    found = output.mean((0, 2)) if output.shape[-1] else torch.zeros(batch * some, device=rows.device)
    return found.view(some, batch).T
