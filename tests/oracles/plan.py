"""The best choice of one option a head, by trying them all."""

import itertools

import numpy as np


def totals(which, errors, costs, calls, units, group):
    """(error, cost) of a choice ``[layers, heads]``."""
    error = cost = 0.0
    for layer, row in enumerate(which):
        for head, option in enumerate(row):
            error += errors[layer, head, option]
            cost += costs[layer, head, option]
        cost += sum(calls[layer, option] for option in set(row.tolist()))
        for start in range(0, len(row), group):
            cost += sum(units[layer, option] for option in set(row[start : start + group].tolist()))
    return error, cost


def best_choice(errors, costs, budget, on, calls, units, group):
    """The least of what is minimised within the budget; None where no choice is."""
    layers, heads, options = errors.shape
    found = []
    for flat in itertools.product(range(options), repeat=layers * heads):
        error, cost = totals(np.array(flat).reshape(layers, heads), errors, costs, calls, units, group)
        if np.isfinite(error) and (cost if on == "cost" else error) <= budget:
            found.append(error if on == "cost" else cost)
    return min(found, default=None)
