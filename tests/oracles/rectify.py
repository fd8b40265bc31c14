"""Rectified sparse attention, one query block and one key block at a time, float64, from the paper's formulas."""

import math

import torch


def rectified(q, k, v, allows, q_blocks, k_blocks, gate="gapr", text=(), valid=None, scale=None):
    """``(out, kept, rest)``.

    Args:
        allows: ``(sample, head, i, j) -> bool`` for the sparse attention.
        q_blocks, k_blocks: lists of the tokens of each block; ``k_blocks`` without text.
        text: text keys.
        valid: ``(sample, j) -> bool``; None: all.
    """
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, q_len, dim = q.shape
    group = heads // k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    valid = valid or (lambda b, j: True)
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    kept = torch.zeros(batch, heads, q_len, dtype=torch.float64)
    rests = torch.zeros_like(out)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group], v[b, h // group]
            blocks = [[j for j in block if valid(b, j)] for block in k_blocks]
            words = [j for j in text if valid(b, j)]
            for rows in q_blocks:
                if not rows:
                    continue
                mean_q = sum(q[b, h, i] for i in rows) / len(rows)
                off_q = sum((q[b, h, i] - mean_q).abs() for i in rows) / len(rows)
                # the paper's pooled softmax, then a block's entry counted once for each of its tokens
                entries = {}
                for n, block in enumerate(blocks):
                    if block:
                        mean_k = sum(keys[j] for j in block) / len(block)
                        entries[n] = float(torch.exp(scale * (mean_q @ mean_k)))
                told = {j: float(torch.exp(scale * (mean_q @ keys[j]))) for j in words}
                total = sum(entries.values()) + sum(told.values())
                entries, told = {n: e / total for n, e in entries.items()}, {j: e / total for j, e in told.items()}
                whole = sum(e * len(blocks[n]) for n, e in entries.items()) + sum(told.values())
                share = {n: e * len(blocks[n]) / whole for n, e in entries.items()}
                stands, rest = sum(told.values()) / whole, torch.zeros(v.shape[-1], dtype=torch.float64)
                for n, block in enumerate(blocks):
                    if not block:
                        continue
                    mean_k = sum(keys[j] for j in block) / len(block)
                    off_k = sum((keys[j] - mean_k).abs() for j in block) / len(block)
                    gain, loss = abs(mean_q @ mean_k), abs(off_q @ mean_k) + abs(mean_q @ off_k)
                    may = {"all": True, "none": False, "gapr": bool(gain > loss)}[gate]
                    critical = any(allows(b, h, i, j) for i in rows for j in block)
                    if critical or not may:
                        stands = stands + share[n]
                    else:
                        rest = rest + share[n] * sum(values[j] for j in block) / len(block)
                for i in rows:
                    seen = [j for j in range(k.shape[2]) if allows(b, h, i, j)]
                    z = torch.zeros(v.shape[-1], dtype=torch.float64)
                    if seen:
                        weights = torch.softmax(torch.stack([scale * (q[b, h, i] @ keys[j]) for j in seen]), 0)
                        z = sum(w * values[j] for w, j in zip(weights, seen, strict=True))
                    kept[b, h, i], rests[b, h, i] = stands, rest
                    out[b, h, i] = stands * z + rest
    return out, kept, rests
