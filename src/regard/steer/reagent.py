"""ReAGent: token importance for one prediction by repeated random replacement (Zhao & Shan, arXiv 2402.00794)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.watch.places import find_logits
from regard.watch.probe import run

__all__ = ["Sampler", "bigrams", "reagent"]

Sampler = Callable[[Tensor, torch.Generator], Tensor]


def bigrams(ids: Int[Tensor, "rows length"], vocabulary: int) -> Sampler:
    """A sampler that proposes, for every place, a token that followed the place's predecessor in `ids`.

    By the frequencies there; after a token that no other followed, any token of `ids`. The first place keeps its own.
    """
    counts = torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
    counts.view(-1).index_add_(
        0, (ids[:, :-1] * vocabulary + ids[:, 1:]).flatten().cpu(), torch.ones(ids[:, 1:].numel(), dtype=counts.dtype)
    )
    seen = torch.bincount(ids.flatten().cpu(), minlength=vocabulary).to(counts)
    follow = torch.where(counts.sum(1, keepdim=True) > 0, counts, seen)

    def sample(tokens: Tensor, generator: torch.Generator) -> Tensor:
        before = tokens[:, :-1].cpu()
        drawn = torch.multinomial(follow[before.flatten()], 1, generator=generator).view(before.shape)
        return torch.cat([tokens[:, :1], drawn.to(tokens.device)], dim=1)

    return sample


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

    def predict(tokens: Tensor, some: Tensor | None = None) -> Tensor:
        """The distribution of these samples; zeros for the others, which are not run."""
        if some is None or bool(some.all()):
            logits = find_logits(run(model, {**inputs, "input_ids": tokens}))[0]
            return logits[:, pos].double().softmax(-1)
        own = {name: x[some] if isinstance(x, Tensor) and x.shape[:1] == (batch,) else x for name, x in inputs.items()}
        logits = find_logits(run(model, {**own, "input_ids": tokens[some]}))[0]
        out = torch.zeros(batch, logits.shape[-1], dtype=torch.float64, device=ids.device)
        out[some] = logits[:, pos].double().softmax(-1)
        return out

    plain = predict(ids)[rows, target]
    total, stopped_runs = torch.zeros(batch, length, dtype=torch.float64, device=ids.device), torch.zeros(batch)
    every = torch.zeros_like(total)
    for _ in range(runs):
        a = uniform().double()
        done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        for step in range(steps):
            replaced = uniform() < ratio
            gap = plain - predict(torch.where(replaced, sample(), ids), ~done)[rows, target]
            # A gap of exactly 1 would be infinite.
            change = torch.logit((gap.clamp(-1 + 1e-6, 1 - 1e-6) + 1) / 2)[:, None]
            a = torch.where(done[:, None], a, a + torch.where(replaced, change, -change))
            if (step + 1) % check == 0:
                top = torch.zeros_like(replaced).scatter(1, a.topk(min(keep, length), dim=1).indices, True)
                likely = predict(torch.where(top, ids, sample()), ~done).topk(k, dim=-1).indices
                done |= (likely == target[:, None]).any(-1)
                if bool(done.all()):
                    break
        importance = a.softmax(-1)
        every += importance
        total += importance * done[:, None]
        stopped_runs += done.cpu()
    count = stopped_runs.to(total)[:, None]
    return torch.where(count > 0, total / count.clamp_min(1), every / runs).float()
