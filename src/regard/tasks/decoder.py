"""The byte-level decoder testbed: its shape, the text it is trained on, and the gates it must pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.tasks.batch import Batch
from regard.tasks.bytetext import BOS, EOS, PAD, VOCAB, StandardLibrary
from regard.tasks.needle import Needle, least_length, lines_of, sentences
from regard.tasks.repeated import RepeatedTokens
from regard.train.trainer import Recipe

#: Random segments are of printable ASCII, so that every repeated sequence is a text that can be shown.
PRINTABLE = range(32, 127)


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    ``until`` which step; the ``lengths`` to draw from; the shares of rows with needles and with repetitions; and what
    their other tokens count, ``around`` a needle and in the ``first`` period, where the answers count 1 and the later
    periods 0.5. Without the latter two a head pays nothing for looking anywhere when there is nothing to find.
    """

    until: int
    lengths: tuple[int, ...]
    needle: float
    repeated: float
    around: float = 0.1
    first: float = 0.0


@dataclass(frozen=True)
class Size:
    """A size of the decoder: its shape, its phases and its recipe."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tokens: int
    recipe: Recipe
    phases: tuple[Phase, ...]
    theta: float = 100_000.0
    positions: int = 8192


SIZES = {
    "full": Size(
        dim=192,
        layers=6,
        heads=8,
        kv_heads=4,
        head_dim=32,
        mlp=512,
        tokens=4096,
        recipe=Recipe(steps=3300, lr=3e-3, warmup=100, decay=800, autocast=True),
        phases=(
            Phase(600, (128,), needle=0.35, repeated=0.35),
            Phase(1200, (128, 256, 256, 512), needle=0.35, repeated=0.25),
            Phase(1800, (128, 256, 256, 512), needle=0.35, repeated=0.25, around=0.3, first=0.25),
            Phase(10**9, (256, 512, 1024), needle=0.3, repeated=0.2, around=0.5, first=0.5),
        ),
    ),
    "smoke": Size(
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=64,
        tokens=512,
        recipe=Recipe(steps=20, lr=3e-3, warmup=4, decay=8),
        phases=(Phase(10**9, (128,), needle=0.35, repeated=0.35),),
    ),
}


@dataclass(frozen=True)
class Weighted:
    """A training batch: tokens, and what predicting each of them counts."""

    input_ids: Int[Tensor, "batch length"]
    weights: Float[Tensor, "batch length"]


def build(size: Size, seed: int) -> nn.Module:
    """An untrained decoder: transformers' own LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=size.dim,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.positions,
        rope_parameters={"rope_type": "default", "rope_theta": size.theta},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def needle_at(length: int, generator: torch.Generator, text: bytes | None) -> Needle:
    """A training needle for a length: longer sequences hold more needles and more questions."""
    most = {128: 1, 256: 3, 512: 6}.get(length, 8)
    others = int(torch.randint(most + 1, (), generator=generator))
    fitting = [q for q in range(1, min(others, 3) + 2) if least_length(others, q) <= length]
    questions = fitting[int(torch.randint(len(fitting), (), generator=generator))] if len(fitting) > 1 else 1
    filler = lines_of(text) if text is not None else sentences
    return Needle(length, distractors=(others, others), questions=questions, filler=filler)


@dataclass
class Mixture:
    """The batch of every step: text, needles (a third of them in text) and repeated segments of one length.

    Each part counts as the mean over its own asked tokens (all of the text; the answers; the second and later periods),
    so that few answers weigh as much as much text; a ``Phase`` says what the other tokens count.
    """

    size: Size
    seed: int
    text: StandardLibrary = field(default_factory=StandardLibrary)

    def __call__(self, step: int) -> Weighted:
        """The batch of a step, a function of the step and the seed alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        phase = next(p for p in self.size.phases if step < p.until)
        length = phase.lengths[int(torch.randint(len(phase.lengths), (), generator=generator))]
        rows = max(3, self.size.tokens // length)
        needles, repeats = max(1, round(rows * phase.needle)), max(1, round(rows * phase.repeated))
        texts = self.text.cut(max(1, rows - needles - repeats), length, generator)
        in_text = bool(torch.rand((), generator=generator) < 1 / 3)
        task = needle_at(length, generator, self.text.data.tobytes() if in_text else None)
        hidden = task.batch(needles, generator)
        repeated = repeated_at(length).batch(repeats, generator)
        ids = torch.cat([texts, hidden.input_ids, repeated.input_ids])
        weights = (
            asked_mean(torch.ones_like(texts) > 0),
            asked_mean(hidden.labels >= 0) + phase.around * asked_mean(hidden.labels < 0),
            0.5 * asked_mean(repeated.labels >= 0) + phase.first * asked_mean(repeated.labels < 0),
        )
        return Weighted(ids, torch.cat(weights))


def asked_mean(asked: Bool[Tensor, "rows length"]) -> Float[Tensor, "rows length"]:
    """Weights that make a sum over tokens the mean over the asked ones."""
    return asked / asked.sum().clamp(min=1)


def repeated_at(length: int) -> RepeatedTokens:
    """Repeated segments of printable bytes for a length."""
    return RepeatedTokens(length, PRINTABLE, BOS, (min(12, length // 4), length // 2 - 1))


@torch.no_grad()
def exact_match(model: Any, task: Any, n: int, generator: torch.Generator, chunk: int = 16) -> float:
    """Share of sequences whose asked tokens are all the model's first choice given the true ones before them."""
    return sum(_right(model, b) for b in _chunks(task.batch(n, generator), chunk)) / n


def _right(model: Any, batch: Batch) -> int:
    top = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = batch.labels[:, 1:]
    return int(((top == asked) | (asked < 0)).all(-1).sum())


def _chunks(batch: Batch, chunk: int) -> list[Batch]:
    return [batch[i : i + chunk] for i in range(0, len(batch), chunk)]


@torch.no_grad()
def bits(model: Any, ids: Int[Tensor, "n length"], chunk: int = 16) -> Float[Tensor, "n length-1"]:
    """``-log2 p(token | those before)`` of every token but the first; ``chunk`` sequences at a time."""
    found = []
    for rows in ids.split(chunk):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        found.append(each.view(len(rows), -1))
    return torch.cat(found) / math.log(2)


def bits_per_byte(model: Any, ids: Int[Tensor, "n length"], chunk: int = 16) -> float:
    """Mean of `bits` over the windows' bytes."""
    return bits(model, ids, chunk).double().mean().item()


@dataclass
class Evaluation:
    """The figures of the loss curve: held-out text, needles and repetitions that training does not draw."""

    length: int
    n: int = 32
    seed: int = 10_000_019  # a stream of its own, far from those of the steps
    train: StandardLibrary = field(default_factory=StandardLibrary)
    test: StandardLibrary = field(default_factory=lambda: StandardLibrary("test"))

    def __call__(self, model: Any) -> dict[str, float]:
        """Bits per byte of both splits' text, exact match on needles, loss on repetitions (nats a token)."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {
            "train_bits": bits_per_byte(model, self.train.cut(self.n, self.length, generator)),
            "test_bits": bits_per_byte(model, self.test.cut(self.n, self.length, generator)),
            "needle": exact_match(model, Needle(self.length, distractors=(1, 1), split="test"), self.n, generator),
        }
        batch = repeated_at(self.length).batch(self.n, generator)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        found["repeated_loss"] = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        ).item()
        return found
