"""Rotary positions on a grid, pair by pair as complex numbers, in float64."""

import itertools

import torch


def turned(x, shape, pairs, theta):
    """x [tokens, head_dim] over the grid `shape`, row-major; pair j is (x_j, x_(j + head_dim / 2))."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x, dtype=torch.float64)
    for token, place in enumerate(itertools.product(*(range(n) for n in shape))):
        pair = 0
        for position, n in zip(place, pairs, strict=True):
            for i in range(n):
                angle = position * theta ** (-i / n)
                z = complex(x[token, pair], x[token, pair + half])
                z *= complex(
                    torch.tensor(angle, dtype=torch.float64).cos(), torch.tensor(angle, dtype=torch.float64).sin()
                )
                out[token, pair], out[token, pair + half] = z.real, z.imag
                pair += 1
    return out
