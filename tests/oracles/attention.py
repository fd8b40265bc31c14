"""Dense attention in float64, straight from the formulas. Slow on purpose."""

import torch


def allowed_pairs(shape, mask=None, is_causal=False, pattern=None, q_start=None, valid=None):
    """Bool [batch, heads, q_len, kv_len] of the pairs that may meet."""
    _, _, q_len, kv_len = shape
    start = q_start if q_start is not None else 0 if is_causal else kv_len - q_len
    i = torch.arange(q_len)[:, None] + start
    j = torch.arange(kv_len)[None]
    allowed = torch.ones(shape, dtype=torch.bool)
    if is_causal:
        allowed &= j <= i
    if pattern is not None:
        allowed &= pattern.allows(i, j)
    if mask is not None:
        allowed &= mask if mask.dtype == torch.bool else mask > -1e30
    if valid is not None:
        allowed &= valid[:, None, :, None]
    return allowed


def attention(
    q, k, mask=None, is_causal=False, pattern=None, scale=None, q_start=None, softcap=None, sink=None, valid=None
):
    """(weights [b, h, q, k], lse [b, h, q], scores [b, h, q, k] with -inf where not allowed), all float64."""
    q, k = q.double(), k.double()
    _, heads, _, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    allowed = allowed_pairs(tuple(scores.shape), mask, is_causal, pattern, q_start, valid)
    scores = scores.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else torch.full(scores.shape[:-1], -torch.inf).double()
    if sink is not None:
        full = torch.logaddexp(lse, sink.double()[None, :, None].expand_as(lse))
        lse = torch.where(lse == -torch.inf, lse, full)
    weights = torch.where(allowed, (scores - lse[..., None]).exp(), 0.0)
    return weights, lse, scores


def entropy(weights, sink_mass=None):
    """``-sum P log P`` per row; a sink's mass counts as one more outcome."""
    total = -torch.special.xlogy(weights, weights).sum(-1)
    return total if sink_mass is None else total - torch.special.xlogy(sink_mass, sink_mass)


def offsets(weights, lo, hi, start):
    """``sum_i P[i, i - o]`` for lo <= o < hi. Row r is query r + start: its key i - o stands on diagonal start - o."""
    return torch.stack([weights.diagonal(start - o, -2, -1).sum(-1) for o in range(lo, hi)], -1)


PHI = {
    "exp": torch.exp,
    "softplus": lambda s: torch.log1p(torch.exp(s)),
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    "relu": lambda s: s.clamp(min=0),
    "elu1": lambda s: torch.where(s > 0, s + 1, torch.exp(s)),
    "taylor2": lambda s: 1 + s + s**2 / 2,
    "identity": lambda s: s,
}


def attended(
    q, k, v, pattern=None, q_start=None, bias=None, scale=None, softcap=None, sink=None, phi=None, shift=0.0, l1=True
):
    """(out, lse) of attention under a pattern, head by head in float64, differentiable; phi None: the softmax."""
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    start = kv_len - q_len if q_start is None else q_start
    i, j = torch.arange(q_len)[:, None] + start, torch.arange(kv_len)[None]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            g = h * kv_heads // heads
            s = q[b, h].double() @ k[b, g].double().T * (dim**-0.5 if scale is None else scale)
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            ok = torch.ones(q_len, kv_len, dtype=torch.bool)
            if pattern is not None:
                ok = ok & pattern.allows(i, j, torch.tensor(h), torch.tensor(b))
            if bias is not None:
                part = bias.double().expand(batch, heads, q_len, kv_len)[b, h]
                ok = ok & (part > -torch.inf)
                s = s + torch.where(ok, part, 0)
            s = torch.where(ok, s, 0)
            if phi is None:
                top = torch.where(ok, s, -torch.inf).amax(1, keepdim=True).detach() if kv_len else s.new_zeros(q_len, 1)
                top = torch.where(top > -torch.inf, top, 0)
                value = torch.where(ok, torch.exp(s - top), 0)
            else:
                top = s.new_zeros(q_len, 1)
                n = ok.sum(1, keepdim=True).clamp(min=1).double()
                value = torch.where(ok, PHI[phi](torch.where(ok, s - (n.log() if shift == "log_n" else shift), 0)), 0)
            total = value.sum(1, keepdim=True)
            some = total != 0
            safe = torch.where(some, total, 1)
            lse = safe.log() + top
            if sink is not None:
                lse = torch.logaddexp(lse, sink[h].double())
                value, safe = value * torch.exp(top - lse), torch.ones_like(safe)
            outs.append((value / safe if l1 else value) @ v[b, g].double())
            lses.append(torch.where(some, lse, -torch.inf)[:, 0])
    if not outs:
        return v.new_zeros(batch, heads, q_len, v.shape[3]).double(), q.new_zeros(batch, heads, q_len).double()
    return torch.stack(outs).unflatten(0, (batch, heads)), torch.stack(lses).unflatten(0, (batch, heads))
