"""Sparse autoencoders and attribution from their formulas, row by row, in float64."""

import torch


def forward(sae, x):
    """(features, xhat, loss without lambda, sum of features) of one row."""
    w_e, b_e, w_d, b_d = (t.detach().double() for t in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias))
    s = float(sae.scale)
    f = torch.stack([torch.clamp(w @ (x.double() / s - b_d) + b, min=0) for w, b in zip(w_e, b_e, strict=True)])
    return f, s * (sum(a * w for a, w in zip(f, w_d, strict=True)) + b_d)


def sources(sae, q, k, v, sample, row, feature, allowed):
    """c_j from the matrix of weights of each head; allowed [heads, kv_len] of this row."""
    heads, width = q.shape[1], v.shape[-1]
    group = heads // k.shape[1]
    c = torch.zeros(k.shape[2], dtype=torch.float64)
    for h in range(heads):
        keys, values = k[sample, h // group].double(), v[sample, h // group].double()
        scores = (keys @ q[sample, h, row].double()) / q.shape[-1] ** 0.5
        if allowed[h].any():
            weights = scores.masked_fill(~allowed[h], -torch.inf).softmax(-1)
            c += weights * (values @ sae.encoder[feature, h * width : (h + 1) * width].detach().double())
    return c / float(sae.scale)
