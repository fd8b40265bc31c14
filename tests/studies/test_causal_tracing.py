"""Causal tracing, shrunk: cells that must be whole, classes that exist, an injection that is chosen elsewhere."""

import numpy as np
import pytest
import torch
import xarray as xr

from regard.studies import causal_tracing, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda *_: "")
    monkeypatch.setitem(causal_tracing.QUESTIONS, "smoke", 8)
    monkeypatch.setitem(causal_tracing.DRAWS, "smoke", 1)
    for name, value in (("TUNED", 8), ("TESTED", 24), ("STRENGTHS", (0.2,)), ("SHAPES", ((1, 2),))):
        monkeypatch.setattr(causal_tracing, name, value)


def test_every_claim_is_judged_and_the_trivial_cell_is_whole(small, monkeypatch, tmp_path):
    monkeypatch.setattr(causal_tracing, "GAP", -1.0)  # whatever the noise takes
    monkeypatch.setattr(causal_tracing, "LEAST", 4)
    record = protocol.run_and_record("causal-tracing", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["trivial"]["figure"] < 0.05
    rates = found["middle"]["details"]["rr"]
    assert np.shape(rates["attn_out"]) == (6, 6)
    last = found["middle"]["details"]["classes"].index("last")
    assert all(abs(rates["resid_post"][-1][c]) < 1e-3 for c in range(6) if c != last)
    assert found["pope"]["state"] == "not measured"


def test_too_few_questions_that_noise_changes_are_not_measured(small, monkeypatch):
    monkeypatch.setattr(causal_tracing, "GAP", 1.0)
    found = causal_tracing.run(seed=3)
    assert all(f.state == "not measured" and "premise not met: 0" in f.reason for f in found)


def test_below_its_gate_nothing_but_the_instrument_is_measured(small, monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda *_: "testbed below its gate: yes_no")
    assert all(f.state == "not measured" and "yes_no" in f.reason for f in causal_tracing.run(seed=3))


def grid(peak, height, early, layers=6):
    values = np.zeros((3, layers, 2, 5))
    values[0, peak, 1], values[0, 1, 0] = height, early
    coords = {"part": list(causal_tracing.PARTS), "layer": range(layers), "class": ["early visual", "last"]}
    return xr.DataArray(values, dims=("part", "layer", "class", "sample"), coords=coords)


@pytest.mark.parametrize(
    ("peaks", "early", "state"),
    [
        ((2, 3), 0.1, "holds"),
        ((2, 5), 0.1, "does not hold"),
        ((0, 3), 0.1, "does not hold"),
        ((2, 3), 0.6, "does not hold"),
    ],
)
def test_the_peak_must_lie_between_in_every_draw_and_stand_out(peaks, early, state):
    finding = causal_tracing._middle([grid(p, 0.8, early) for p in peaks])
    assert (finding.state, finding.figure, finding.baseline) == (state, pytest.approx(0.8), pytest.approx(early))


def test_the_same_noise_is_used_for_every_patch_of_a_picture(small):
    from regard.tasks.vlm import seer

    eye = seer("testbed:vlm")
    (a, x), (b, y) = (causal_tracing.asked_and_sure(eye, 8, 3) for _ in range(2))
    assert torch.equal(x, y)
    assert torch.equal(a.asked, b.asked)
    assert a.answers.all()
    assert len(a)
    assert (causal_tracing.chance(eye.model, a.inputs) > 0.8).all()
