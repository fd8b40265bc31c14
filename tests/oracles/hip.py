"""HiP by the text, one query block at a time, in plain Python: lists of ranges, halves, and sorted scores."""

import math


def chosen_blocks(q, k, *, k_keys, block, stride, window, sink, q_start, may=None):
    """Blocks of one head: q [q_len, dim], k [kv_len, dim]; may[row][block] says what is a candidate (None: all)."""
    (bq, bk), q_len, kv_len = block, len(q), len(k)
    m, rows, dots = k_keys // bk, [], 0
    for first in range(0, q_len, bq):
        queries = range(first, min(first + bq, q_len))
        last = q_start + queries[-1]
        whole = [j for j in range(kv_len // bk) if j * bk >= sink // bk * bk and (j + 1) * bk <= last - window + 1]
        if may is not None:
            allowed = [j for j in whole if may[len(rows)][j]]
            whole = list(range(allowed[0], allowed[-1] + 1)) if allowed else []
        n = len(whole)
        if n <= m:
            ranges = [(j, j + 1) for j in whole]
        else:
            ranges = [(whole[0] + i * n // m, whole[0] + (i + 1) * n // m) for i in range(m)]
        scored = list(queries)[::stride]
        while any(b - a > 1 for a, b in ranges):
            halves = []
            for a, b in ranges:
                middle = a + math.ceil((b - a) / 2)
                halves += [(a, middle)] + ([(middle, b)] if middle < b else [])
            scores = []
            for a, b in halves:
                centre = a + (b - a) // 2
                keys = range(centre * bk, centre * bk + bk)
                dots += len(keys) * len(scored)
                best = max(float(q[i] @ k[j]) for i in scored for j in keys)
                scores.append(best if may is None or may[len(rows)][centre] else -math.inf)
            order = sorted(range(len(halves)), key=lambda h: (-scores[h], h))[:m]
            ranges = [halves[h] for h in sorted(order) if scores[h] > -math.inf]
        rows.append([a for a, _ in ranges if may is None or may[len(rows)][a]])
    return rows, dots
