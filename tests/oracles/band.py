"""Row and column attention over pairs of tokens, on the whole square, one cell at a time, float64."""

import torch


def turn(x, place, theta=10_000.0):
    """Rotary position: pair k of (x_k, x_{k + d/2}) turned by place * theta^(-2k/d)."""
    d = len(x)
    out = torch.empty_like(x)
    for k in range(d // 2):
        angle = torch.tensor(place / theta ** (2 * k / d), dtype=torch.float64)
        a, b = x[k], x[k + d // 2]
        out[k], out[k + d // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attention(cells, places, query, weight, bias):
    """One head: the query is the cell at index `query`; cells [m, d], weight [3d, d], bias [3d]."""
    d = cells.shape[1]
    q, k, v = (cells @ weight.T + bias).split(d, dim=1)
    scores = torch.stack([turn(q[query], places[query]) @ turn(k[m], places[m]) for m in range(len(cells))]) / d**0.5
    return scores.softmax(0) @ v


def plus(square, width, length, layer, joined):
    """``square [n, n, d]`` to ``[n, n, d]``; zeros where |i - j| > width or beyond length."""
    n, _, d = square.shape
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    row, column = torch.zeros(n, n, d, dtype=torch.float64), torch.zeros(n, n, d, dtype=torch.float64)
    for i in range(length):
        near = [j for j in range(length) if abs(i - j) <= width]
        cells = torch.stack([square[i, j] for j in near])
        for m, j in enumerate(near):
            row[i, j] = attention(cells, near, m, p["row_qkv.weight"], p["row_qkv.bias"])
        cells = torch.stack([square[j, i] for j in near])  # the column of tail i
        for m, j in enumerate(near):
            column[j, i] = attention(cells, near, m, p["column_qkv.weight"], p["column_qkv.bias"])
    out = torch.zeros(n, n, d, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            if abs(i - j) <= width:
                beside = column[i, j] if joined == "cell" else column[j, i]
                out[i, j] = torch.cat([row[i, j], beside]) @ p["merge.weight"].T + p["merge.bias"]
    return out
