"""Attention on integers, block by block in float64 and Python integers, and the bound of its error. Slow on purpose."""

import torch


def rounded(x, bits, rows):
    """(integers, scale of each row): signed, one scale for `rows` rows of a matrix."""
    most = 2 ** (bits - 1) - 1
    values, scales = torch.zeros(x.shape, dtype=torch.int64), torch.zeros(len(x), dtype=torch.float64)
    for a in range(0, len(x), rows):
        scale = float(x[a : a + rows].abs().max()) / most if x[a : a + rows].numel() else 0.0
        scales[a : a + rows] = scale
        if scale:
            values[a : a + rows] = (x[a : a + rows].double() / scale).round().clamp(-most, most).long()
    return values, scales


def quantized(q, k, v, allowed, scale, qk_bits, pv_bits, rows, block):
    """(out, lse) of one head; `allowed` bool [q_len, kv_len]."""
    (qi, qs), (ki, ks) = rounded(q, qk_bits, rows[0]), rounded(k, qk_bits, rows[1])
    vi, vs = rounded(v, pv_bits, block[1])
    scores = torch.where(allowed, (qi @ ki.T).double() * qs[:, None] * ks[None] * scale, -torch.inf)
    lse = torch.logsumexp(scores, 1)
    weights = torch.where(allowed, (scores - lse[:, None]).exp(), 0)
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for a in range(0, len(q), block[0]):
        for b in range(0, len(k), block[1]):
            part = weights[a : a + block[0], b : b + block[1]]
            step = float(part.max()) / (2**pv_bits - 1)
            if step:
                whole = (part / step).round().clamp(max=2**pv_bits - 1).long() @ vi[b : b + block[1]]
                out[a : a + block[0]] += step * float(vs[b]) * whole.double()
    return out, lse


def bound(q, k, v, allowed, scale, qk_bits, pv_bits, rows, block):
    """(exact out, largest error of each output) of one head, from the scales alone."""
    q, k, v = q.double(), k.double(), v.double()
    (qi, qs), (_, ks), (_, vs) = (
        rounded(q, qk_bits, rows[0]),
        rounded(k, qk_bits, rows[1]),
        rounded(v, pv_bits, block[1]),
    )
    near = qi.double() * qs[:, None]
    off = abs(scale) / 2 * (qs[:, None] * k.abs().sum(1)[None] + ks[None] * near.abs().sum(1)[:, None])
    off = torch.where(allowed, off, 0).amax(1, keepdim=True)
    weights = torch.where(allowed, q @ k.T * scale, -torch.inf).softmax(1)
    weights = torch.where(allowed, weights, 0)  # rows without a key
    most = weights * (2 * off).exp()
    step = torch.zeros_like(weights)
    for a in range(0, len(q), block[0]):
        for b in range(0, len(k), block[1]):
            at = slice(a, a + block[0]), slice(b, b + block[1])
            step[at] = most[at].max() / (2**pv_bits - 1) / 2
    step = torch.where(most > 0, step, 0)
    half = vs[:, None] / 2
    return weights @ v, ((2 * off).exp() - 1) * (weights @ v.abs()) + step @ v.abs() + (most + step) @ half.expand_as(v)
