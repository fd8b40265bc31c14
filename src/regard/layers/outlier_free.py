"""Attention with and without a reason for outliers: what a head adds or takes when it has nothing to say."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.normalize import Elementwise, Softmax
from regard.layers.multihead import MultiHead

__all__ = ["AddedValue", "HeadScale", "KeyPair", "Kind", "OutlierFree"]

Kind = Literal["softmax", "value", "correction", "pair", "scale", "sigmoid"]
START = 0.02  # standard deviation of learned keys and values at the start


class AddedValue(nn.Module):
    """``z + v'``, v' learned for each head: a `weigh` of `MultiHead`."""

    def __init__(self, heads: int, v_dim: int) -> None:
        super().__init__()
        self.value = nn.Parameter(START * torch.randn(heads, v_dim))

    def forward(
        self, z: Float[Tensor, "batch heads length v_dim"], *_: Any
    ) -> Float[Tensor, "batch heads length v_dim"]:
        """z with v' added."""
        return z + self.value[:, None]


class KeyPair(nn.Module):
    """One learned key and value a head beside those of the tokens: a `weigh` of `MultiHead`.

    With ``g = e^(lse - lse')``, ``lse' = logaddexp(lse, scale q.k')``: ``g z + (1 - g) v'``, which is attention over
    the keys and k' together; with ``shrink=False`` the z of the tokens keeps its size, ``z + (1 - g) v'``. Both need z
    and lse of one call alone. q is taken as it meets the keys (rotated, where positions rotate), k' as it is.
    """

    def __init__(self, heads: int, head_dim: int, v_dim: int, shrink: bool = True) -> None:
        super().__init__()
        self.key = nn.Parameter(START * torch.randn(heads, head_dim))
        self.value = nn.Parameter(START * torch.randn(heads, v_dim))
        self.shrink = shrink

    def forward(
        self,
        z: Float[Tensor, "batch heads length v_dim"],
        lse: Float[Tensor, "batch heads length"],
        q: Float[Tensor, "batch heads length head_dim"],
        v: Float[Tensor, "batch kv_heads kv_len v_dim"],
        n: Int[Tensor, "*rows 1"],
        x: Float[Tensor, "batch length dim"],
    ) -> Float[Tensor, "batch heads length v_dim"]:
        """z met with the pair; a query without a key gets ``v'`` (`MultiHead`'s zeros hold before this stage)."""
        score = (q * self.key[:, None]).sum(-1) * q.shape[-1] ** -0.5
        g = torch.sigmoid(lse - score)[..., None].to(z.dtype)
        return (g if self.shrink else 1) * z + (1 - g) * self.value[:, None]


class HeadScale(nn.Module):
    """``factor sigmoid(W x + b)_h z_h``: a `gate` of `MultiHead`. W and b start at 0, the factor 2 thus at 1 z."""

    def __init__(self, dim: int, heads: int, factor: float | int = 2.0) -> None:
        super().__init__()
        self.read = nn.Linear(dim, heads)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)
        self.factor = factor

    def forward(
        self, x: Float[Tensor, "batch length dim"], z: Float[Tensor, "batch heads length v_dim"]
    ) -> Float[Tensor, "batch heads length v_dim"]:
        """z of each head and token, scaled."""
        return self.factor * torch.sigmoid(self.read(x)).transpose(1, 2)[..., None] * z


class OutlierFree(MultiHead):
    """The six attentions of "Systematic Outliers in Large Language Models" (arXiv 2502.06415), letters as there.

    y is the output of the softmax, k' and v' are learned for each head:

    - ``"softmax"`` (a): y.
    - ``"value"`` (b): ``y + v'``, a fixed bias.
    - ``"correction"`` (c): ``y + (1 - e^(lse - lse')) v'``, a bias that depends on the context; y is not shrunk.
    - ``"pair"`` (d): ``e^(lse - lse') y + (1 - e^(lse - lse')) v'``, attention with one key and value more.
    - ``"scale"`` (e): ``2 sigmoid(W x + b)_h y``, an explicit factor that depends on the context.
    - ``"sigmoid"`` (f): ``sum_j sigmoid(s_ij - log n_i) v_j``, rows that need not sum to 1. n_i is the number of keys
      the query may see (our reading of "the current length"), so that stepping gives the numbers of training.

    Args:
        kind: which.
        dim, heads: and the rest as in `MultiHead`, but for the plugs named above.

    Raises:
        ValueError: another kind, or a plug that the kind takes.
    """

    def __init__(self, kind: Kind, dim: int, heads: int, **how: Any) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if taken := {"weigh", "gate", "gate_at", "normalize"} & set(how):
            raise ValueError(f"kind {kind!r} sets {', '.join(sorted(taken))} itself; give it to MultiHead")
        sigmoid = kind == "sigmoid"
        super().__init__(
            dim, heads, **how, normalize=Elementwise("sigmoid", shift="log_n", l1=False) if sigmoid else Softmax()
        )
        self.kind = kind
        if kind == "value":
            self.weigh = AddedValue(heads, self.v_dim)
        elif kind in ("correction", "pair"):
            self.weigh = KeyPair(heads, self.head_dim, self.v_dim, shrink=kind == "pair")
        elif kind == "scale":
            self.gate = HeadScale(dim, heads)

    def extra_repr(self) -> str:
        """The kind, shapes and pattern."""
        return f"{self.kind!r}, {super().extra_repr()}"
