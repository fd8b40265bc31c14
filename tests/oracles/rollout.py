"""Paths through layers, from the dense mask."""

import torch


def reached_from(mask, tokens):
    """Tokens that one of these meets under the mask, a bool for each."""
    return mask[tokens].any(0) if tokens.any() else torch.zeros_like(tokens)


def reached(masks, query):
    """Tokens that reach the query through these layers (first one first), a bool for each."""
    row = torch.arange(masks[0].shape[0]) == query
    for mask in reversed(masks):
        row = reached_from(mask, row)
    return row


def rollout(masks, query, residual=0.0, decay=0.0):
    """Rows of the product of row-stochastic matrices over the last 1, 2, ... layers, ``[layers, length]``, float64."""
    n = masks[0].shape[0]
    position = torch.arange(n, dtype=torch.float64)
    fade = torch.exp(-decay * (position[:, None] - position[None]).clamp(min=0))
    eye = torch.eye(n, dtype=torch.float64)
    product, rows = eye, []
    for mask in reversed(masks):
        weights = fade * mask.double()
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp(min=1e-300), 0)
        product = product @ (residual * eye + (1 - residual) * weights)
        rows.append(product[query])
    return torch.stack(rows)


def center_tokens(mask):
    """Tokens that reach every token by some path, the empty one included: boolean powers of the mask."""
    reach = mask | torch.eye(mask.shape[0], dtype=torch.bool)
    for _ in range(mask.shape[0].bit_length() + 1):
        reach = (reach.double() @ reach.double()) > 0
    return reach.all(0)
