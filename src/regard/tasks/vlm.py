"""The vision-language testbed: a small LLaVA on synthetic scenes that names what it expects, and its gates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.models.vlm import VLMShape, build_vlm, see
from regard.tasks.hallucination import Split, answer, chair, describe, leak, pope, probe_questions
from regard.tasks.scene_text import (
    EOS,
    FIRST_OBJECT,
    IMAGE,
    VOCABULARY,
    Lesson,
    Probes,
    caption_lesson,
    question_lesson,
)
from regard.tasks.scenes import OBJECTS, Scenes
from regard.train.trainer import Recipe

__all__ = ["SIZES", "Mixture", "Seer", "Size", "build", "gates", "lesson_loss", "seer", "shortened"]

#: What the figures of `gates` must reach, and must not exceed. After the first training the model answers by the
#: background, so that ``yes_no`` takes size "long", on balanced questions, twice: 0.88 and, 450 steps more, 0.905.
LEAST = {"yes_no": 0.9, "caption_f1": 0.8, "chair_i": 0.05, "partner": 0.4, "yes_no_mass": 0.95}
MOST = {"chair_i": 0.45, "blind": 0.6}
#: Seed of the scenes that gates are measured on; training draws other ones.
GATE_SEED = 20_000_003


@dataclass(frozen=True)
class Size:
    """A size of the testbed: the model, the scenes it learns from, and a step.

    Args:
        shape: of the model.
        scenes: that training draws.
        pictures: scenes a step; each is captioned and asked about.
        blind: captions a step without a picture, of weight `blind_weight`.
        recipe: of the training.
        balanced: whether questions are; see `question_lesson`.
    """

    shape: VLMShape
    scenes: Scenes
    pictures: int
    blind: int
    recipe: Recipe
    blind_weight: float = 0.2
    balanced: bool = False


SIZES = {
    "full": Size(
        VLMShape(),
        Scenes(together=0.9, hidden=0.2),
        pictures=32,
        blind=12,
        recipe=Recipe(steps=700, lr=3e-3, warmup=50, decay=300),
    ),
    "long": Size(
        VLMShape(),
        Scenes(together=0.9, hidden=0.2),
        pictures=32,
        blind=12,
        recipe=Recipe(steps=700, lr=2e-3, warmup=10, decay=120),
        balanced=True,
    ),
    "smoke": Size(
        VLMShape(
            vision_dim=32, vision_layers=2, vision_heads=2, vision_mlp=64, dim=32, layers=2, heads=2, mlp=64, kv_heads=1
        ),
        Scenes(together=0.9, hidden=0.2),
        pictures=8,
        blind=4,
        recipe=Recipe(steps=20, lr=3e-3, warmup=4, decay=8),
    ),
}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of another number of steps: the same run up to its decay."""
    return replace(recipe, steps=steps, decay=min(recipe.decay, steps // 2), warmup=min(recipe.warmup, steps // 4))


def build(size: Size, seed: int) -> nn.Module:
    """The untrained model."""
    return build_vlm(
        size.shape,
        len(VOCABULARY),
        image_token=VOCABULARY[IMAGE],
        pad=VOCABULARY.PAD,
        bos=VOCABULARY.BOS,
        eos=VOCABULARY[EOS],
        seed=seed,
    )


@dataclass(frozen=True)
class Step:
    """What a training step shows: pictures, whom their captions name, and the rows of words."""

    pixels: Tensor
    named: Bool[Tensor, "pictures objects"]
    lessons: tuple[Lesson, ...]


class Mixture:
    """The batch of every step, a function of the step and the seed alone."""

    def __init__(self, size: Size, seed: int):
        self.size, self.seed = size, seed

    def __call__(self, step: int) -> Step:
        """Captions and questions about the same pictures, and captions without one."""
        size, patches = self.size, self.size.shape.patches
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        blind = caption_lesson(
            size.scenes.draw(size.blind, generator), patches, pictures=False, weight=size.blind_weight
        )
        drawn = size.scenes.draw(size.pictures, generator)
        told = caption_lesson(drawn, patches)
        asked = question_lesson(drawn, patches, generator, balanced=size.balanced)
        return Step(drawn.pixels, drawn.named, (told, asked, blind))


def lesson_loss(model: Any, step: Step) -> Tensor:
    """Cross-entropy of the words asked for, and of what the class token says is there.

    Every row is the mean over its words that are asked for; rows of captions and of questions count alike. The class
    token, brought to the decoder's space, is to score the words of the objects (binary cross-entropy): as CLIP's does,
    it learns from captions what a picture shows.
    """
    patches, whole = see(model, step.pixels)
    embed = model.get_input_embeddings()
    total, weight = torch.zeros(()), torch.zeros(())
    for group in _stacked(step.lessons):
        vectors = embed(group.input_ids)
        shown = group.input_ids == VOCABULARY[IMAGE]
        if bool(shown.any()):
            vectors = vectors.masked_scatter(shown[..., None], patches[group.picture])
        hidden = model.model.language_model(inputs_embeds=vectors, use_cache=False).last_hidden_state
        asked = group.weights[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][asked]).float()
        weights = group.weights[:, 1:][asked]
        each = nn.functional.cross_entropy(logits, group.input_ids[:, 1:][asked], reduction="none")
        total, weight = total + (each * weights).sum(), weight + weights.sum()
    words = model.lm_head.weight[FIRST_OBJECT : FIRST_OBJECT + len(OBJECTS)]
    seen = nn.functional.binary_cross_entropy_with_logits(whole @ words.T, step.named.float())
    return total / weight + seen


def _stacked(lessons: tuple[Lesson, ...]) -> list[Lesson]:
    """Lessons with pictures in one, as they are about equally long; the others as they are."""
    shown = [x for x in lessons if (x.picture >= 0).all()]
    longest = max(x.input_ids.shape[1] for x in shown)
    pad = [longest - x.input_ids.shape[1] for x in shown]
    one = Lesson(
        torch.cat(
            [nn.functional.pad(x.input_ids, (0, p), value=VOCABULARY.PAD) for x, p in zip(shown, pad, strict=True)]
        ),
        torch.cat([nn.functional.pad(x.weights, (0, p)) for x, p in zip(shown, pad, strict=True)]),
        torch.cat([x.picture for x in shown]),
    )
    return [one, *(x for x in lessons if (x.picture < 0).all())]


def gates(model: Any, n: int = 400, seed: int = GATE_SEED) -> dict[str, Any]:
    """The figures that say whether the testbed sees enough to be judged and makes up enough to be cured.

    ``yes_no``: accuracy on n balanced questions, to which neither the object's name nor the background has the
    answer; ``yes_no_mass``: mean probability of either word; ``blind``: accuracy with each picture exchanged for the
    next question's; ``guess``: answering by name or background alone; ``random``: accuracy on questions to which the
    background mostly has the answer; ``adversarial``: where the missing one of a pair is asked for; ``caption_f1``,
    ``chair_i``: of n captions; ``partner``: share of falsely named objects whose partner is there.
    """
    scenes = Scenes()
    shape = model.config.vision_config
    how = {"patches": (shape.image_size // shape.patch_size) ** 2, "patch": shape.patch_size, "scenes": scenes}
    generator = torch.Generator().manual_seed(seed)
    probes = probe_questions(n, generator, **how)
    margins, masses = answer(model, probes)
    swapped = replace(probes, scenes=probes.scenes.pick(torch.arange(n).roll(1)))
    easy = probe_questions(n, generator, split="random", **how)
    trap = probe_questions(n, generator, split="adversarial", **how)
    drawn = scenes.draw(n, generator)
    told = chair(describe(model, drawn, how["patches"]), drawn)
    tempted = pope(answer(model, trap)[0], trap.answers)
    values = {
        "yes_no": pope(margins, probes.answers)["accuracy"],
        "yes_no_mass": float(masses.mean()),
        "blind": _blind(model, swapped),
        "guess": leak(probes),
        "random": pope(answer(model, easy)[0], easy.answers)["accuracy"],
        "adversarial": tempted["accuracy"],
        "adversarial_yes": tempted["yes_rate"],
        "caption_f1": told["f1"],
        "caption_recall": told["recall"],
        "chair_i": told["chair_i"],
        "partner": told["partner"],
    }
    values = {name: round(value, 4) for name, value in values.items()}
    ready = all(values[k] >= v for k, v in LEAST.items()) and all(values[k] <= v for k, v in MOST.items())
    return {"values": values, "thresholds": LEAST, "ceilings": MOST, "ready": ready}


def _blind(model: Any, swapped: Any) -> float:
    return pope(answer(model, swapped)[0], swapped.answers)["accuracy"]


@dataclass(frozen=True)
class Seer:
    """A model that has learned the words of the scenes, and its patches: how many of a picture, and their side."""

    model: Any
    patches: int
    patch: int
    loaded: Any

    def questions(self, n: int, seed: int, split: Split = "balanced") -> Probes:
        """n balanced questions about test scenes; see `probe_questions`."""
        generator = torch.Generator().manual_seed(seed)
        return probe_questions(n, generator, patches=self.patches, patch=self.patch, split=split)


def seer(name: str, device: str = "cpu") -> Seer:
    """Loads such a model by the name that `regard.tasks.testbeds.load` takes.

    Raises:
        ValueError: a model that was not trained on the scenes, as its words are other ones.
    """
    from regard.tasks.testbeds import load

    loaded = load(name, device=device)
    words: dict[str, int] = getattr(loaded.tokenizer, "get_vocab", dict)()
    if words != {word: i for i, word in enumerate(VOCABULARY.words)}:
        raise ValueError(f"{name!r} does not know the words of the scenes: give testbed:vlm or what `train vlm` wrote")
    shape = loaded.model.config.vision_config
    return Seer(loaded.model, (shape.image_size // shape.patch_size) ** 2, shape.patch_size, loaded)
