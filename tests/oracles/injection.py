"""IRI from its formula: a plain decoder run block by block in float64, with the last token's outputs rewritten."""

import torch


def inject(written, rates, sources, targets, lam):
    """``a~_l`` of every layer; `written[l]` [batch, dim] is what it writes, whatever was injected before it."""
    order = sorted(range(len(rates)), key=lambda i: (-float(rates[i]), i))
    chosen, aims = order[:sources], order[:targets]
    out = []
    for layer, own in enumerate(written):
        earlier = [k for k in chosen if k < layer]
        new = own.clone()
        if layer in aims and earlier:
            for k in earlier:
                new = new + lam * float(rates[k]) * written[k]
            new = new / torch.linalg.vector_norm(new, dim=-1, keepdim=True)
            new = new * torch.linalg.vector_norm(own, dim=-1, keepdim=True)
        out.append(new)
    return out
