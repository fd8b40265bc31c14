"""A linear classifier on the first token of an encoder."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["FirstTokenClassifier"]


class FirstTokenClassifier(nn.Module):
    """Logits from what an encoder's last layer holds in the first token; how BERT is used for classes.

    Args:
        encoder: a transformers encoder, with `last_hidden_state`.
        classes: outputs.
        seed: of the head's first weights.
    """

    def __init__(self, encoder: Any, classes: int, seed: int = 0):
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(encoder.config.hidden_size, classes)

    def first(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch dim"]:
        """What the head reads."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]

    def forward(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.head(self.first(input_ids, attention_mask))
