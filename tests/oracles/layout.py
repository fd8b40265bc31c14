"""Layouts by evaluating every pair: block (i, j) is listed iff it has an allowed pair, full iff all of its are."""

import torch


def pairs(pattern, q_len, kv_len, q_start=None, head=None, sample=None):
    """Bool [q_len, kv_len]."""
    start = kv_len - q_len if q_start is None else q_start
    q, k = torch.arange(start, start + q_len)[:, None], torch.arange(kv_len)[None]
    given = [None if x is None else torch.tensor(x) for x in (head, sample)]
    return pattern.allows(q, k, *given).expand(q_len, kv_len)


def blocks(allowed, block):
    """(listed, full), each bool [query blocks, key blocks], of an allowed matrix [q_len, kv_len]."""
    (q_len, kv_len), (bq, bk) = allowed.shape, (block, block) if isinstance(block, int) else block
    listed = torch.zeros(-(-q_len // bq), -(-kv_len // bk), dtype=torch.bool)
    full = listed.clone()
    for i in range(listed.shape[0]):
        for j in range(listed.shape[1]):
            cells = allowed[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            listed[i, j], full[i, j] = cells.any(), cells.all()
    return listed, full


def layout(pattern, q_len, kv_len, block, q_start=None):
    """(listed, full), each bool [samples, heads, query blocks, key blocks]."""
    every = [
        [blocks(pairs(pattern, q_len, kv_len, q_start, h, b), block) for h in range(pattern.heads or 1)]
        for b in range(pattern.samples or 1)
    ]
    return tuple(torch.stack([torch.stack([head[n] for head in sample]) for sample in every]) for n in range(2))
