"""Bi-level routing attention region by region, float64, from the paper."""

import math

import torch

from tests.oracles.layers import linear


@torch.no_grad()
def bi_level(layer, x, regions, topk, scale):
    """``(y, choices[sample][region])``; regions row by row."""
    (height, width), heads, dim = layer.shape, layer.heads, x.shape[-1]
    tall, wide = math.ceil(height / regions), math.ceil(width / regions)
    tiles = []
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            cells = [(i, j) for i in range(top, top + tall) for j in range(left, left + wide)]
            tiles.append([i * width + j for i, j in cells if i < height and j < width])
    projected = linear(layer.qkv, x)
    q, k, v = (projected[..., n * dim : (n + 1) * dim] for n in range(3))
    d, y, choices = dim // heads, torch.zeros_like(q), []
    for b in range(len(x)):
        q_mean = [sum(q[b, t] for t in tile) / len(tile) for tile in tiles]
        k_mean = [sum(k[b, t] for t in tile) / len(tile) for tile in tiles]
        chosen = []
        for r, tile in enumerate(tiles):
            scores = [float(q_mean[r] @ other) for other in k_mean]
            best = sorted(sorted(range(len(tiles)), key=lambda n, s=scores: (-s[n], n))[:topk])
            chosen.append(best)
            keys = [t for n in best for t in tiles[n]]
            for t in tile:
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    weights = torch.softmax(torch.stack([scale * (q[b, t, part] @ k[b, j, part]) for j in keys]), 0)
                    y[b, t, part] = sum(w * v[b, j, part] for w, j in zip(weights, keys, strict=True))
        choices.append(chosen)
        if layer.lce is not None:
            y[b] += convolved(layer.lce, v[b], height, width)
    return linear(layer.proj, y), choices


def convolved(conv, v, height, width):
    """The depthwise convolution, tap by tap, zeros outside the map."""
    kernel, half = conv.weight.double(), conv.weight.shape[-1] // 2
    out = torch.zeros_like(v)
    for i in range(height):
        for j in range(width):
            total = conv.bias.double().clone()
            for a in range(-half, half + 1):
                for c in range(-half, half + 1):
                    if 0 <= i + a < height and 0 <= j + c < width:
                        total += kernel[:, 0, a + half, c + half] * v[(i + a) * width + j + c]
            out[i * width + j] = total
    return out
