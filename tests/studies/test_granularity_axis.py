"""The granularity axis, shrunk: planted axes are found and moved along, disorder is not, a gate that can close."""

import numpy as np
import pytest
import torch

from regard.studies import granularity_axis as study
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def bed():
    return study.Roles(load(study.MODEL).model, "cpu")


def test_every_claim_is_judged(monkeypatch):
    monkeypatch.setitem(study.SEEDS, "smoke", 1)
    monkeypatch.setitem(study.DOCUMENTS, "smoke", 2)
    monkeypatch.setitem(study.STEERED, "smoke", 6)
    monkeypatch.setitem(study.RANDOM, "smoke", 1)
    monkeypatch.setattr(study, "STRENGTHS", (-0.5, 0.0, 0.5))
    monkeypatch.setattr(study, "DRAWS", 20)
    found = {f.claim: f for f in study.run()}
    assert set(found) == {c.id for c in study.CLAIMS}
    assert found["added"].state == "holds"
    steering = found["steering"]
    assert steering.figure > 2
    assert steering.baseline < steering.figure
    assert len(steering.details["level"]) == 3
    assert len(found["first-component"].details["layers"]) == len(found["order"].details["layers"]) == 4


def test_role_vectors_are_means_over_words_and_documents(bed):
    vectors, level, norm = bed.vectors(2, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    role, states = torch.arange(75), []
    for _ in range(2):
        ids = bed.task.batch(75, generator, role).input_ids
        with torch.no_grad():
            states.append(bed.model(input_ids=ids, output_hidden_states=True).hidden_states[2][:, 2:])
    stacked = torch.cat(states, 1)
    torch.testing.assert_close(vectors[1], stacked.mean(1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(norm[1], stacked.norm(dim=-1).mean(), atol=1e-3, rtol=1e-4)
    assert level.tolist() == (role // 15 + 1).tolist()


def test_the_random_numbers_are_shared_and_no_strength_is_no_change(bed, monkeypatch):
    monkeypatch.setattr(study, "STRENGTHS", (0.0,))
    axis = torch.ones(96)
    steered = study.steer(bed, axis, 10.0, 5, 2, seed=0)
    np.testing.assert_array_equal(steered["level"][0], steered["level"][1])
    assert steered["level"].shape == (3, 1, 5)


def test_steps_out_of_order_are_negative():
    assert study.smallest_step([1.0, 2, 3, 4]) == 1
    assert study.smallest_step([1.0, 3, 2, 4]) < 0


def test_movement_is_between_opposite_strengths(monkeypatch):
    monkeypatch.setattr(study, "STRENGTHS", (-2.0, -1.0, 0.0, 1.0, 2.0))
    level = np.array([[1.0], [2.0], [3.0], [3.5], [5.0]])
    np.testing.assert_array_equal(study.movement(level), [[1.5], [4.0]])


def test_below_the_gate_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda loaded, *gates: "testbed below its gate: excess")
    assert all(f.state == "not measured" and "gate" in f.reason for f in study.run())
