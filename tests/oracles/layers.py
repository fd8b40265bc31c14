"""Attention layers one query at a time, in float64, from the formulas; weights taken from the layer under test."""

import itertools
import math

import torch


def linear(layer, x):
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


def grid_attention(layer, x, allows, shape, place_in_group=None):
    """`allows(q, k)` on coordinate tuples; the relative bias compares `place_in_group(c)`."""
    tokens = list(itertools.product(*(range(n) for n in shape)))
    heads = layer.heads
    projected = linear(layer.qkv, x)
    dim = x.shape[-1]
    q, k, v = (projected[..., i * dim : (i + 1) * dim] for i in range(3))
    d = dim // heads
    y = torch.zeros_like(q)
    for b in range(len(x)):
        for i, at in enumerate(tokens):
            keys = [j for j, there in enumerate(tokens) if allows(at, there)]
            if not keys:
                continue
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / math.sqrt(d) for j in keys])
                if layer.rel_bias is not None:
                    scores = scores + torch.stack(
                        [_bias(layer.rel_bias[h], at, tokens[j], place_in_group) for j in keys]
                    )
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                y[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, keys, strict=True))
    return linear(layer.proj, y)


def _bias(table, at, there, place_in_group):
    p, r = place_in_group(at), place_in_group(there)
    index = tuple(a - c + (n - 1) // 2 for a, c, n in zip(p, r, table.shape, strict=True))
    return table[index].double()


def channel_attention(layer, x, scale):
    """`A = softmax_last(scale k^T v)`, `y = (A q^T)^T`, a channel group at a time."""
    projected = linear(layer.qkv, x)
    dim = x.shape[-1]
    q, k, v = (projected[..., i * dim : (i + 1) * dim] for i in range(3))
    size = dim // layer.groups
    y = torch.zeros_like(q)
    for b, g in itertools.product(range(len(x)), range(layer.groups)):
        part = slice(g * size, (g + 1) * size)
        for a in range(size):
            scores = torch.stack(
                [scale * sum(k[b, n, part][a] * v[b, n, part][c] for n in range(x.shape[1])) for c in range(size)]
            )
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            for n in range(x.shape[1]):
                y[b, n, g * size + a] = weights @ q[b, n, part]
    return linear(layer.proj, y)
