"""The indicator stands at the end of the user's turn, where the score is high, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.conflict import Conflict
from regard.train.indicator import with_indicator


def test_it_makes_what_the_task_writes_itself():
    plain, marked = Conflict(chat=True), Conflict(chat=True, indicator=True)
    a, b = (t.batch(20, torch.Generator().manual_seed(0)) for t in (plain, marked))
    at = a.spans["answer"][:, 0] - 1  # <assistant>
    got = with_indicator(a.input_ids, a.labels, at, torch.ones(20), plain.vocabulary["[IND]"], threshold=0.6)
    assert torch.equal(got.ids, b.input_ids)
    assert torch.equal(got.labels, b.labels)
    assert got.marked.all()


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1, width=32)), min_size=1, max_size=8), st.floats(0, 1))
def test_rows_one_by_one(rows, threshold):
    at, score = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    ids = torch.arange(len(rows) * 6).view(-1, 6) + 10
    got = with_indicator(ids, ids * 2, at, score, 7, threshold=threshold, pad=3)
    for i, (place, value) in enumerate(rows):
        row, said = ids[i].tolist(), (ids[i] * 2).tolist()
        if value > threshold:
            assert got.ids[i].tolist() == [*row[:place], 7, *row[place:]]
            assert got.labels[i].tolist() == [*said[:place], -100, *said[place:]]
        else:
            assert got.ids[i].tolist() == [*row, 3]
            assert got.labels[i].tolist() == [*said, -100]


def test_a_quantile_marks_a_share():
    ids = torch.zeros(10, 2, dtype=torch.long)
    got = with_indicator(ids, ids, torch.ones(10, dtype=torch.long), torch.arange(10.0), 1, quantile=0.8)
    assert got.marked.tolist() == [False] * 8 + [True] * 2
    for wrong in ({}, {"threshold": 0.5, "quantile": 0.5}, {"quantile": 2}):
        with pytest.raises(ValueError, match="quantile"):
            with_indicator(ids, ids, torch.ones(10, dtype=torch.long), torch.arange(10.0), 1, **wrong)
    with pytest.raises(ValueError, match=r"at must be in 0..2, got 3..3"):
        with_indicator(ids, ids, torch.full((10,), 3), torch.arange(10.0), 1, quantile=0.5)
