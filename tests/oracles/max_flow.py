"""The largest flow through layers of attention, as a linear program over every edge."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog


def largest(edges: np.ndarray, source: int, row: int) -> float:
    """From token `source` before the first layer to `row` after the last; `edges[layer, i, j]` goes from j to i."""
    layers, length, _ = edges.shape
    listed = [(n, j, i) for n in range(layers) for i in range(length) for j in range(length)]
    kept = []  # what comes in goes out, at every node but the two ends
    for level in range(layers + 1):
        for token in range(length):
            if (level, token) in ((0, source), (layers, row)):
                continue
            kept.append([((n + 1, i) == (level, token)) * 1.0 - ((n, j) == (level, token)) for n, j, i in listed])
    gain = [-1.0 * ((n + 1, i) == (layers, row)) for n, j, i in listed]
    bounds = [(0, edges[n, i, j]) for n, j, i in listed]
    return -linprog(gain, A_eq=np.array(kept), b_eq=np.zeros(len(kept)), bounds=bounds).fun
