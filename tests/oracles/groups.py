"""Mass between groups of tokens, one row and one key at a time, float64."""

import numpy as np


def group_mass(weights, rows, keys):
    """Mean over the rows of a group of the mass on a group of keys, for each head.

    weights [heads, rows, keys]; rows, keys: sets of indices. NaN without rows.
    """
    out = []
    for head in np.asarray(weights, dtype=np.float64):
        per_row = [sum(head[i, j] for j in keys) for i in rows]
        out.append(sum(per_row) / len(per_row) if per_row else float("nan"))
    return np.array(out)


def information_contribution(weights, rows, documents):
    """``IC[d]`` after each layer, [layer, document], of one sample; weights: one [heads, rows, keys] a layer."""
    running, out = [0.0] * len(documents), []
    for layer in weights:
        for d, keys in enumerate(documents):
            heads = group_mass(layer, rows, keys)
            running[d] += sum(heads) / len(heads)
        out.append(list(running))
    return np.array(out)
