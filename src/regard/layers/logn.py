"""Sharper attention in longer texts: scores that grow with the log of the length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["LogN", "logn_scale"]

PAPER = "Small Language Model Makes an Effective Long Text Extractor, arXiv 2502.07286"


def logn_scale(
    length: int | Int[Tensor, "batch"],
    base: float | int = 512,
    queries: Sequence[tuple[int, int]] | None = None,
    *,
    q_len: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "q_len"] | Float[Tensor, "batch q_len"]:
    """``log(n) / log(base)`` for some queries, 1 for the others: what their scores are multiplied by.

    A key whose score is ``log(base)`` above n - 1 equal others then keeps the weight ``1 / (1 + (n - 1) / n)``, about
    one half at every n; without the factor it falls as ``base / n``. Below ``base`` tokens the factor is below 1.

    Args:
        length: n, the true number of tokens, padding left out: of all samples, or one a sample.
        base: length at which nothing changes, above 1 (512: the longest text of the pretrained encoder).
        queries: intervals ``[start, end)`` of the queries to scale; None: all.
        q_len: queries; None: the greatest length.
        dtype: of the factors; None: PyTorch's default.

    Returns:
        ``[q_len]``, or ``[batch, q_len]`` for one length a sample. Multiply q by it, or the rows of the scores.
    """
    n = torch.as_tensor(length)
    if n.numel() == 0 or int(n.min()) < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    _check_base(base)
    q_len = int(n.max()) if q_len is None else q_len
    factor = (n.double().log() / math.log(base)).to(torch.get_default_dtype() if dtype is None else dtype)
    factor = factor[..., None].expand(*n.shape, q_len)
    return factor if queries is None else torch.where(_among(queries, q_len, n.device), factor, 1.0)


class LogN(nn.Module):
    """The plug ``temper`` of `MultiHead`: ``q_i log(n_i) / log(base)``, n_i the keys that query i may see.

    Args:
        base: number of keys at which nothing changes.
        queries: intervals ``[start, end)``, by place in the call, of the queries to scale; None: all.
    """

    def __init__(self, base: float | int = 512, queries: Sequence[tuple[int, int]] | None = None) -> None:
        super().__init__()
        _check_base(base)
        self.base, self.queries = float(base), None if queries is None else tuple(queries)

    def forward(
        self, q: Float[Tensor, "batch heads q_len head_dim"], n: Int[Tensor, "#heads q_len 1"]
    ) -> Float[Tensor, "batch heads q_len head_dim"]:
        """Tempered queries; those that may see no key are left as they are."""
        factor = n.clamp(min=1).to(torch.promote_types(q.dtype, torch.float32)).log() / math.log(self.base)
        factor = torch.where(n > 0, factor, 1.0)
        if self.queries is not None:
            factor = torch.where(_among(self.queries, q.shape[2], q.device)[:, None], factor, 1.0)
        return q * factor.to(q.dtype)

    def extra_repr(self) -> str:
        """Base and queries."""
        return f"base={self.base:g}, queries={self.queries}"


def _check_base(base: float | int) -> None:
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base!r}")


def _among(queries: Sequence[tuple[int, int]], q_len: int, device: torch.device) -> Tensor:
    """Whether each of the queries lies in one of the intervals, [q_len]."""
    chosen = torch.zeros(q_len, dtype=torch.bool, device=device)
    for start, end in queries:
        if not 0 <= start <= end <= q_len:
            raise ValueError(f"queries must be intervals within [0, {q_len}), got ({start}, {end})")
        chosen[start:end] = True
    return chosen
