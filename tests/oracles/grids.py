"""Grids pair by pair, from the definitions, in plain loops."""

import itertools

import torch


def neighborhood_keys(q, n, w, s=1, d=1, causal=False):
    """The keys of query q on one axis of n coordinates: window w, stride s, dilation d."""
    residue, i = q % d, q // d
    n_group = len(range(residue, n, d))
    start = i - i % s
    if causal:
        leader = min(start + s - 1, n_group - 1)
        group = range(max(leader - w + 1, 0), i + 1)
    else:
        leader = min(start + s // 2, n_group - 1)
        first = leader - w // 2
        first = 0 if first < 0 else first
        first = n_group - w if first > n_group - w else first
        group = range(first, first + w)
    return {residue + d * j for j in group}


def grid_mask(axes, shape):
    """Allowed pairs of a row-major grid, `[tokens, tokens]`; `axes[d](q, k)` says whether axis d allows the pair."""
    cells = list(itertools.product(*(range(n) for n in shape)))
    return torch.tensor([[all(a(x, y) for a, x, y in zip(axes, q, k, strict=True)) for k in cells] for q in cells])


def blocks(mask, bq, bk):
    """(any, all) of every block of a mask, short last blocks judged on the cells they have."""
    tall, wide = -(-mask.shape[0] // bq), -(-mask.shape[1] // bk)
    cut = [[mask[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk] for j in range(wide)] for i in range(tall)]
    some = torch.tensor([[bool(c.any()) for c in row] for row in cut])
    return some, torch.tensor([[bool(c.all()) for c in row] for row in cut])
