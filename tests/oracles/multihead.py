"""Multi-head attention from explicit weights, in float64, one head and one query at a time."""

import math

import torch


def rotated(x, positions, theta):
    """Each pair (i, i + d/2) of a vector as a complex number, times exp(i p theta^(-2i/d))."""
    half = x.shape[-1] // 2
    turn = [[p * theta ** (-2 * i / x.shape[-1]) for i in range(half)] for p in positions]
    numbers = torch.complex(x[..., :half], x[..., half:])
    numbers = numbers * torch.polar(torch.ones(len(positions), half).double(), torch.tensor(turn).double())
    return torch.cat([numbers.real, numbers.imag], -1)


def multihead(layer, x, pattern, theta=None):
    """``W_o concat_h sum_j P_ij v_j`` of a layer without plugs but rotary positions; x ``[batch, length, dim]``."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x = x.detach().double()
    batch, length, _ = x.shape
    i, j = torch.arange(length)[:, None], torch.arange(length)
    allow = pattern.allows(i, j, torch.arange(layer.heads)[:, None, None]).expand(layer.heads, length, length)
    group = layer.heads // layer.kv_heads
    out = torch.zeros(batch, length, layer.heads, layer.v_dim, dtype=torch.float64)

    def part(name, head, width):
        rows = slice(head * width, (head + 1) * width)
        bias = w.get(f"{name}.bias")
        return x @ w[f"{name}.weight"][rows].T + (0 if bias is None else bias[rows])

    for h in range(layer.heads):
        q = part("q_proj", h, layer.head_dim)
        k, v = part("k_proj", h // group, layer.head_dim), part("v_proj", h // group, layer.v_dim)
        if theta is not None:
            q, k = rotated(q, range(length), theta), rotated(k, range(length), theta)
        for b in range(batch):
            for i in range(length):
                keys = allow[h, i].nonzero().flatten()
                if len(keys):
                    scores = k[b, keys] @ q[b, i] / math.sqrt(layer.head_dim)
                    out[b, i, h] = torch.softmax(scores, 0) @ v[b, keys]
    y = out.flatten(2) @ w["o_proj.weight"].T
    return y + w["o_proj.bias"] if "o_proj.bias" in w else y
