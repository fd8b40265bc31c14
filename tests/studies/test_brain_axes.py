"""Brain axes, shrunk: the simulated reader against plain regression, controls that are controls, a closed gate."""

import numpy as np
import pytest
import torch

from regard.studies import brain_axes as study
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def bed():
    return study.Words(load(study.MODEL).model, "cpu")


def test_every_claim_is_judged(monkeypatch):
    monkeypatch.setitem(study.TEXT, "smoke", 200)
    monkeypatch.setitem(study.SEEDS, "smoke", 1)
    monkeypatch.setitem(study.STEERED, "smoke", (1, 2))
    monkeypatch.setattr(study, "PERMUTATIONS", 5)
    monkeypatch.setattr(study, "RANDOM", 1)
    monkeypatch.setattr(study, "STRENGTHS", (2.0,))
    found = {f.claim: f for f in study.run()}
    assert set(found) == {c.id for c in study.CLAIMS}
    assert found["encoding"].state == "holds"
    assert found["axis"].figure > found["axis"].floor
    assert found["adapter"].figure > found["adapter"].baseline
    assert len(found["steering"].details["level"]) == 3


def test_the_mean_state_of_a_word_is_over_its_places(bed):
    hidden = bed.hidden(100, torch.Generator().manual_seed(5))
    ids = bed.task.batch(100, torch.Generator().manual_seed(5)).input_ids
    with torch.no_grad():
        states = bed.model(input_ids=ids, output_hidden_states=True).hidden_states[3]
    word = int(ids[0, 5])
    mean = states[:, 1:][ids[:, 1:] == word].double().mean(0)
    torch.testing.assert_close(hidden[word - 2], mean, atol=1e-3, rtol=1e-3)


def test_a_shift_is_read_where_words_cost_as_much(monkeypatch):
    monkeypatch.setattr(study, "STRENGTHS", (1.0, 2.0, 4.0))
    level = np.array([[[0.0], [1.0]], [[0.0], [2.0]], [[0.0], [4.0]]])[None]  # direction, strength, way, text
    cost = np.array([[[2.0], [2.0]], [[3.0], [3.0]], [[5.0], [5.0]]])[None]
    moved = {"level": level, "cost": cost, "plain_cost": 1.0}
    assert study.shift(moved, 0).tolist() == [2]
    for spent, want in ((0.5, 0), (1.5, 0.5), (2.0, 1), (4.0, 3), (9.0, 4)):
        assert study.shift(moved, 0, spent).tolist() == [want]


def test_below_the_gate_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda loaded, *gates: "testbed below its gate: excess")
    assert all(f.state == "not measured" and "gate" in f.reason for f in study.run())
