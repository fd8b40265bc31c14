"""Distillation of weights, and budgets that multipliers keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regard.train.objectives import BudgetMultiplier, weights_mse


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_the_error_of_weights_is_the_formula_and_only_the_guess_learns(batch, heads, queries, keys, seed):
    g = seeded(seed)
    a = torch.randn(batch, heads, queries, keys, generator=g, dtype=torch.double, requires_grad=True)
    p = torch.randn(batch, heads, queries, keys, generator=g, dtype=torch.double, requires_grad=True)
    loss = weights_mse(a, p, factor=0.01)
    want = 0.01 * sum(((x - y) ** 2).sum() for x, y in zip(a.detach().numpy(), p.detach().numpy(), strict=True)) / batch
    np.testing.assert_allclose(loss.item(), want)
    loss.backward()
    assert p.grad is None
    torch.testing.assert_close(a.grad, 0.02 * (a - p).detach() / batch)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"weights must have the shape of predicted, \[1, 1, 2, 3\], got \[1, 1, 2, 2\]"
    ):
        weights_mse(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 2))


def test_the_penalty_is_the_sum_over_tasks_of_their_means():
    budget = BudgetMultiplier([0.45, 1.0], seeded())
    share, task = torch.tensor([0.2, 0.7, 0.9]), torch.tensor([0, 0, 1])
    l1, l2 = budget.linear.detach(), budget.square.detach()
    assert ((l1 >= 0) & (l1 < 0.5) & (l2 >= 0) & (l2 < 0.5)).all()
    off = [0.25, 0.25, 0.1]
    want = (l1[0] * off[0] + l2[0] * off[0] ** 2 + l1[0] * off[1] + l2[0] * off[1] ** 2) / 2
    want += l1[1] * off[2] + l2[1] * off[2] ** 2
    torch.testing.assert_close(budget(share, task).detach(), want)
    assert budget(torch.zeros(0), torch.zeros(0, dtype=torch.long)) == 0


def test_multipliers_climb_until_the_budget_is_kept():
    """min over x, max over l of (x - 1)^2 + penalty(x; t = 0): x is driven to its target, and l stops there."""
    budget = BudgetMultiplier([0.0], seeded(), start=0.0)
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([x, *budget.parameters()], lr=0.02)
    before = budget.linear.item()
    for _ in range(2000):
        optimizer.zero_grad()
        ((x - 1).square().sum() + budget(x, torch.zeros(1, dtype=torch.long))).backward()
        assert budget.linear.grad.item() <= 0  # a step against it is a step up
        optimizer.step()
        assert budget.linear.item() >= before  # they only grow
        before = budget.linear.item()
    assert abs(x.item()) < 0.05
    assert budget.linear.item() == pytest.approx(2.0, abs=0.1)  # what balances the slope of (x - 1)^2 at 0


def test_a_share_on_target_pays_nothing_and_moves_nothing():
    budget = BudgetMultiplier([0.5], seeded())
    loss = budget(torch.tensor([0.5, 0.5], requires_grad=True), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 0
    assert budget.linear.grad.abs().sum() == 0


def test_refusals():
    with pytest.raises(ValueError, match=r"targets must be shares in \[0, 1\], at least one, got \[1.5\]"):
        BudgetMultiplier([1.5])
    with pytest.raises(ValueError, match="targets must be shares"):
        BudgetMultiplier([])
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        BudgetMultiplier([0.5], start=-1)
    budget = BudgetMultiplier([0.5, 0.5])
    with pytest.raises(ValueError, match=r"task must be in 0\.\.1, got 0\.\.2"):
        budget(torch.zeros(2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"share and task must be \[batch\], got \[2\] and \[3\]"):
        budget(torch.zeros(2), torch.zeros(3, dtype=torch.long))
