"""ReAGent: token importance for one prediction by repeated random replacement (Zhao & Shan, arXiv 2402.00794)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.watch.places import find_logits
from regard.watch.probe import run

__all__ = ["Sampler", "reagent"]

Sampler = Callable[[Tensor, torch.Generator], Tensor]


@torch.no_grad()
def reagent(
    model: nn.Module,
    inputs: dict[str, Any],
    target: Int[Tensor, "batch"],
    sampler: Sampler,
    *,
    pos: int = -1,
    ratio: float = 0.3,
    k: int = 3,
    keep: int = 8,
    steps: int = 3000,
    runs: int = 5,
    check: int = 1,
    seed: int = 0,
) -> Float[Tensor, "batch length"]:
    """Importance of each token of `input_ids` for p(target | x), by forward passes alone; rows sum to 1.

    A run starts at `a ~ U(0, 1)` a token. A step replaces each token with probability `ratio` by a sample, and with
    `D = p(target | x) - p(target | x')` adds `logit((D + 1) / 2)` to the replaced tokens' a and takes it from the
    kept ones'. It stops when the target is among the model's `k` most likely with all but the `keep` tokens of
    largest a replaced. The scores are the mean of softmax(a) over the runs that stopped, or over all if none did.

    Args:
        inputs: with `input_ids` [batch, length] and no padding.
        target: the token whose prediction is explained.
        sampler: (ids [batch, length], generator) -> other ids of this shape, a proposal for every place.
        pos: the column that predicts it.
        ratio, k, keep, steps, runs: as above.
        check: how many steps between two looks at the stopping rule.
        seed: of everything drawn.

    Raises:
        ValueError: padding in the inputs, or a sampler that gives another shape.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError("inputs must hold no padding: every token would be replaced, padding too")
    batch, length = ids.shape
    rows = torch.arange(batch, device=ids.device)
    generator = torch.Generator().manual_seed(seed)

    def sample() -> Tensor:
        other = sampler(ids, generator).to(ids.device)
        if other.shape != ids.shape:
            raise ValueError(f"sampler must give ids of shape {tuple(ids.shape)}, got {tuple(other.shape)}")
        return other

    def uniform() -> Tensor:
        return torch.rand(batch, length, generator=generator).to(ids.device)

    def predict(tokens: Tensor) -> Tensor:
        logits = find_logits(run(model, {**inputs, "input_ids": tokens}))[0]
        return logits[:, pos].double().softmax(-1)

    plain = predict(ids)[rows, target]
    total, stopped_runs = torch.zeros(batch, length, dtype=torch.float64, device=ids.device), torch.zeros(batch)
    every = torch.zeros_like(total)
    for _ in range(runs):
        a = uniform().double()
        done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        for step in range(steps):
            replaced = uniform() < ratio
            gap = plain - predict(torch.where(replaced, sample(), ids))[rows, target]
            # A gap of exactly 1 would be infinite.
            change = torch.logit((gap.clamp(-1 + 1e-6, 1 - 1e-6) + 1) / 2)[:, None]
            a = torch.where(done[:, None], a, a + torch.where(replaced, change, -change))
            if (step + 1) % check == 0:
                top = torch.zeros_like(replaced).scatter(1, a.topk(min(keep, length), dim=1).indices, True)
                likely = predict(torch.where(top, ids, sample())).topk(k, dim=-1).indices
                done |= (likely == target[:, None]).any(-1)
                if bool(done.all()):
                    break
        importance = a.softmax(-1)
        every += importance
        total += importance * done[:, None]
        stopped_runs += done.cpu()
    count = stopped_runs.to(total)[:, None]
    return torch.where(count > 0, total / count.clamp_min(1), every / runs).float()
