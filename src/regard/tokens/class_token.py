"""Which visual tokens to keep: those that the encoder's class token looks at."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.fused import column_mass
from regard.watch.call import Call
from regard.watch.seam import Seam

__all__ = ["class_weights", "keep_visual", "rank_tokens"]

How = Literal["highest", "lowest", "random"]


@torch.no_grad()
def class_weights(
    encoder: nn.Module, pixels: Float[Tensor, "batch channels height width"], *, layer: int = -1, prefix: int = 1
) -> Float[Tensor, "batch patches"]:
    """Weights of the class token's row on the patches, heads averaged: O(patches), from q and k of one row.

    Args:
        encoder: called with ``pixel_values``; its tokens are the class token, other prefix tokens, patches.
        pixels: pictures.
        layer: which attention call of the encoder, negative from the last.
        prefix: tokens before the first patch.

    Raises:
        IndexError: fewer attention calls.
    """
    rows: list[Tensor] = []

    def keep(call: Call) -> None:
        where: dict[str, Any] = {"is_causal": call.is_causal, "scale": call.scale, "q_start": 0}
        if call.mask is not None:
            where["mask"] = call.mask[:, :, :1]
        one = torch.ones(1, 1, 1, device=call.q.device)
        rows.append(column_mass(call.q[:, :, :1], call.k, one, **where)[:, :, 0].mean(1))

    with Seam(encoder, keep):
        encoder(pixel_values=pixels)
    if not -len(rows) <= layer < len(rows):
        raise IndexError(f"layer={layer}: the encoder made {len(rows)} attention calls")
    return rows[layer][:, prefix:]


def rank_tokens(
    weights: Float[Tensor, "batch tokens"], keep: int, how: How = "highest", *, generator: torch.Generator | None = None
) -> Int[Tensor, "batch keep"]:
    """The tokens that stay, in their own order: of the highest or lowest weights, or drawn at random.

    Raises:
        ValueError: no token or more than there are would stay, or an unknown way.
    """
    batch, tokens = weights.shape
    if not 1 <= keep <= tokens:
        raise ValueError(f"keep must be between 1 and the {tokens} tokens, got {keep}")
    if how not in ("highest", "lowest", "random"):
        raise ValueError(f"how must be 'highest', 'lowest' or 'random', got {how!r}")
    by = torch.rand(batch, tokens, generator=generator).to(weights) if how == "random" else weights
    return by.topk(keep, dim=-1, largest=how != "lowest").indices.sort(-1).values


def keep_visual(
    ids: Int[Tensor, "batch length"],
    features: Float[Tensor, "batch tokens dim"],
    kept: Int[Tensor, "batch some"],
    image_token: int,
) -> tuple[Int[Tensor, "batch new_length"], Float[Tensor, "batch some dim"]]:
    """Sequences with some of the visual tokens, once or several times, in the order of ``kept``; text stays.

    Args:
        ids: each with ``tokens`` times ``image_token`` in one stretch, at the same place in every sample.
        features: what stands there.
        kept: numbers of visual tokens; a number twice repeats the token.
        image_token: the id.

    Returns:
        ids with as many image tokens as are kept, and their features.

    Raises:
        ValueError: image tokens at different places, in pieces, or not as many as features.
    """
    image = ids == image_token
    tokens = features.shape[1]
    columns = image[0].nonzero()[:, 0]
    first = int(columns[0]) if len(columns) else 0
    whole = len(columns) == tokens and int(columns[-1]) - first + 1 == tokens if len(columns) else False
    if not whole or not bool((image == image[:1]).all()):
        raise ValueError(f"ids must hold {tokens} image tokens in one stretch, at the same place in every sample")
    if int(kept.min()) < 0 or int(kept.max()) >= tokens:
        raise ValueError(
            f"kept must be numbers of the {tokens} visual tokens, got {int(kept.min())}..{int(kept.max())}"
        )
    middle = torch.full_like(kept, image_token).to(ids)
    new = torch.cat([ids[:, :first], middle, ids[:, first + tokens :]], dim=1)
    return new, features.gather(1, kept[..., None].expand(-1, -1, features.shape[2]))
