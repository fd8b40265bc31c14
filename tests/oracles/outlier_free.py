"""Attention of arXiv 2502.06415 by its definition, in float64: weights, and one key and value more put beside them."""

import math

import torch


def outlier_free(kind, q, k, v, allow, *, key=None, value=None, scale=None):
    """z [heads, length, v_dim] of one sample; q, k, v [heads, length, d], key, value [heads, d], scale [heads, length].

    The extra key stands in front of the others, so its weight is the first column of a softmax over length + 1 keys.
    """
    heads, length, d = q.shape
    z = torch.zeros(heads, length, v.shape[-1], dtype=torch.float64)
    for h in range(heads):
        for i in range(length):
            seen = [j for j in range(length) if allow[i, j]]
            scores = [float(q[h, i] @ k[h, j]) / math.sqrt(d) for j in seen]
            if kind == "sigmoid":
                for j, s in zip(seen, scores, strict=True):
                    z[h, i] += v[h, j] / (1 + math.exp(-(s - math.log(len(seen)))))
                continue
            if kind in ("pair", "correction"):
                extra = float(q[h, i] @ key[h]) / math.sqrt(d)
                whole = torch.tensor([extra, *scores], dtype=torch.float64).softmax(0)
                for j, w in zip(seen, whole[1:], strict=True):
                    z[h, i] += w * v[h, j]
                if kind == "correction" and seen:  # the tokens' part at the size it has without the extra key
                    z[h, i] /= 1 - whole[0]
                z[h, i] += whole[0] * value[h]
                continue
            if seen:
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                z[h, i] = sum(w * v[h, j] for j, w in zip(seen, weights, strict=True))
            if kind == "value":
                z[h, i] += value[h]
            if kind == "scale":
                z[h, i] *= scale[h, i]
    return z
