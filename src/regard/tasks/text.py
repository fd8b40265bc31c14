"""A text as the inputs of a model, whole or refused."""

from __future__ import annotations

from typing import Any

from regard.tasks.testbeds import Loaded

_LIMITS = ("max_position_embeddings", "n_positions")


def most_tokens(loaded: Loaded) -> int | None:
    """The longest text the model takes, by its config and its tokenizer; None where neither says."""
    config = loaded.model.config.get_text_config()
    said = [getattr(config, name, None) for name in _LIMITS] + [loaded.tokenizer.model_max_length]
    known = [n for n in said if isinstance(n, int) and 0 < n < 10**9]  # a huge number stands for "not said"
    return min(known, default=None)


def encode(loaded: Loaded, text: str, tokens: int | None = None) -> dict[str, Any]:
    """`model(**encode(loaded, text))`: one text as a batch of one; an encoder-decoder reads it on both sides.

    Args:
        loaded: model and tokenizer.
        text: the whole text.
        tokens: take only the first so many tokens; None takes all of them or refuses.

    Raises:
        ValueError: the model has no tokenizer, the text no tokens, or more than the model takes.
    """
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name!r} has no tokenizer, so it takes no text; for pictures there is `--image`")
    cut = {} if tokens is None else {"truncation": True, "max_length": tokens}
    inputs = dict(loaded.tokenizer(text, return_tensors="pt", verbose=False, **cut).to(loaded.model.device))
    length, most = inputs["input_ids"].shape[1], most_tokens(loaded)
    if length < 2:
        raise ValueError(f"text has {length} tokens; attention needs at least 2")
    if most is not None and length > most:
        raise ValueError(
            f"text has {length} tokens and {loaded.name!r} takes at most {most}: give a shorter one, or tokens={most} "
            f"(`--tokens {most}`) for the first of them"
        )
    if loaded.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
