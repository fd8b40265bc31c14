"""Probability on the choices of a question, one number at a time in float64."""

from math import exp, fsum


def plain_answers(logits, choices):
    """(pma, decided, prediction) of one question; `logits` a list, `choices` a list of ids."""
    top = max(logits)
    total = fsum(exp(x - top) for x in logits)
    p = [exp(logits[c] - top) / total for c in choices]
    pma = fsum(p)
    second, first = sorted(p)[-2:]
    return pma, 1 - pma < first - second, p.index(first)
