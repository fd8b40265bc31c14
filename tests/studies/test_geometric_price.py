"""The price of discrete logic on the shipped testbed, one split: the phenomenon, its controls, and a closed gate."""

import numpy as np
import pytest

from regard.studies import geometric_price


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(geometric_price.SPLITS, "smoke", 1)
        patch.setattr(geometric_price, "STARTS", (0,))
        return {f.claim: f for f in geometric_price.run()}


def test_every_claim_is_judged(found):
    assert set(found) == {c.id for c in geometric_price.CLAIMS}


def test_removal_is_the_formula(found):
    assert found["removal"].state == "holds"


def test_parity_is_lost_without_its_direction_and_kept_by_the_controls(found):
    parity = found["parity"]
    assert parity.figure < 0.7
    assert parity.baseline >= 0.9
    accuracy = parity.details["accuracy"]
    assert accuracy["clean"] == 1
    assert accuracy["copy"] >= 0.9
    assert accuracy["dealt"] > accuracy["divergent"]
    assert sum(parity.details["confusion"].values()) == 30
    assert all(0 <= layer["divergence"] <= 1 and layer["distortion"] > 0 for layer in parity.details["phases"])


def test_a_share_that_goes_with_right_answers_is_found():
    right, share = np.array([0.9, 0.1]), np.array([0.4, 0.2])
    weight = np.stack([right, 1 - right], -1)
    items = np.stack([share[:, None] * weight, weight], -1)[:, None]
    np.testing.assert_allclose(geometric_price.less(items), [0.38 - 0.22])


def test_below_the_gate_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda loaded, *gates: "testbed below its gate: plain")
    findings = geometric_price.run()
    assert all(f.state == "not measured" and "gate" in f.reason for f in findings)
