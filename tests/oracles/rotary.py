"""Rotary positions as multiplication by complex numbers, a pair at a time, in float64."""

import numpy as np


def rotate(x, positions, inv_freq, interleaved=False):
    """x ``[rows, head_dim]``, positions ``[rows]`` or ``[rows, axes]``, inv_freq ``[pairs]`` or ``[axes, pairs]``."""
    x, out = np.array(x.tolist()), np.array(x.tolist())
    inv_freq = np.atleast_2d(np.array(inv_freq.tolist()))
    positions = np.array(positions.tolist(), np.float64).reshape(len(x), len(inv_freq))
    pairs = inv_freq.shape[1]
    for row in range(len(x)):
        for p in range(pairs):
            i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
            turned = complex(x[row, i], x[row, j]) * np.exp(1j * float(positions[row] @ inv_freq[:, p]))
            out[row, i], out[row, j] = turned.real, turned.imag
    return out
