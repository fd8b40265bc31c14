"""The scale that keeps attention as sharp as it was in training when there are more keys."""

from __future__ import annotations

import math

__all__ = ["entropy_scale"]


def entropy_scale(n: float | int, n_train: float | int, head_dim: int | None = None) -> float:
    """``sqrt(log(n) / log(n_train))``, times ``head_dim^-0.5`` where that is given: pass it as ``scale`` of `attend`.

    The entropy of attention over n keys grows with ``log n``; larger scores bring it back (arXiv 2306.08645 derives the
    ratio, FreeSwim, arXiv 2511.14712, takes n = 2 n_train, n_train the tokens of a trained frame). The base of the
    logarithm cancels. 1 at ``n = n_train``.

    Args:
        n: keys now, above 1.
        n_train: keys in training, above 1.
        head_dim: width of a head; None: the factor alone, by which the model's own scale is multiplied.

    Raises:
        ValueError: a number of keys at most 1, or head_dim below 1.
    """
    for name, value in (("n", n), ("n_train", n_train)):
        if not value > 1:
            raise ValueError(f"{name} must be above 1 key, got {value}")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    factor = math.sqrt(math.log(n) / math.log(n_train))
    return factor if head_dim is None else factor * head_dim**-0.5
