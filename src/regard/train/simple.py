"""Training of a small model in memory, as studies need it: AdamW, a rate that may warm up and decay, a loss curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.train.trainer import Recipe, Trainer


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[torch.Generator], Any],
    steps: int,
    lr: float = 3e-3,
    seed: int = 0,
    *,
    warmup: int = 0,
    decay: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """Steps a model with AdamW (betas 0.9, 0.95) and returns the loss of every step; the model is left in eval mode.

    The batch of step s is drawn with a CPU generator that depends on (seed, s) alone, and dropout starts from the
    seed, so equal models given equal arguments end equal (same machine, same threads). The global generators are left
    as they were. Weights are the caller's to seed.

    Args:
        model: trained in place.
        loss: of a model and a batch, a scalar.
        batches: draws a batch with a generator, on the model's device.
        steps: optimizer steps.
        lr: greatest learning rate.
        seed: of the batches and of dropout.
        warmup, decay: steps of the linear rise and of the linear fall at the end; 0 keeps the rate constant.
        weight_decay: decoupled, on matrices that are not embeddings.
        clip: greatest norm of the gradient.
        on_step: told (step, {"loss", "grad_norm", "rate", "seconds"}) after every step.

    Raises:
        FloatingPointError: the loss is not finite.
    """

    def drawn(step: int) -> Any:
        return batches(torch.Generator().manual_seed(seed * 1_000_003 + step))

    recipe = Recipe(steps, lr, warmup=warmup, decay=decay, weight_decay=weight_decay, clip=clip, muon=False)
    trainer = Trainer(model, drawn, recipe, None, loss=loss, on_step=on_step)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
        torch.manual_seed(seed)
        return [entry["loss"] for entry in trainer.run()]
