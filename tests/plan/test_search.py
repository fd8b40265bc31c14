"""The search: against every choice on small problems, its bound on larger ones, what it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.plan.search import SETS, search
from tests.oracles.plan import best_choice, totals


def problem(seed, layers, groups, group, options, charges):
    rng = np.random.default_rng(seed)
    heads = groups * group
    errors = rng.random((layers, heads, options)) ** 2
    errors[..., 0] = 0  # dense
    off = rng.random(errors.shape) < 0.15
    off[..., 0] = False
    costs = rng.random((layers, heads, options))
    calls, units = (rng.random((layers, options)) * charges * s for s in (1.0, 0.3))
    return np.where(off, np.inf, errors), costs, calls, units, rng


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 2),
    groups=st.integers(1, 2),
    group=st.integers(1, 2),
    options=st.integers(1, 3),
    charges=st.sampled_from([0, 1]),
    on=st.sampled_from(["cost", "error"]),
)
def test_equals_brute_force(seed, layers, groups, group, options, charges, on):
    errors, costs, calls, units, rng = problem(seed, layers, groups, group, options, charges)
    finite = np.where(np.isfinite(errors), errors, 0)
    most = finite.max(-1).sum() if on == "error" else costs.max(-1).sum() + calls.sum() + units.sum() * groups
    budget = float(rng.random() * most)
    want = best_choice(errors, costs, budget, on, calls, units, group)
    if want is None:
        with pytest.raises(ValueError, match="met by no choice"):
            search(errors, costs, budget, on=on, calls=calls, units=units, group=group)
        return
    found = search(errors, costs, budget, on=on, calls=calls, units=units, group=group)
    np.testing.assert_allclose(
        (found.error, found.cost), totals(found.which, errors, costs, calls, units, group), atol=1e-12
    )
    minimised, spent = (found.error, found.cost) if on == "cost" else (found.cost, found.error)
    assert found.optimal
    assert minimised == pytest.approx(want, abs=1e-9)
    assert spent <= budget * (1 + 1e-8)


def test_bound_and_feasible_on_a_model_sized_problem():
    errors, costs, calls, units, _ = problem(0, 6, 4, 2, SETS, 0.3)
    errors = np.sort(errors, -1)
    costs = np.sort(costs, -1)[..., ::-1]
    for budget in (20.0, 25.0):
        found = search(errors, costs, budget, calls=calls, units=units, group=2)
        assert found.cost <= budget * (1 + 1e-8)
        assert found.bound <= found.error <= found.bound * 1.03
        assert found.price > 0


def test_more_options_than_sets_are_still_within_the_budget():
    errors, costs, calls, units, _ = problem(1, 2, 2, 2, SETS + 3, 0.3)
    least = search(errors, costs, 1e9, on="error", calls=calls, units=units, group=2)
    found = search(errors, costs, least.cost * 1.3, calls=calls, units=units, group=2)
    assert found.cost <= least.cost * 1.3 * (1 + 1e-8)
    assert not found.optimal


def test_sharing_an_option_saves_its_call():
    # Alone, each head would take the option that suits it; one call for both is cheaper.
    errors = [[[0.0, 0.3, 0.2], [0.0, 0.2, 0.3]]]
    costs = [9.0, 1.0, 1.0]
    apart = search(errors, costs, 2.0)
    shared = search(errors, costs, 3.5, calls=[1.0, 1.0, 1.0])
    assert apart.which.tolist() == [[2, 1]]
    assert shared.which[0, 0] == shared.which[0, 1]
    assert shared.cost == 3.0


def test_free_budget_takes_the_least_error_at_the_least_cost():
    found = search([[[0.0, 0.0, 1.0]]], [3.0, 2.0, 1.0], 100)
    assert found.which.tolist() == [[1]]
    assert (found.price, found.optimal) == (0.0, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"errors": np.zeros((2, 3))}, "errors must be"),
        ({"errors": [[[np.nan, 1.0]]]}, "NaN at"),
        ({"errors": [[[np.inf, np.inf]]]}, "no option"),
        ({"costs": [1.0]}, "costs must be"),
        ({"costs": [1.0, -1.0]}, "costs must be finite"),
        ({"budget": float("nan")}, "NaN"),
        ({"budget": 0.5}, "the least is 1"),
        ({"on": "time"}, "on must be"),
        ({"group": 2}, "group must divide"),
        ({"calls": [1.0, np.inf]}, "calls must be finite"),
    ],
)
def test_refuses(change, said):
    given = {"errors": [[[0.0, 1.0]]], "costs": [2.0, 1.0], "budget": 2.0} | change
    with pytest.raises(ValueError, match=said):
        search(given.pop("errors"), given.pop("costs"), given.pop("budget"), **given)
