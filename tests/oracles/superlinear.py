"""Superlinear attention one query at a time, from the paper's formulas, in float64."""

import math

import numpy as np

from tests.oracles.landmark import softmax


def anchors(t, p, s):
    """``(i, a_i)`` of a query at t, and how many keys its window holds."""
    found, i = [], s + 1
    while t - math.floor(i**p + 1e-9) + 1 >= 0:
        found.append(t - math.floor(i**p + 1e-9) + 1)
        i += 1
    return found, math.floor((s + 1) ** p + 1e-9) - 1


def spans(t, p, s, b, f):
    """Sets of keys, one an anchor, and the window."""
    found, window = anchors(t, p, s)
    r = (t + 1) ** (1 - 1 / p)
    ahead, behind = math.ceil(f * r - 1e-9), math.ceil(b * r - 1e-9)
    below = t - window
    return (
        [set(range(max(a - behind, 0), min(a + ahead, below) + 1)) for a in found],
        set(range(max(below + 1, 0), t + 1)),
    )


def attend(q1, q2, k, v, p=2, s=3, keep=3, b=2, f=0):
    """``(out, chosen anchors)`` of one head; ``[length, dim]`` each."""
    q1, q2, k, v = (np.array(x.tolist()) for x in (q1, q2, k, v))
    scale, outs, chosen = k.shape[1] ** -0.5, np.zeros((len(q1), v.shape[1])), []

    def over(t, keys):
        keys = sorted(keys)
        return softmax(scale * k[keys] @ q2[t]) @ v[keys]

    for t in range(len(q1)):
        found, (each, window) = anchors(t, p, s)[0], spans(t, p, s, b, f)
        order = sorted(range(len(found)), key=lambda j: (-(k[found[j]] @ q1[t]), j))[:keep]
        chosen.append(sorted(found[j] for j in order))
        if not order:
            outs[t] = over(t, window)
            continue
        shares = softmax(np.array([scale * k[found[j]] @ q1[t] for j in order]))
        outs[t] = sum(w * over(t, window | each[j]) for w, j in zip(shares, order, strict=True))
    return outs, chosen
