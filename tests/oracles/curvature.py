"""Factors and mask of curvature from their definitions: one token's gradient at a time, a sort of every product."""

import torch


def factors(model, layer, ids, labels, counted):
    """A and G of one linear layer by sums over tokens; a token's g from a difference added to its output alone."""
    added = {}

    def shift(module, given, output):
        added["x"] = given[0].detach()
        added["d"] = torch.zeros_like(output, requires_grad=True)
        return output + added["d"]

    handle = layer.register_forward_hook(shift)
    try:
        logits = model(ids)
    finally:
        handle.remove()
    total = 0.0
    for row, at in counted:
        total = total - logits[row, at].log_softmax(-1)[labels[row, at]]
    total.backward()
    A = sum(torch.outer(added["x"][r, p], added["x"][r, p]) for r, p in counted) / len(counted)
    G = sum(torch.outer(added["d"].grad[r, p], added["d"].grad[r, p]) for r, p in counted) / len(counted)
    return A, G


def mask(out, into, rho):
    """The fewest products, largest first, that reach the share."""
    products = torch.outer(out, into)
    falling, order = products.flatten().sort(descending=True)
    wanted = rho * products.sum()
    kept = torch.zeros(products.numel(), dtype=torch.bool)
    total = 0.0
    for value, index in zip(falling.tolist(), order.tolist(), strict=True):
        if total >= wanted:
            break
        kept[index] = True
        total += value
    return kept.view_as(products)
