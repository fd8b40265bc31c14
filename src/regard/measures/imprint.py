"""How much of a feature error repeats with the grid of windows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["grid_imprint"]


def grid_imprint(error: Float[Tensor, "batch dim height width"], window: int) -> float:
    """The imprint of windows of w tokens a side on a feature error, in [0, 1]:

        sum_ab n_ab |mean_ab - mean|^2 / sum |error - mean|^2

    over the w^2 classes (a, b) = (row mod w, column mod w), with n_ab places each; means over batch and places, one a
    channel, sums over channels too. 0: the error does not know where in its window it is. For an error without imprint
    the expectation is about (w^2 - 1) / (batch * places), not 0. After arXiv 2310.00161; the ratio is our reading.

    Args:
        error: features less what they should be, e.g. less their average over all shifts of the window grid.
        window: w, at least 2; must divide both sides.

    Raises:
        ValueError: a window that does not divide, or an error that is constant.
    """
    height, width = error.shape[2:]
    if window < 2 or height % window or width % window:
        raise ValueError(f"window must be at least 2 and divide {height} and {width}, got {window}")
    centred = error.double() - error.double().mean((0, 2, 3), keepdim=True)
    total = centred.pow(2).mean((0, 2, 3)).sum()
    if total == 0:
        raise ValueError("error must vary, got the same value everywhere")
    classes = centred.unflatten(3, (-1, window)).unflatten(2, (-1, window)).mean((0, 2, 4))
    return float(classes.pow(2).mean((1, 2)).sum() / total)
