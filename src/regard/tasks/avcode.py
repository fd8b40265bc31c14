"""AVCode: text as noisy frames, stacked and read by a decoder that writes the text down; the testbed of speech LLMs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.tasks.bytetext import BOS, EOS, PAD
from regard.tasks.needle import sentences

__all__ = ["AVCode", "Rendering", "Transcriber", "error_rate"]

#: What is written: 28 symbols, each a byte.
SYMBOLS = b" abcdefghijklmnopqrstuvwxyz."


@dataclass(frozen=True)
class Rendering:
    """Texts and what was seen of them.

    Attributes:
        frames: noisy frames, four a symbol.
        text: the symbols, as bytes.
    """

    frames: Float[Tensor, "n frames dim"]
    text: Int[Tensor, "n symbols"]


@dataclass(frozen=True)
class AVCode:
    """Sentences over 28 symbols, each symbol four frames of 16 numbers with noise.

    A frame is ``c_(symbol, frame) + noise * e``, e standard normal; the codes c are standard normal too, the same in
    every batch. Sentences are those of `Needle`'s filler. What is asked for is the text.

    Args:
        symbols: of a text.
        noise: standard deviation.
        codes: seed of the codes.
    """

    symbols: int = 32
    noise: float | int = 2.0
    codes: int = 0
    frames: int = 4
    dim: int = 16

    def __post_init__(self) -> None:
        for name in ("symbols", "frames", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.noise >= 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    @cached_property
    def book(self) -> Float[Tensor, "28 frames dim"]:
        """The frames of each symbol without noise."""
        generator = torch.Generator().manual_seed(self.codes)
        return torch.randn(len(SYMBOLS), self.frames, self.dim, generator=generator)

    def batch(self, n: int, generator: torch.Generator) -> Rendering:
        """n texts drawn with the generator."""
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        text = torch.tensor([self._window(random.Random(seed)) for seed in seeds])
        index = torch.zeros(256, dtype=torch.long)
        index[list(SYMBOLS)] = torch.arange(len(SYMBOLS))
        clean = self.book[index[text]].flatten(1, 2)
        return Rendering(clean + self.noise * torch.randn(clean.shape, generator=generator), text)

    def _window(self, rng: random.Random) -> list[int]:
        """A text cut anywhere, so that its places tell nothing of its symbols."""
        start = rng.randrange(128)
        return list(sentences(rng, self.symbols + 128)[0][start : start + self.symbols])

    def solve(self, frames: Float[Tensor, "n frames dim"]) -> Int[Tensor, "n symbols"]:
        """The likeliest text by the frames alone, symbol by symbol: the nearest codes."""
        seen = frames.unflatten(1, (-1, self.frames)).flatten(2)
        return torch.tensor(list(SYMBOLS))[torch.cdist(seen, self.book.flatten(1)[None]).argmin(-1)]


def error_rate(written: Int[Tensor, "n symbols"], text: Int[Tensor, "n length"]) -> Float[Tensor, "n"]:
    """Character error rate: fewest insertions, deletions and changes that make the text, over its length."""
    rates = []
    for a, b in zip(written.tolist(), text.tolist(), strict=True):
        row = np.arange(len(b) + 1)
        for i, x in enumerate(a, 1):
            change = row[:-1] + (np.array(b) != x)
            best = np.concatenate([[i], np.minimum(change, row[1:] + 1)])
            # An insertion comes after the best so far to its left: a running minimum of (cost - place).
            row = np.minimum.accumulate(best - np.arange(len(b) + 1)) + np.arange(len(b) + 1)
        rates.append(row[-1] / len(b))
    return torch.tensor(rates, dtype=torch.float64)


class Transcriber(nn.Module):
    """A decoder that reads stacked frames through one linear map, and then writes.

    The sequence is BOS, ``frames / stack`` vectors of ``stack`` frames side by side, EOS, the text; the vectors have
    the size of the decoder's own embeddings at the start.

    Args:
        decoder: a transformers causal model over bytes, BOS and EOS; it is trained with the map.
        stack: r, frames a vector: the rate at which what is heard is thinned out.
        dim: of a frame.
    """

    def __init__(self, decoder: Any, stack: int, dim: int = 16) -> None:
        super().__init__()
        if stack < 1:
            raise ValueError(f"stack must be at least 1, got {stack}")
        self.decoder, self.stack = decoder, stack
        embed = decoder.get_input_embeddings().weight
        self.project = nn.Linear(stack * dim, embed.shape[1])
        nn.init.normal_(self.project.weight, std=float(embed.detach().std()) * (stack * dim) ** -0.5)
        nn.init.zeros_(self.project.bias)

    def prompt(self, frames: Float[Tensor, "n frames dim"]) -> Float[Tensor, "n prompt width"]:
        """BOS, the vectors, EOS, as embeddings.

        Raises:
            ValueError: the number of frames is not a multiple of ``stack``.
        """
        if frames.shape[1] % self.stack:
            raise ValueError(f"frames must be a multiple of stack = {self.stack}, got {frames.shape[1]}")
        read = self.project(frames.unflatten(1, (-1, self.stack)).flatten(2))
        ends = self.decoder.get_input_embeddings()(torch.tensor([[BOS, EOS]], device=frames.device))
        return torch.cat([ends[:, :1].expand(len(frames), -1, -1), read, ends[:, 1:].expand(len(frames), -1, -1)], 1)

    def forward(
        self, frames: Float[Tensor, "n frames dim"], text: Int[Tensor, "n symbols"]
    ) -> Float[Tensor, "n symbols vocab"]:
        """Logits of each symbol of the text, those before it given."""
        prompt = self.prompt(frames)
        written = self.decoder.get_input_embeddings()(text[:, :-1])
        logits = self.decoder(inputs_embeds=torch.cat([prompt, written], 1), use_cache=False).logits
        return logits[:, prompt.shape[1] - 1 :]

    def loss(self, batch: Rendering) -> Float[Tensor, ""]:
        """Mean of ``-log p`` over the symbols, nats."""
        logits = self(batch.frames, batch.text).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.text.flatten())

    @torch.no_grad()
    def transcribe(self, frames: Float[Tensor, "n frames dim"], symbols: int) -> Int[Tensor, "n symbols"]:
        """The text as the decoder writes it by itself, its first choice each time."""
        prompt = self.prompt(frames)
        seen = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        how: dict[str, Any] = {"max_new_tokens": symbols, "min_new_tokens": symbols, "pad_token_id": PAD}
        return self.decoder.generate(inputs_embeds=prompt, attention_mask=seen, do_sample=False, **how)
