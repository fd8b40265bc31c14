"""A vocabulary of whole words, for testbeds whose tokens are symbols."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

__all__ = ["Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """Words and their ids, in order; the first two are padding and the beginning of a sequence.

    Args:
        words: all different, without white space.
    """

    words: tuple[str, ...]
    PAD = 0
    BOS = 1

    @classmethod
    def of(cls, *groups: Iterable[str]) -> Vocabulary:
        """``<pad>``, ``<bos>`` and then the groups, one after the other."""
        return cls(("<pad>", "<bos>", *(word for group in groups for word in group)))

    def __post_init__(self) -> None:
        if len(set(self.words)) < len(self.words):
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise ValueError(f"words must be different, got {', '.join(twice)} more than once")
        if self.words[:2] != ("<pad>", "<bos>"):
            raise ValueError(f"words must begin with <pad> and <bos>, got {self.words[:2]}")

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def __getitem__(self, word: str) -> int:
        """The id of a word.

        Raises:
            KeyError: it is none.
        """
        return self._ids[word]

    def ids(self, words: Iterable[str]) -> list[int]:
        """The ids of words."""
        return [self._ids[word] for word in words]

    def text(self, ids: Tensor | Sequence[int]) -> str:
        """Words with spaces between them."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else ids
        return " ".join(self.words[i] for i in numbers)

    def tokenizer(self, most: int) -> Any:
        """A transformers tokenizer that splits at white space and puts ``<bos>`` first; ``most`` tokens at most."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel(self._ids, unk_token=None))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", self.BOS)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<bos>", pad_token="<pad>", model_max_length=most
        )
