"""Attention over channels instead of tokens: every score sums over all positions (DaViT, arXiv 2204.03645)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.layers.refuse import need_heads, refuse

Scale = Literal["head", "length"]


class ChannelAttention(nn.Module):
    """Group channel attention: in each group of ``C_g = dim / groups`` channels, with q, k, v ``[length, C_g]``,

        A = softmax_last(s k^T v)  in [C_g, C_g],    y = (A q^T)^T,

    then groups side by side and a projection. Cost ``2 length C C_g``: linear in the length. The scale s is
    ``C_g^-1/2`` (``scale="head"``, the paper) or ``n^-1/2`` for n tokens (``scale="length"``, the later release, whose
    q, k, v go by other names: the scores come from its q and k and are applied to its v).

    Attention over channels has no pairs of tokens to forbid: a pattern is refused. One layer lets every token depend
    on every other.

    Args:
        dim: width.
        groups: must divide dim.
        scale: see above.
        bias: of the q, k, v projection.
    """

    def __init__(self, dim: int, groups: int, scale: Scale = "head", bias: bool = True):
        super().__init__()
        need_heads(dim, groups, "groups")
        if scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
        self.groups, self.scale = groups, scale
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        context: Any = None,
        pattern: Any = None,
        state: Any = None,
        valid: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """y of the formula.

        Args:
            x: tokens.
            context, pattern, state: refused.
            valid: False for padding, whose keys and values are zeroed before the product over positions (a mask cannot
                do it); n counts what is valid. Rows of padding come back zero.
        """
        refuse(self, context=context, pattern=pattern, state=state)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.groups, -1)).permute(2, 0, 3, 1, 4)
        if valid is not None:
            there = valid[:, None, :, None]
            k, v = k.masked_fill(~there, 0.0), v.masked_fill(~there, 0.0)
        if self.scale == "head":
            k = k * k.shape[-1] ** -0.5
        elif valid is None:
            k = k * x.shape[1] ** -0.5
        else:
            k = k * valid.sum(1).clamp(min=1).to(k.dtype)[:, None, None, None] ** -0.5
        weights = (k.transpose(-1, -2) @ v).softmax(-1)
        y = self.proj((q @ weights.transpose(-1, -2)).transpose(1, 2).flatten(2))
        return y if valid is None else y.masked_fill(~valid[..., None], 0.0)
