"""Probability on choices against the plain sum; what moving the rest can change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.answers import answer_mass, of, pmi
from tests.oracles.answers import plain_answers

generators = st.integers(0, 10**6).map(lambda seed: torch.Generator().manual_seed(seed))


@given(
    generators, st.integers(1, 5), st.integers(2, 6), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_every_figure_is_the_plain_one(generator, n, count, dtype):
    logits = (4 * torch.randn(n, 9, generator=generator)).to(dtype)
    choices = torch.stack([torch.randperm(9, generator=generator)[:count] for _ in range(n)])
    got = answer_mass(logits, choices)
    for i in range(n):
        pma, decided, first = plain_answers(logits[i].double().tolist(), choices[i].tolist())
        assert float(got.pma[i]) == pytest.approx(pma, abs=1e-12)
        assert float(got.competition[i]) == pytest.approx(1 - pma, abs=1e-12)
        if abs(got.probability[i].topk(2).values.diff().abs().item() - (1 - pma)) > 1e-9:
            assert bool(got.decided[i]) == decided
        assert got.probability[i, got.predictions[i]] == got.probability[i, first] == got.probability[i].max()


@given(generators)
def test_where_it_is_decided_no_move_of_the_rest_changes_the_first(generator):
    logits = 3 * torch.randn(20, 8, generator=generator)
    choices = torch.arange(4).repeat(20, 1)
    got = answer_mass(logits, choices)
    for p, rest, decided, first in zip(got.probability, got.competition, got.decided, got.predictions, strict=True):
        moved = [(p + rest * torch.eye(4, dtype=p.dtype)[k]).argmax() == first for k in range(4)]
        assert all(moved) == bool(decided) or abs(p.topk(2).values.diff().abs() - rest) < 1e-12


def test_longer_choices_are_sums_of_logs_and_wrong_ones_are_refused():
    logs = torch.tensor([[0.5, 0.25, 0.125]]).log()
    got = of(logs)
    assert float(got.pma) == pytest.approx(0.875)
    assert bool(got.decided)  # 0.125 is less than 0.25
    with pytest.raises(ValueError, match="same token twice"):
        answer_mass(torch.zeros(1, 5), torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="at least 2"):
        answer_mass(torch.zeros(1, 5), torch.tensor([[1]]))


def test_pmi_takes_away_what_the_premise_says():
    logits, premise = torch.tensor([[2.0, 1.9, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    choices = torch.tensor([[0, 1]])
    assert answer_mass(logits, choices).predictions.tolist() == [0]
    assert pmi(logits, premise, choices).tolist() == [1]
