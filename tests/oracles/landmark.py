"""Landmark attention from its definition, one query at a time, in float64."""

import numpy as np

from tests.oracles.rotary import rotate


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def weights(scores, block):
    """Weights ``[length, length]`` from scores: groups, a softmax in each, and the gates of their landmarks."""
    P, n = block + 1, len(scores)
    out = np.zeros((n, n))
    for i in range(n):
        own = i // P
        regular = [j for j in range(own * P, i + 1) if j % P != block]
        landmarks = [g * P + block for g in range(own)]
        group = softmax(scores[i, regular + landmarks])
        out[i, regular] = group[: len(regular)]
        for g, gate in enumerate(group[len(regular) :]):
            keys = range(g * P, g * P + block)
            out[i, keys] = gate * softmax(scores[i, keys])
    return out


def by_masks(scores, block):
    """The same as the authors' code computes it: a bucket for each key, softmax in buckets, products by masks."""
    P, n = block + 1, len(scores)
    at = np.arange(n)
    is_mem = at % P == block
    last_section = at[None] // P == at[:, None] // P
    out = np.zeros((n, n))
    for i in range(n):
        seen = (at <= i) & ~((at == i) & is_mem[i])
        bucket = np.where(last_section[i] | is_mem, -1, at // P)
        probs = np.zeros(n)
        for name in set(bucket[seen]):
            members = seen & (bucket == name)
            probs[members] = softmax(scores[i, members])
        opened = np.where(bucket >= 0, probs[np.minimum(at // P * P + block, n - 1)], 1.0)
        mem_weight = np.where(is_mem, 0.0, opened)
        out[i] = probs * mem_weight * seen
    return out


def read(q, k, v, block, topk, chunk, inv_freq=None):
    """Outputs of one head read in chunks; q, k, v ``[length, dim]`` before rotation."""
    q, k, v = (np.array(x.tolist()) for x in (q, k, v))
    P, n, scale = block + 1, len(q), q.shape[1] ** -0.5
    outs, opened = np.zeros((n, v.shape[1])), []

    def turned(x, positions):
        return x if inv_freq is None else rotate(x, np.array(positions), inv_freq)

    for i in range(n):
        finished = i // chunk * chunk // P
        first = finished * P
        mine = turned(q[i : i + 1], [(topk + 1) * P + i - first])[0]
        # choose: the last topk landmarks in blocks 1 .. topk, older ones in block 0
        last = min(topk, finished)
        places = [0] * (finished - last) + list(range(topk - last + 1, topk + 1))
        keys = turned(k[block:first:P], [s * P + block for s in places])
        order = sorted(range(finished), key=lambda g: (-(keys[g] @ mine), g))[:topk]
        chosen = sorted(order)
        opened.append(chosen)
        slots = [j + (g >= finished - topk) for j, g in enumerate(chosen)]
        # one row of groups: the chosen blocks at their slots, then the local part
        tokens, positions = [], []
        for g, s in zip(chosen, slots, strict=True):
            tokens += range(g * P, g * P + P)
            positions += range(s * P, s * P + P)
        tokens += range(first, i + 1)
        positions += [(topk + 1) * P + j - first for j in range(first, i + 1)]
        scores = turned(k[tokens], positions) @ mine * scale
        square = np.zeros((len(tokens), len(tokens)))
        square[-1] = scores
        outs[i] = weights(square, block)[-1] @ v[tokens]
    return outs, opened
