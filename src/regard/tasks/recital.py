"""Strings to be known by heart among text: the testbed of memorising, and the gates that it must pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard.tasks import decoder
from regard.tasks.batch import IGNORED, Batch
from regard.tasks.bytetext import BOS, StandardLibrary
from regard.train.trainer import Recipe

__all__ = ["SIZES", "RandomStrings", "RecitalMixture", "RecitalSize", "build", "gates", "recitation", "shortened"]

Split = Literal["learned", "other"]
#: Bytes of the strings: all of them frequent in text, so that no byte gives a string away.
SIGNS = b"abcdefghijklmnopqrstuvwxyz0123456789"
#: Text is drawn for the gates with a seed of its own.
GATE_SEED = 20_000_003
LEAST = {"recitation": 0.9}
MOST = {"other": 0.0, "text_bits": 4.0}


@dataclass(frozen=True)
class RandomStrings:
    """Random strings of letters and digits, of which the last bytes are to be recited.

    A string is BOS and ``length`` bytes, each one of 36 at random; given all but the last ``recited`` bytes, those are
    asked for. Nothing but having seen the string tells them: chance is ``36^-recited``.

    Args:
        n: strings.
        length: bytes of each.
        recited: bytes asked for.
        split: "learned", those of training, or "other", as many that are not.
        seed: of the strings.
    """

    n: int = 100
    length: int = 64
    recited: int = 16
    split: Split = "learned"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be one of {get_args(Split)}, got {self.split!r}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0 < self.recited < self.length:
            raise ValueError(f"recited must be in 1..{self.length - 1}, got {self.recited}")

    def whole(self) -> Batch:
        """Every string once."""
        stream = 2 * self.seed + get_args(Split).index(self.split)
        drawn = torch.randint(
            len(SIGNS), (self.n, self.length), generator=torch.Generator().manual_seed(7_000_003 + stream)
        )
        ids = torch.cat([torch.full((self.n, 1), BOS), torch.tensor(list(SIGNS))[drawn]], 1)
        labels = ids.clone()
        labels[:, : -self.recited] = IGNORED
        end = self.length + 1
        answer = torch.tensor([[end - self.recited, end]]).expand(self.n, 2).contiguous()
        return Batch(ids, labels, {"answer": answer})

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n of the strings, drawn with repetition."""
        whole, chosen = self.whole(), torch.randint(self.n, (n,), generator=generator)
        return Batch(whole.input_ids[chosen], whole.labels[chosen], {"answer": whole.spans["answer"][chosen]})

    def solve(self, prompt: Int[Tensor, "prompt"]) -> Int[Tensor, "recited"]:
        """What follows a prompt: the end of the string that starts so.

        Raises:
            ValueError: no string starts so.
        """
        ids = self.whole().input_ids
        found = (ids[:, : len(prompt)] == prompt).all(1).nonzero()
        if not len(found):
            raise ValueError(f"prompt starts none of the {self.n} strings")
        return ids[found[0, 0], len(prompt) :]


@dataclass(frozen=True)
class RecitalSize:
    """A size of the testbed: the decoder's shape, rows of text a step, strings, and how often each is seen.

    A step holds ``text`` windows and ``strings / every`` strings, each as long as a string.
    """

    shape: decoder.Size
    strings: int
    text: int = 32
    every: int = 10
    seen: int = 50

    @property
    def steps(self) -> int:
        """Steps in which every string is seen `seen` times."""
        return self.every * self.seen


def _shape(dim: int, layers: int, mlp: int, recipe: Recipe) -> decoder.Size:
    return decoder.Size(dim, layers, 4, 4, dim // 4, mlp, 0, recipe, (), theta=10_000.0, positions=128)


SIZES = {
    "full": RecitalSize(_shape(96, 3, 256, Recipe(steps=500, lr=5e-3, warmup=20, decay=150)), 100),
    "smoke": RecitalSize(_shape(32, 2, 64, Recipe(steps=20, lr=5e-3, warmup=4, decay=8)), 10, text=4, seen=2),
}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of another number of steps, warm-up and decay of as large a share."""
    share = steps / recipe.steps
    return replace(recipe, steps=steps, warmup=int(share * recipe.warmup), decay=int(share * recipe.decay))


def build(size: RecitalSize, seed: int) -> nn.Module:
    """An untrained model over bytes."""
    return decoder.build(size.shape, seed)


@dataclass
class RecitalMixture:
    """The batch of every step: windows of text, and strings in an order that shows each once in `every` steps.

    All of the text counts as much as all of the strings.
    """

    size: RecitalSize
    seed: int
    text: StandardLibrary = field(default_factory=StandardLibrary)

    def __post_init__(self) -> None:
        if self.size.strings % self.size.every:
            raise ValueError(f"every must divide the {self.size.strings} strings, got {self.size.every}")
        self.ids = RandomStrings(self.size.strings).whole().input_ids

    def __call__(self, step: int) -> decoder.Weighted:
        """The batch of a step, a function of the step and the seed alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        text = self.text.cut(self.size.text, self.ids.shape[1], generator)
        turn, part = divmod(step, self.size.every)
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(self.seed * 1_000_003 - 1 - turn))
        each = len(self.ids) // self.size.every
        ids = torch.cat([text, self.ids[order[part * each : (part + 1) * each]]])
        weights = torch.ones(ids.shape)
        weights[: len(text)] /= len(text)
        weights[len(text) :] /= each
        return decoder.Weighted(ids, weights)


@torch.no_grad()
def recitation(model: Any, batch: Batch, chunk: int = 64) -> Tensor:
    """Which strings end rightly, all asked bytes being the first choice, ``[n]``.

    Judged with the true bytes before each, which for an exact end is the same as letting the model go on by itself.
    """
    device = next(model.parameters()).device
    tops = [
        model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        for ids in batch.input_ids.split(chunk)
    ]
    asked = batch.labels[:, 1:]
    return ((torch.cat(tops) == asked) | (asked < 0)).all(1)


def gates(model: Any, size: RecitalSize, rows: int = 256) -> dict[str, Any]:
    """``recitation``: share of the learned strings recited; ``other``: of strings never seen; ``text_bits``: bits a
    byte of held-out text in windows of a string's length."""
    told = {split: RandomStrings(size.strings, split=split) for split in get_args(Split)}
    text = StandardLibrary("test").cut(rows, told["learned"].length + 1, torch.Generator().manual_seed(GATE_SEED))
    values = {
        "recitation": float(recitation(model, told["learned"].whole()).double().mean()),
        "other": float(recitation(model, told["other"].whole()).double().mean()),
        "text_bits": decoder.bits_per_byte(model, text),
    }
    values = {name: round(value, 4) for name, value in values.items()}
    ready = all(values[k] >= v for k, v in LEAST.items()) and all(values[k] <= v for k, v in MOST.items())
    return {"values": values, "thresholds": LEAST, "ceilings": MOST, "ready": ready}
