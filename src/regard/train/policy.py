"""Group-relative policy optimization of a small decoder: of several answers to a question, raise the better ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.models.decoder import Decoder
from regard.models.generate import generate
from regard.train.objectives import group_advantage, grpo_loss

__all__ = ["Policy", "grpo"]

Credit = Callable[[nn.Module, Tensor, torch.Generator], Tensor | None]
"""(model, sampled ids [batch, length], generator) -> what each response token's advantage is multiplied by, or None."""


@dataclass(frozen=True)
class Policy:
    """How `grpo` steps.

    Args:
        steps: updates; each draws ``prompts * group`` answers and uses them once.
        prompts, group: questions of a step, answers to each.
        lr: of AdamW without decay.
        clip: greatest norm of the gradient.
        temperature: of sampling.
    """

    steps: int = 200
    prompts: int = 16
    group: int = 8
    lr: float = 3e-4
    clip: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.prompts < 1 or self.group < 2:
            raise ValueError(f"steps >= 0, prompts >= 1 and group >= 2 are needed, got {self}")


def grpo(
    model: Decoder,
    questions: Callable[[int, torch.Generator], Int[Tensor, "prompts question"]],
    reward: Callable[[Int[Tensor, "batch length"]], Float[Tensor, "batch"] | Bool[Tensor, "batch"]],
    tokens: int,
    policy: Policy,
    *,
    credit: Credit | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a decoder on its own answers; returns the mean reward of each step's samples.

    Questions and draws of a step depend on (seed, step) alone, so runs that differ in credit meet the same questions.
    The model is left in eval mode; the global generators are not used.

    Args:
        model: trained in place.
        questions: (n, generator) -> token ids, all of one length.
        reward: of questions with answers.
        tokens: of an answer.
        policy: steps, groups and rates.
        credit: factors of the tokens' advantages; None: all alike.
        seed: of questions and answers.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=policy.lr, betas=(0.9, 0.95), weight_decay=0.0)
    rewards = []
    model.eval()
    for step in range(policy.steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        asked = questions(policy.prompts, generator).to(device)
        start = asked.shape[1]
        ids = generate(
            model,
            asked.repeat_interleave(policy.group, 0),
            tokens,
            temperature=policy.temperature,
            generator=generator,
        )
        gained = reward(ids).float()
        rewards.append(float(gained.mean()))
        advantage = group_advantage(gained.view(policy.prompts, policy.group)).flatten()
        gain = None if credit is None else credit(model, ids, generator)
        logits = model(ids[:, :-1])[:, start - 1 :].float() / policy.temperature
        chosen = logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
        loss = grpo_loss(chosen, chosen.detach(), advantage, token_gain=gain)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), policy.clip)
        optimizer.step()
    return rewards
