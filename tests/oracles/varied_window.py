"""Varied-size windows one query at a time, in float64, in the paper's coordinates ([-1, 1], corners aligned)."""

import math

import torch

from tests.oracles.layers import linear


@torch.no_grad()
def varied_window(layer, x):
    """The layer without its position convolution; every axis must have more than one token (counting padding)."""
    (height, width), w, heads = layer.shape, layer.window, layer.heads
    rows, columns = math.ceil(height / w), math.ceil(width / w)
    tall, wide = rows * w, columns * w
    dim = x.shape[-1]
    d = dim // heads
    projected = linear(layer.qkv, x)
    y = torch.zeros_like(projected[..., :dim])
    for b in range(len(x)):
        tokens = x[b].double().view(height, width, dim)
        qkv = projected[b].view(height, width, 3, heads, d)
        for r in range(rows):
            for c in range(columns):
                inside = [
                    (i, j)
                    for i in range(r * w, min((r + 1) * w, height))
                    for j in range(c * w, min((c + 1) * w, width))
                ]
                mean = sum(tokens[i, j] for i, j in inside) / w**2  # padding is zeros that count
                mean = torch.where(mean > 0, mean, 0.01 * mean)
                scales, offsets = linear(layer.scale, mean[None])[0], linear(layer.offset, mean[None])[0]
                for h in range(heads):
                    sx, sy, ox, oy = scales[2 * h], scales[2 * h + 1], offsets[2 * h], offsets[2 * h + 1]
                    keys = []
                    for m in range(w):
                        for n in range(w):
                            ry = -1 + 2 * (r * w + (w - 1) / 2) / (tall - 1)
                            rx = -1 + 2 * (c * w + (w - 1) / 2) / (wide - 1)
                            py = ry + 2 * (m - (w - 1) / 2) / (tall - 1) * (1 + sy) + oy / rows
                            px = rx + 2 * (n - (w - 1) / 2) / (wide - 1) * (1 + sx) + ox / columns
                            row, column = (py + 1) / 2 * (tall - 1), (px + 1) / 2 * (wide - 1)
                            out = not (-1e-4 <= row <= height - 1 + 1e-4 and -1e-4 <= column <= width - 1 + 1e-4)
                            k, v = bilinear(qkv[:, :, 1, h], row, column), bilinear(qkv[:, :, 2, h], row, column)
                            keys.append((m, n, k, v, out))
                    for i, j in inside:
                        kept = [key for key in keys if not (layer.mask_outside and key[4])]
                        if not kept:
                            continue
                        scores = []
                        for m, n, k, _, _ in kept:
                            s = qkv[i, j, 0, h] @ k / math.sqrt(d)
                            if layer.rel_bias is not None:
                                s = s + layer.rel_bias[h, i - r * w - m + w - 1, j - c * w - n + w - 1].double()
                            scores.append(s)
                        weights = torch.softmax(torch.stack(scores), 0)
                        y[b, i * width + j, h * d : (h + 1) * d] = sum(
                            p * key[3] for p, key in zip(weights, kept, strict=True)
                        )
    return linear(layer.proj, y)


def bilinear(image, row, column):
    """``image [height, width, d]`` at a place, zeros outside."""
    top, left = math.floor(row), math.floor(column)
    total = torch.zeros(image.shape[-1], dtype=torch.float64)
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total
