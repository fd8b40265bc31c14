"""Linear attention over blocks, one query and one key at a time, float64."""

import torch


def block_linear(q, k, v, listed, block, feature, eps=1e-5):
    """``listed(sample, head, query block, key block) -> bool``."""
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                top, bottom = torch.zeros(v.shape[-1], dtype=torch.float64), torch.tensor(eps, dtype=torch.float64)
                for j in range(k.shape[2]):
                    if listed(b, h, i // block[0], j // block[1]):
                        weight = feature(q[b, h, i]) @ feature(k[b, h // group, j])
                        top, bottom = top + weight * v[b, h // group, j], bottom + weight
                out[b, h, i] = top / bottom
    return out
