"""Routing by k-means straight from its definition: loops over tokens, float64."""

import math

import numpy as np


def normed(x):
    x = np.asarray(x, dtype=np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def nearest(x, mu):
    """The centroid of each token of one head, [length]."""
    return np.array([int(np.argmin([((t - m) ** 2).sum() for m in mu])) for t in x])


def balanced(x, mu, width, allowed=None):
    """The tokens of each centroid's group, as sorted lists."""
    tokens = [t for t in range(len(x)) if allowed is None or allowed[t]]
    groups = []
    for m in mu:
        ranked = sorted(tokens, key=lambda t: (round(((x[t] - m) ** 2).sum(), 9), t))
        groups.append(sorted(ranked[:width]))
    return groups


def last_of_cluster(x_q, x_k, mu, width, start):
    """Keys of each query: those up to its own place in the last runs of its cluster."""
    of_q, of_k = nearest(x_q, mu), nearest(x_k, mu)
    run = math.ceil(width / 4)
    found = []
    for i, c in enumerate(of_q):
        mine = [k for k in range(start + i + 1) if of_k[k] == c]
        runs = [mine[a : a + run] for a in range(0, len(mine), run)]
        found.append([k for one in runs[-(width // run) :] for k in one])
    return found


def attention(q, k, v, q_groups, k_groups, causal):
    """Mean over a query's groups of softmax attention inside each; a group without an allowed key counts as zeros."""
    out, counts = np.zeros((len(q), v.shape[1])), np.zeros(len(q))
    for queries, keys in zip(q_groups, k_groups, strict=True):
        for i in queries:
            counts[i] += 1
            met = [j for j in keys if j <= i or not causal]
            if met:
                scores = np.array([q[i] @ k[j] for j in met]) / np.sqrt(q.shape[1])
                weights = np.exp(scores - scores.max())
                out[i] += weights @ v[met] / weights.sum()
    return out / np.maximum(counts, 1)[:, None]


def update(mu, x_q, x_k, decay):
    """Centroids of one head after one update; x_q, x_k are all tokens of the batch."""
    of_q, of_k = nearest(x_q, mu), nearest(x_k, mu)
    new = []
    for c, m in enumerate(mu):
        means = [x[of == c].mean(0) if (of == c).any() else m for x, of in ((x_q, of_q), (x_k, of_k))]
        new.append(decay * m + (1 - decay) / 2 * means[0] + (1 - decay) / 2 * means[1])
    return np.array(new)
