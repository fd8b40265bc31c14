"""Sentences of two classes in which one word tells the class: templates with a kind or an unkind word in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Polarity", "Sentences"]

_KIND = (
    "wonderful excellent delightful superb brilliant lovely charming splendid beautiful great fantastic pleasant "
    "amazing perfect enjoyable good magnificent impressive remarkable outstanding"
)
_UNKIND = (
    "terrible awful dreadful horrible miserable nasty boring bad disgusting poor ugly unpleasant "
    "disappointing tedious annoying painful dull lousy worthless appalling"
)
WORDS = {1: _KIND.split(), 0: _UNKIND.split()}
TEMPLATES = (
    "the {noun} was {word} .",
    "what a {word} {noun} .",
    "we saw a {word} {noun} in the {place} .",
    "everyone in the {place} said that the {noun} was {word} .",
    "the {word} {noun} was shown in the {place} again last week .",
    "my sister wrote from the {place} that she had found the new {noun} rather {word} .",
)
NOUNS = ["film", "book", "play", "concert", "meal", "hotel", "garden", "show", "game", "song"]
PLACES = ["city", "village", "station", "theatre", "museum", "hall", "park", "office"]
Split = Literal["train", "test"]


class Sentences(NamedTuple):
    """Sentences in a model's tokens.

    ``labels`` [n]: 1 kind, 0 unkind; ``word`` [n, 2]: where the telling word starts and ends, in tokens;
    ``content``: True for tokens that are neither padding nor special.
    """

    input_ids: Int[Tensor, "n length"]
    attention_mask: Int[Tensor, "n length"]
    labels: Int[Tensor, "n"]
    word: Int[Tensor, "n 2"]
    content: Bool[Tensor, "n length"]
    texts: list[str]


@dataclass(frozen=True)
class Polarity:
    """Sentences such as ``the film was wonderful .``: class, template, noun and place are drawn independently.

    So the telling word alone tells the class, and the two classes are as frequent.

    Args:
        tokenizer: of the model, with offsets.
        split: three quarters of the telling words are for training, the others for testing.
    """

    tokenizer: Any
    split: Split = "train"

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {self.split!r}")

    def words(self, label: int) -> list[str]:
        """The telling words of a class."""
        return [word for i, word in enumerate(WORDS[label]) if (i % 4 == 3) == (self.split == "test")]

    def text(self, generator: torch.Generator) -> tuple[str, int, tuple[int, int]]:
        """One sentence, its class, and the characters of its telling word."""

        def pick(choices: Any) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        label = pick((0, 1))
        word, template = pick(self.words(label)), pick(TEMPLATES)
        before, after = template.format(noun=pick(NOUNS), place=pick(PLACES), word="{word}").split("{word}")
        return before + word + after, label, (len(before), len(before) + len(word))

    def solve(self, text: str) -> int:
        """The class whose word the sentence holds.

        Raises:
            ValueError: it holds a word of neither class, or of both.
        """
        found = {label for label, words in WORDS.items() for word in words if word in text.split()}
        if len(found) != 1:
            raise ValueError(f"text must hold a telling word of one class, got {text!r}")
        return found.pop()

    def batch(self, n: int, generator: torch.Generator) -> Sentences:
        """n sentences drawn with the generator."""
        texts, labels, spans = zip(*(self.text(generator) for _ in range(n)), strict=True)
        told = self.tokenizer(
            list(texts),
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        start, end = told["offset_mapping"].unbind(-1)
        content = told["attention_mask"].bool() & ~told["special_tokens_mask"].bool()
        span = torch.tensor(spans)
        inside = content & (start < span[:, 1:]) & (end > span[:, :1])
        first = inside.int().argmax(1)
        word = torch.stack([first, first + inside.sum(1)], dim=1)
        return Sentences(
            told["input_ids"], told["attention_mask"], torch.tensor(labels), word, content, [str(t) for t in texts]
        )
