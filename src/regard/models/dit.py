"""A small video diffusion transformer: patches, rotary positions on three axes, adaLN-zero, prompts by cross-attention.

The words of the prompt also join the timestep, as the class does in DiT (arXiv 2212.09748): kinds are learned sooner.

It is trained and sampled by flow matching: ``x_t = (1 - t) x + t noise``, and the model predicts ``noise - x``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.layers.grid_rope import GridRope
from regard.models.saved import save_model

__all__ = ["DiTConfig", "VideoDiT", "flow_loss", "sample", "timesteps"]


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a `VideoDiT`.

    Args:
        words: of the prompts' vocabulary; the last one stands for a prompt left out.
        channels: of the video.
        patch: (frames, rows, columns) of pixels in a token.
        dim, layers, heads: of the blocks.
        pairs: rotary pairs of the three axes; with ``2 * sum(pairs) = dim / heads``.
        theta: base of the rotary wavelengths.
        mlp_ratio: of the blocks.
        lean: above 0, how strongly heads start out attending by place (as ConViT's do, arXiv 2103.10697), every fourth
            head alike: to their own frame, to their own place in all frames, to their own neighbourhood, to no place.
    """

    words: int = 16
    channels: int = 1
    patch: tuple[int, int, int] = (1, 2, 2)
    dim: int = 128
    layers: int = 4
    heads: int = 4
    pairs: tuple[int, int, int] = (4, 6, 6)
    theta: float = 100.0
    mlp_ratio: int = 4
    lean: float = 0.0

    @property
    def null(self) -> int:
        """The word of a prompt left out."""
        return self.words - 1

    def grid(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The tokens of a video of ``shape`` (frames, height, width) in pixels.

        Raises:
            ValueError: the patch does not divide it.
        """
        if any(n % p for n, p in zip(shape, self.patch, strict=True)):
            raise ValueError(f"x must have frames, height and width divisible by the patch {self.patch}, got {shape}")
        frames, height, width = (n // p for n, p in zip(shape, self.patch, strict=True))
        return frames, height, width


class SelfAttention(nn.Module):
    """Every token of the grid attends to every other; queries and keys are normed, then rotated."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        head_dim = config.dim // config.heads
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.rope = GridRope(head_dim, config.pairs, config.theta)
        self.out = nn.Linear(config.dim, config.dim)
        if config.lean:
            self._lean(config)

    @torch.no_grad()
    def _lean(self, config: DiTConfig) -> None:
        """Equal biases of query and key in the fastest rotary pairs of an axis: scores fall with the distance on it."""
        starts = [sum(config.pairs[:axis]) for axis in range(3)]
        bias = torch.zeros(self.heads, config.dim // self.heads)
        for head, axes in enumerate(((0,), (1, 2), (0, 1, 2))):
            for axis in axes:
                few = min(3 if axis else 2, config.pairs[axis])  # two leave a second peak within 16 rows
                bias[head::4, starts[axis] : starts[axis] + few] = config.lean / (few * len(axes)) ** 0.5
        self.qkv.bias[: 2 * config.dim] = bias.flatten().repeat(2)
        self.norm_q.weight.fill_(2.0)
        self.norm_k.weight.fill_(2.0)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], angles: Float[Tensor, "tokens half"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mixed tokens; ``angles`` are those of the grid."""
        q, k, v = (_split(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        q, k = self.rope(self.norm_q(q), angles).to(v.dtype), self.rope(self.norm_k(k), angles).to(v.dtype)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Every token attends to the words of the prompt, which have no order."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], words: Float[Tensor, "batch words dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """What the prompt says to each token."""
        k, v = (_split(y, self.heads) for y in self.kv(words).chunk(2, -1))
        y = scaled_dot_product_attention(_split(self.q(x), self.heads), k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention, MLP; shift, scale and gate of the first and the last come from time and words.

    The gates start at zero (adaLN-zero, arXiv 2212.09748), so that the block starts as the identity but for the prompt.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        time: Float[Tensor, "batch dim"],
        words: Float[Tensor, "batch words dim"],
        angles: Float[Tensor, "tokens half"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1, angles)
        x = x + self.cross_attention(self.norm2(x), words)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class VideoDiT(nn.Module):
    """Predicts the flow ``noise - x`` of a noisy video, a timestep and a prompt, at any grid of tokens.

    Args:
        config: its shape.
    """

    def __init__(self, config: DiTConfig | None = None):
        super().__init__()
        config = DiTConfig() if config is None else config
        if config.dim % config.heads or config.dim % 2:
            raise ValueError(f"dim must be even and divisible by heads = {config.heads}, got {config.dim}")
        self.config = config
        values = config.channels * math.prod(config.patch)
        self.embed = nn.Linear(values, config.dim)
        self.words = nn.Embedding(config.words, config.dim)
        self.time = nn.Sequential(nn.Linear(config.dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False)
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.head = nn.Linear(config.dim, values)
        ends: list[nn.Linear] = [self.modulation, self.head]
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            ends += [block.modulation, block.cross_attention.out]
        for end in ends:
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)

    def forward(
        self,
        x: Float[Tensor, "batch channels frames height width"],
        t: Float[Tensor, "batch"],
        words: Int[Tensor, "batch words"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """The flow at time t (1: pure noise) under the prompt of each sample."""
        grid = self.config.grid((x.shape[2], x.shape[3], x.shape[4]))
        said = self.words(words)
        time = nn.functional.silu(self.time(_sinusoids(t, self.config.dim) + said.sum(1)))
        first = self.blocks[0]
        assert isinstance(first, DiTBlock)
        angles = first.self_attention.rope.angles(grid, x.device)
        y = self.embed(self._patches(x, grid))
        for block in self.blocks:
            y = block(y, time, said, angles)
        shift, scale = self.modulation(time)[:, None].chunk(2, -1)
        return self._video(self.head(self.norm(y) * (1 + scale) + shift), grid).to(x.dtype)

    def example_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Two small noisy videos with times and prompts, as `forward` takes them."""
        generator = torch.Generator().manual_seed(0)
        shape = [2 * n for n in self.config.patch]
        x = torch.randn(2, self.config.channels, *shape, generator=generator)
        words = torch.randint(self.config.words, (2, 3), generator=generator)
        weight = self.head.weight
        return x.to(weight), torch.tensor([0.3, 0.7]).to(weight), words.to(weight.device)

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Writes config.json and model.safetensors; `regard.models.saved.load_saved` reads them."""
        save_model(self, folder)

    def _patches(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        f, h, w = grid
        pf, ph, pw = self.config.patch
        cut = x.reshape(x.shape[0], -1, f, pf, h, ph, w, pw)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def _video(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        f, h, w = grid
        pf, ph, pw = self.config.patch
        cut = y.reshape(y.shape[0], f, h, w, self.config.channels, pf, ph, pw)
        return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(y.shape[0], self.config.channels, f * pf, h * ph, w * pw)


def _sinusoids(t: Float[Tensor, "batch"], dim: int) -> Float[Tensor, "batch dim"]:
    frequency = torch.exp(-math.log(1000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


def flow_loss(
    model: nn.Module,
    x: Float[Tensor, "batch channels frames height width"],
    noise: Float[Tensor, "batch channels frames height width"],
    t: Float[Tensor, "batch"],
    words: Int[Tensor, "batch words"],
) -> Float[Tensor, ""]:
    """``mean ||model((1 - t) x + t noise, t, words) - (noise - x)||^2`` (flow matching, arXiv 2210.02747)."""
    at = t.reshape(-1, 1, 1, 1, 1)
    return (model((1 - at) * x + at * noise, t, words).float() - (noise - x)).square().mean()


def timesteps(steps: int, shift: float | int = 1.0, start: float | int = 1.0) -> list[float]:
    """``steps + 1`` times from ``start`` down to 0, pushed towards noise by ``shift``: ``s t / (1 + (s - 1) t)``."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < start <= 1:
        raise ValueError(f"start must be in (0, 1], got {start}")
    even = [start * (1 - i / steps) for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


@torch.no_grad()
def sample(
    model: VideoDiT,
    noise: Float[Tensor, "batch channels frames height width"],
    words: Int[Tensor, "batch words"],
    *,
    steps: int = 20,
    guidance: float | int = 2.0,
    shift: float | int = 3.0,
    init: Float[Tensor, "batch channels frames height width"] | None = None,
    strength: float | int = 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Float[Tensor, "batch channels frames height width"]:
    """Videos from a given noise: Euler steps along the flow, the same each time.

    Args:
        model: in evaluation mode.
        noise: where the flow starts.
        words: the prompts.
        steps: model calls.
        guidance: w of ``v_null + w (v_words - v_null)``; 1 runs no second branch. Both run as one batch, prompts first.
        shift: of `timesteps`.
        init: a video to start from, noised to time ``strength`` (before the shift); None starts from noise.
        strength: see ``init``.
        on_step: told the number of a step before it runs.
    """
    if strength != 1 and init is None:
        raise ValueError(f"strength goes with an init: pass one, or leave strength at 1 (got {strength})")
    times = timesteps(steps, shift, strength)
    x = noise if init is None else (1 - times[0]) * init + times[0] * noise
    null = torch.full_like(words, model.config.null)
    for step, (now, after) in enumerate(itertools.pairwise(times)):
        if on_step is not None:
            on_step(step)
        t = torch.full((len(x),), now, dtype=x.dtype, device=x.device)
        if guidance == 1:
            flow = model(x, t, words)
        else:
            told, plain = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([words, null])).chunk(2)
            flow = plain + guidance * (told - plain)
        x = x + (after - now) * flow
    return x
