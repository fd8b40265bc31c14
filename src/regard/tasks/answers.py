"""How much of a model's vocabulary probability lies on the answers that a question allows (arXiv 2305.14596)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Answers", "answer_mass", "pmi"]


class Answers(NamedTuple):
    """What a model says of the choices of each of n questions.

    Attributes:
        pma: probability on the choices together, [n].
        competition: 1 - pma, what goes to other words (surface forms) [n].
        decided: whether moving that probability to one of the choices cannot change which is first: ``1 - pma < p_(1) -
            p_(2)``, [n].
        predictions: the likeliest choice, as its number, [n].
        probability: of each choice, [n, choices].
    """

    pma: Tensor
    competition: Tensor
    decided: Tensor
    predictions: Tensor
    probability: Tensor


def answer_mass(logits: Float[Tensor, "n vocab"], choices: Int[Tensor, "n choices"]) -> Answers:
    """``PMA = sum over choices l of p(l | x)``, for choices of one token each, over the whole vocabulary.

    Of choices of several tokens, p(l | x) is the product of theirs: sum their log-probabilities and use `of`. Longer
    choices have less probability for their length alone, and a choice that begins another one is counted twice.

    Raises:
        ValueError: fewer than two choices, or a question with the same choice twice.
    """
    if choices.shape[1] < 2:
        raise ValueError(f"choices must be at least 2 a question, got {choices.shape[1]}")
    ordered = choices.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("choices hold the same token twice in one question, whose probability would count double")
    return of(logits.double().log_softmax(-1).gather(1, choices))


def of(logs: Float[Tensor, "n choices"]) -> Answers:
    """The same from the log-probability of every choice."""
    p = logs.double().exp()
    pma = p.sum(1)
    first, second = p.topk(2, dim=1).values.unbind(1)
    decided: Bool[Tensor, "n"] = 1 - pma < first - second
    return Answers(pma, 1 - pma, decided, p.argmax(1), p)


def pmi(
    logits: Float[Tensor, "n vocab"], premise: Float[Tensor, "n vocab"], choices: Int[Tensor, "n choices"]
) -> Int[Tensor, "n"]:
    """The choice of the largest ``p(l | x) / p(l | premise)``, premise being the prompt without its question."""
    gain = logits.double().log_softmax(-1) - premise.double().log_softmax(-1)
    return gain.gather(1, choices).argmax(1)
