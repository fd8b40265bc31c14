"""Training objectives: likelihood and masked diffusion over token ids, distillation of weights, budgets to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.patterns import Pattern

__all__ = [
    "BudgetMultiplier",
    "Corrupted",
    "bos_decorrelation",
    "corrupt_blockwise",
    "corrupt_uniform",
    "group_advantage",
    "grpo_loss",
    "likelihood",
    "masked_diffusion",
    "span_mass",
    "weights_mse",
]

LEAST = 1e-3  # of the noise level t


def likelihood(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean of ``-log p(x_p | x_<p)`` over the tokens p >= 1, nats."""
    logits = model(ids)[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class Corrupted:
    """Sequences and what noise made of them.

    Attributes:
        clean: the tokens ``[batch, length]``.
        noisy: the tokens with some replaced by the mask token.
        masked: which were.
        weight: what predicting each masked token counts, 0 where not masked; so chosen that the loss is comparable at
            every noise level.
    """

    clean: Int[Tensor, "batch length"]
    noisy: Int[Tensor, "batch length"]
    masked: Bool[Tensor, "batch length"]
    weight: Float[Tensor, "batch length"]


def corrupt_uniform(
    ids: Int[Tensor, "batch length"], mask_id: int, generator: torch.Generator, *, least: float | int = LEAST
) -> Corrupted:
    """Each token masked by itself with probability ``t ~ U(least, 1)``, one t a sequence; a masked one counts 1/t.

    Args:
        ids: tokens; the generator's device must be theirs or the CPU.
        mask_id: the id of the mask token.
        generator: of t and of what is masked.
        least: of t, in (0, 1).
    """
    _check_least(least)
    t = least + (1 - least) * _rand((len(ids), 1), generator, ids.device)
    masked = _rand(tuple(ids.shape), generator, ids.device) < t
    return Corrupted(ids, ids.masked_fill(masked, mask_id), masked, masked / t)


def corrupt_blockwise(
    ids: Int[Tensor, "batch length"],
    mask_id: int,
    generator: torch.Generator,
    *,
    block: int = 16,
    half_life: float | int | None = 0.25,
    least: float | int = LEAST,
) -> Corrupted:
    """A noise level for each block, a fixed number of masked tokens, late ones first (arXiv 2512.14067).

    In every block of P tokens (the last may be shorter) ``t ~ U(least, 1)`` and exactly ``k = round(t P)`` tokens are
    masked, drawn without replacement with weights ``w_i = exp(beta (1 - t) i)`` over the places i = 0..P-1,
    ``beta = ln 2 / (half_life P)``: with little noise left it is the end of the block that is unknown, as in decoding.
    Drawn as the k largest of ``log w_i + Gumbel``. A masked token counts ``P / k``; a block with k = 0 counts nothing.

    Args:
        ids: tokens; the generator's device must be theirs or the CPU.
        mask_id: the id of the mask token.
        generator: of t and of what is masked.
        block: P.
        half_life: as a share of P, over which the weight doubles at t = 0; None draws all places alike.
        least: of t, in (0, 1).
    """
    _check_least(least)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if half_life is not None and not half_life > 0:
        raise ValueError(f"half_life must be above 0, or None for equal weights, got {half_life}")
    batch, length = ids.shape
    blocks = -(-length // block)
    place = torch.arange(blocks * block, device=ids.device).reshape(blocks, block)
    there = place < length
    size = there.sum(1)
    t = least + (1 - least) * _rand((batch, blocks, 1), generator, ids.device)
    count = (t * size[:, None]).round()
    beta = 0.0 if half_life is None else math.log(2) / (half_life * block)
    gumbel = -torch.log(-torch.log(_rand((batch, blocks, block), generator, ids.device).clamp(1e-20, 1 - 1e-7)))
    score = (beta * (1 - t) * torch.arange(block, device=ids.device) + gumbel).masked_fill(~there, -torch.inf)
    rank = score.argsort(-1, descending=True).argsort(-1)
    masked = rank < count
    weight = torch.where(masked, size[:, None] / count.clamp(min=1), 0.0)
    masked, weight = masked.flatten(1)[:, :length], weight.flatten(1)[:, :length]
    return Corrupted(ids, ids.masked_fill(masked, mask_id), masked, weight)


def masked_diffusion(
    pattern: Pattern | Callable[[int], Pattern] | None, *, clean_context: bool = False
) -> Callable[[nn.Module, Corrupted], Tensor]:
    """The loss of a masked diffusion model: ``sum_p weight_p CE(logits_p, x_p) / (batch length)``, no shift, nats.

    Each position predicts its own token. With ``clean_context`` the model reads ``[noisy; clean]``, both halves with
    the positions 0..length-1, and the loss is on the first half; the pattern (`regard.patterns.BlockDiffusion`) keeps
    each noisy block from seeing its own clean tokens. Corrupt with `corrupt_uniform` or `corrupt_blockwise`.

    Args:
        pattern: of what the model reads, or a function that gives it for the length of a sequence; None: the
            model's own.
        clean_context: whether the clean sequence is read too.

    Returns:
        A loss of a model (called as ``model(ids, pattern=, positions=)``) and a `Corrupted` batch.
    """

    def loss(model: nn.Module, batch: Corrupted) -> Tensor:
        rows, length = batch.clean.shape
        met = pattern if pattern is None or isinstance(pattern, Pattern) else pattern(length)
        if clean_context:
            positions = torch.arange(length, device=batch.clean.device).repeat(2)
            logits = model(torch.cat([batch.noisy, batch.clean], 1), pattern=met, positions=positions)[:, :length]
        else:
            logits = model(batch.noisy, pattern=met)
        each = nn.functional.cross_entropy(logits[batch.masked].float(), batch.clean[batch.masked], reduction="none")
        return (each * batch.weight[batch.masked]).sum() / (rows * length)

    return loss


def weights_mse(
    predicted: Float[Tensor, "batch heads q_len kv_len"],
    weights: Float[Tensor, "batch heads q_len kv_len"],
    factor: float | int = 0.01,
) -> Float[Tensor, ""]:
    """``factor * sum (A - P)^2``, over heads, queries and keys, mean over the batch: a router taught by dense weights.

    ``P`` are the weights of a frozen teacher and get no gradient. Sparsifiner, arXiv 2303.13755 (which sums over the
    batch too; the mean makes the rate independent of it).

    Raises:
        ValueError: other shapes than each other's.
    """
    if predicted.shape != weights.shape:
        raise ValueError(
            f"weights must have the shape of predicted, {list(predicted.shape)}, got {list(weights.shape)}"
        )
    return factor * (predicted - weights.detach()).square().sum() / max(len(predicted), 1)


def bos_decorrelation(
    hidden: Sequence[Float[Tensor, "batch length dim"]],
    layers: Sequence[int],
    valid: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, ""]:
    """``mean over l in layers and t > 0 of cos(h^l_t, h^l_0)^2``: what keeps tokens from turning into the first one.

    After arXiv 2510.22603, which adds a loss that lowers this cosine; the square, and that ``h_0`` gets no gradient
    (else the first token moves in place of the others), are our reading. Add it with a factor.

    Args:
        hidden: what each block gives to the next.
        layers: which of them; the paper's begin where massive activations appear.
        valid: False at padding, which does not count; the first token of a sequence is its first valid one.

    Raises:
        ValueError: no layer, one that ``hidden`` lacks, another shape of ``valid``, or no token after the first.
    """
    if not layers:
        raise ValueError("layers must name at least one of hidden, got none")
    if missing := [layer for layer in layers if not 0 <= layer < len(hidden)]:
        raise ValueError(f"layers must be in 0..{len(hidden) - 1}, got {missing}")
    shape = hidden[layers[0]].shape
    counted = torch.ones(shape[:2], dtype=torch.bool, device=hidden[layers[0]].device) if valid is None else valid
    if counted.shape != shape[:2]:
        raise ValueError(f"valid must be [batch, length] = {list(shape[:2])}, got {list(counted.shape)}")
    first = counted.int().argmax(1)
    rows = torch.arange(len(first), device=first.device)
    later = counted.clone()
    later[rows, first] = False
    if not bool(later.any()):
        raise ValueError("hidden must hold a token after the first one of a sequence")
    each = []
    for layer in layers:
        h = hidden[layer].float()
        cos = nn.functional.cosine_similarity(h, h[rows, first].detach()[:, None], dim=-1)
        each.append(cos[later].square().mean())
    return torch.stack(each).mean()


def span_mass(
    scores: Float[Tensor, "batch heads q_len spans"],
    start: Int[Tensor, "q_len spans"],
    stop: Int[Tensor, "q_len spans"],
    q: Float[Tensor, "batch heads q_len head_dim"],
    k: Float[Tensor, "batch kv_heads kv_len head_dim"],
    tile: int = 256,
) -> Float[Tensor, ""]:
    """A search taught where dense attention looks: cross-entropy of its softmax with the mass of each span.

    ``- sum m log softmax(scores) / sum m`` over queries and spans, m being the mass that causal dense attention of q
    and k, the queries being the last ones, gives to the span ``[start, stop)``; it gets no gradient. Queries that look
    elsewhere count little. Nats; 0 where no query has a span.

    Args:
        scores: of the search, -inf for what is no span of a query (``start >= stop``).
        start, stop: half-open.
        q, k: scores of dense attention are ``q . k / sqrt(head_dim)``.
        tile: queries at a time, for the weights.
    """
    q_len, kv_len, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    there = start < stop
    masses = []
    with torch.no_grad():
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        for a in range(0, q_len, tile):
            rows = torch.arange(a, min(a + tile, q_len), device=q.device)
            later = torch.arange(kv_len, device=q.device) > rows[:, None] + kv_len - q_len
            weights = (scale * (q[:, :, rows] @ keys.mT)).masked_fill(later, -torch.inf).softmax(-1)
            until = nn.functional.pad(weights.cumsum(-1), (1, 0))
            ends = [x[rows].clamp(max=kv_len).expand(*q.shape[:2], -1, -1) for x in (stop, start)]
            masses.append((until.gather(-1, ends[0]) - until.gather(-1, ends[1])) * there[rows])
        mass = torch.cat(masses, 2)
    some = there.any(-1, keepdim=True)
    shares = scores.masked_fill(~there, -torch.inf).masked_fill(~some, 0).log_softmax(-1)
    return -(mass * shares.masked_fill(~there, 0)).sum() / mass.sum().clamp(min=1e-9)


def group_advantage(
    rewards: Float[Tensor, "prompts group"], least: float | int = 1e-6
) -> Float[Tensor, "prompts group"]:
    """``(r - mean) / std`` within the answers to one prompt (arXiv 2402.03300); 0 where all are alike.

    Args:
        rewards: of every answer.
        least: added to the standard deviation (that of the population).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + least)


def grpo_loss(
    logp: Float[Tensor, "batch response"],
    old_logp: Float[Tensor, "batch response"],
    advantage: Float[Tensor, "batch"],
    mask: Bool[Tensor, "batch response"] | None = None,
    *,
    token_gain: Float[Tensor, "batch response"] | None = None,
    clip: float | int = 0.2,
) -> Float[Tensor, ""]:
    """Group-relative policy optimization (arXiv 2402.03300) with a factor for each token's advantage.

    ``- mean over answers of the mean over their tokens of min(rho_t A_t, clamp(rho_t, 1 - clip, 1 + clip) A_t)``,
    ``rho_t = exp(logp_t - old_logp_t)`` and ``A_t = gain_t A``. The gain gets no gradient (arXiv 2510.13554).

    Args:
        logp: log-probability of each sampled token under the model that is trained.
        old_logp: under the model that sampled it; on the first update ``logp.detach()``.
        advantage: of each answer, see `group_advantage`.
        mask: tokens that count; None: all.
        token_gain: factors, see `regard.train.credit`; None: 1.
        clip: of the ratio.

    Raises:
        ValueError: shapes that differ, or a clip that is not positive.
    """
    if clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}")
    for name, x in (("old_logp", old_logp), ("mask", mask), ("token_gain", token_gain)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"{name} must have the shape of logp, {list(logp.shape)}, got {list(x.shape)}")
    if advantage.shape != logp.shape[:1]:
        raise ValueError(f"advantage must be [batch] = [{len(logp)}], got {list(advantage.shape)}")
    each = advantage.detach()[:, None] * (1.0 if token_gain is None else token_gain.detach())
    ratio = (logp - old_logp.detach()).exp()
    gained = torch.minimum(ratio * each, ratio.clamp(1 - clip, 1 + clip) * each)
    if mask is None:
        return -gained.mean()
    counted = (gained * mask).sum(1) / mask.sum(1).clamp(min=1)
    return -counted.mean()


class BudgetMultiplier(nn.Module):
    """A budget kept by two multipliers a task that grow for as long as it is missed (arXiv 2604.07394).

    ``sum over tasks of the mean over its samples of (l1 |s - t| + l2 (s - t)^2)``, s what a sample spends (a share of
    sparse layers, of experts, of tokens), t the task's target. One minimises the loss and **ascends** l1 and l2: their
    gradient is reversed here, so that the optimizer that steps the model does both. They start from U(0, ``start``)
    and only grow, as the gradient of the loss by them is never negative; what is on target pays nothing.

    Args:
        targets: t of each task.
        generator: draws the start.
        start: the most that l1 and l2 begin with.

    Raises:
        ValueError: no target, one that is not in [0, 1], or a start below 0.
    """

    targets: Tensor

    def __init__(
        self, targets: Sequence[float | int], generator: torch.Generator | None = None, start: float | int = 0.5
    ) -> None:
        super().__init__()
        if not targets or not all(0 <= t <= 1 for t in targets):
            raise ValueError(f"targets must be shares in [0, 1], at least one, got {list(targets)}")
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        self.register_buffer("targets", torch.tensor([float(t) for t in targets]))
        self.linear = nn.Parameter(start * torch.rand(len(targets), generator=generator))
        self.square = nn.Parameter(start * torch.rand(len(targets), generator=generator))

    def forward(self, share: Float[Tensor, "batch"], task: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """The penalty of a batch.

        Args:
            share: s of each sample.
            task: which task it is of, in 0..len(targets) - 1.

        Raises:
            ValueError: shapes that differ, or an unknown task.
        """
        if share.ndim != 1 or share.shape != task.shape:
            raise ValueError(f"share and task must be [batch], got {list(share.shape)} and {list(task.shape)}")
        tasks = len(self.targets)
        if len(task) and not 0 <= int(task.min()) <= int(task.max()) < tasks:
            raise ValueError(f"task must be in 0..{tasks - 1}, got {int(task.min())}..{int(task.max())}")
        off = share - self.targets[task]
        l1, l2 = _Reversed.apply(self.linear)[task], _Reversed.apply(self.square)[task]
        each = l1 * off.abs() + l2 * off.square()
        samples = torch.bincount(task, minlength=tasks).clamp(min=1)
        return (each / samples[task]).sum()


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around: a descent on what comes out is an ascent on what went in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


def _rand(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def _check_least(least: float | int) -> None:
    if not 0 < least < 1:
        raise ValueError(f"least must be in (0, 1), got {least}")
