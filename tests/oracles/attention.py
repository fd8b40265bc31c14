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
