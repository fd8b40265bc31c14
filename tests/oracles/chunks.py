"""LongHeads one query at a time, in float64: chunk keys, choices, and chosen chunks gathered and rotated anew."""

import numpy as np

from tests.oracles.landmark import softmax
from tests.oracles.rotary import rotate


def chunk_key(q, k, v, inv_freq):
    """The paper's key of one chunk."""
    at = np.arange(len(k))
    q, k = rotate(q, at, inv_freq), rotate(k, at, inv_freq)
    scale = k.shape[1] ** -0.5
    o = np.stack([softmax(scale * k @ x) @ v for x in q])
    return softmax(scale * k @ o.mean(0)) @ k


def read(q, k, v, chunk, total, inv_freq, representation="paper", first=1, last=2):
    """``(out, chosen)`` of one head; q, k, v ``[length, dim]`` before rotation."""
    q, k, v = (np.array(x.tolist()) for x in (q, k, v))
    n = len(q)
    outs, chosen = np.zeros((n, v.shape[1])), []
    for t in range(n):
        own = t // chunk
        forced = {g for g in range(own + 1) if g < first or g > own - last}
        scores = {}
        for g in set(range(own)) - forced:
            part = slice(g * chunk, (g + 1) * chunk)
            if representation == "paper":
                scores[g] = q[t] @ chunk_key(q[part], k[part], v[part], inv_freq)
            else:
                scores[g] = {"mean": np.mean, "max": np.max}[representation](k[part] @ q[t])
        rest = sorted(scores, key=lambda g: (-scores[g], g))[: total - len(forced)]
        picked = sorted(forced | set(rest))
        chosen.append(picked)
        tokens = [j for g in picked for j in range(g * chunk, (g + 1) * chunk) if j <= t]
        positions = [
            s * chunk + j % chunk for s, g in enumerate(picked) for j in range(g * chunk, (g + 1) * chunk) if j <= t
        ]
        keys = rotate(k[tokens], np.array(positions), inv_freq)
        mine = rotate(q[t : t + 1], np.array([(len(picked) - 1) * chunk + t % chunk]), inv_freq)[0]
        outs[t] = softmax(keys @ mine * q.shape[1] ** -0.5) @ v[tokens]
    return outs, chosen
