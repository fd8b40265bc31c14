"""A self-attention network from its formula, one row at a time, float64."""

import math

import torch


def weights(x, w_q, w_k, allows, bias):
    """A [length, length] of one sample; allows(i, j) -> bool, bias(i, j) -> float."""
    q, k = x @ w_q.T, x @ w_k.T
    n, d = x.shape
    out = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        keys = [j for j in range(n) if allows(i, j)]
        e = [math.exp(float(q[i] @ k[j]) / math.sqrt(d) + bias(i, j)) for j in keys]
        for j, value in zip(keys, e, strict=True):
            out[i, j] = value / sum(e)
    return out


def run(x, layers, head, allows, bias=lambda i, j: 0.0, residual=False):
    """(logits of one sample, [P_0, P_1, ..]); layers: (w_q, w_k, w_v) each, head: (weight, bias) of linear layers."""
    share, found = torch.eye(len(x), dtype=torch.float64), []
    for w_q, w_k, w_v in layers:
        a = weights(x, w_q, w_k, allows, bias)
        share = a @ share
        found.append(share)
        update = a @ x @ w_v.T
        x = x + update if residual else update
    y = x[-1]
    for i, (weight, offset) in enumerate(head):
        y = weight @ y + offset
        if i < len(head) - 1:
            y = y.clamp(min=0)
    return y, found
