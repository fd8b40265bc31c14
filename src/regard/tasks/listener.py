"""A simulated reader of text: sensors that answer to features of words, and the encoding that finds words' vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.tasks.lexicon import Lexicon

__all__ = ["LAGS", "encode", "features", "read"]

#: How strongly a word is answered to when it comes, one word later, and two words later.
LAGS = (1.0, 0.5, 0.25)


def features(task: Lexicon, generator: torch.Generator, *, frequency: bool = True) -> Float[Tensor, "words features"]:
    """What sensors may answer to in a word, standardised over words.

    Log-frequency (unless left out), function or content, animacy, and two drawn at random that mean nothing.
    """
    known = [task.frequency[2:].log()] if frequency else []
    known += [task.function[2:].double(), task.animate[2:].double()]
    known += [torch.rand(len(known[0]), generator=generator).double() for _ in range(2)]
    x = torch.stack(known, 1)
    return (x - x.mean(0)) / x.std(0)


def read(
    of_word: Float[Tensor, "words sensors"],
    words: Int[Tensor, "n"],
    generator: torch.Generator,
    *,
    subjects: int = 1,
    noise: float | int = 10.0,
) -> Float[Tensor, "n sensors"]:
    """The sensors' answers while words are read, one after the other: the mean over subjects.

    Args:
        of_word: what each sensor answers to each word.
        words: numbers of the words read.
        generator: of the noise.
        subjects: each has noise of its own.
        noise: its standard deviation, in standard deviations of the answers.
    """
    signal = of_word[words]
    answers = torch.zeros_like(signal)
    for lag, weight in enumerate(LAGS):
        answers[lag:] += weight * signal[: len(signal) - lag]
    spread = noise * answers.std() / subjects**0.5
    return answers + spread * torch.randn(answers.shape, generator=generator, dtype=torch.float64)


def encode(
    answers: Float[Tensor, "n sensors"], words: Int[Tensor, "n"], count: int, penalty: float | int
) -> Float[Tensor, "count sensors"]:
    """Ridge regression of answers on the words now and at the lags before: the vectors of the words now.

    The normal equations are sums over pairs of words, so that no matrix of places by words is made.

    Args:
        answers: of the sensors.
        words: numbers below `count`.
        count: words there are.
        penalty: of ridge regression.
    """
    n, lags = len(words), len(LAGS)
    gram = torch.zeros(lags * count, lags * count, dtype=torch.float64)
    right = torch.zeros(lags * count, answers.shape[1], dtype=torch.float64)
    for a in range(lags):
        right[a * count : (a + 1) * count].index_add_(0, words[: n - a], answers[a:])
        for b in range(lags):
            late = max(a, b)
            pair = words[late - a : n - a] * count + words[late - b : n - b]
            block = torch.bincount(pair, minlength=count**2).view(count, count)
            gram[a * count : (a + 1) * count, b * count : (b + 1) * count] = block
    gram += penalty * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, right)[:count]
