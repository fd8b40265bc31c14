"""The vision testbed: a ViT of transformers' own class on scikit-learn's digits, and the gates it must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.tasks.vision import DIGIT_CLASSES, Digits, Images, jitter, normalised
from regard.train.trainer import Recipe
from regard.watch.call import Call
from regard.watch.seam import Seam

__all__ = ["SIZES", "Size", "build", "gates", "picture_loss", "right", "shortened", "uniform_attention"]


@dataclass(frozen=True)
class Size:
    """A size of the ViT: its shape, images a step, its recipe. A patch is a pixel: 64 tokens and one of class."""

    dim: int
    layers: int
    heads: int
    mlp: int
    images: int
    recipe: Recipe
    side: int = 8
    patch: int = 1


SIZES = {
    "full": Size(64, 4, 4, 128, 32, Recipe(steps=1400, lr=1e-2, warmup=30, decay=800)),
    "smoke": Size(32, 2, 2, 64, 16, Recipe(steps=20, lr=3e-3, warmup=4, decay=8)),
}
#: What the figures of `gates` must reach, and must not exceed.
LEAST = {"accuracy": 0.96}
MOST = {"uniform": 0.6}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of another number of steps: the same run up to its decay, of at most three fifths of them."""
    decay = min(recipe.decay, 3 * steps // 5)
    return replace(recipe, steps=steps, decay=decay, warmup=min(recipe.warmup, steps - decay))


def build(size: Size, seed: int) -> nn.Module:
    """An untrained ViT: transformers' own ViTForImageClassification, of one channel."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
        image_size=size.side,
        patch_size=size.patch,
        num_channels=1,
        num_labels=DIGIT_CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={c: str(c) for c in range(DIGIT_CLASSES)},
        label2id={str(c): c for c in range(DIGIT_CLASSES)},
        attn_implementation="sdpa",
    )
    model = ViTForImageClassification(config)
    embeddings = model.vit.embeddings
    with torch.no_grad():  # as wide as its 0.02 is, places are told apart only after hundreds of steps
        for weight in (embeddings.position_embeddings, embeddings.patch_embeddings.projection.weight):
            weight.normal_(std=0.5)
    return model


def batches(size: Size, seed: int) -> Callable[[int], Images]:
    """The batch of every step, a function of the step and the seed alone: digits moved by up to a pixel."""
    task = Digits("train")

    def draw(step: int) -> Images:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return jitter(task.batch(size.images, generator), generator)

    return draw


def picture_loss(model: nn.Module, images: Images) -> Tensor:
    """Cross-entropy of the classes, for a model of transformers."""
    return nn.functional.cross_entropy(model(pixel_values=normalised(images.x)).logits.float(), images.labels)


@torch.no_grad()
def right(model: Any, images: Images) -> Tensor:
    """Which images the model names rightly, ``[n]``."""
    top = [model(pixel_values=normalised(x)).logits.argmax(-1) for x in images.x.split(256)]
    return torch.cat(top) == images.labels


def uniform_attention(model: nn.Module) -> Seam:
    """The model with every weight ``1 / n`` for as long as this is open: it mixes tokens and selects none."""

    def answer(call: Call) -> Tensor:
        return call.run(q=torch.zeros_like(call.q))

    return Seam(model, answer, edits=True)


def gates(model: Any, images: Images | None = None) -> dict[str, Any]:
    """The figures that say whether the testbed is good enough to judge claims on.

    ``accuracy``: share of the test digits named rightly. ``uniform``: the same with uniform attention; a model that
    scores as well without choosing keys is no testbed for attention patterns, so this has a ceiling.
    """
    from regard.tasks.vision import digits

    images = digits("test") if images is None else images
    values = {"accuracy": float(right(model, images).double().mean())}
    with uniform_attention(model):
        values["uniform"] = float(right(model, images).double().mean())
    values = {name: round(value, 4) for name, value in values.items()}
    ready = all(values[k] >= v for k, v in LEAST.items()) and all(values[k] <= v for k, v in MOST.items())
    return {"values": values, "thresholds": LEAST, "ceilings": MOST, "ready": ready}
