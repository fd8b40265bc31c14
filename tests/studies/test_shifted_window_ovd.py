import pytest
import torch

from regard.studies import protocol
from regard.studies import shifted_window_ovd as study


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(study.MODELS, "smoke", 2)


def test_smoke_holds_with_an_exact_control():
    found = {f.claim: f for f in protocol.study("shifted-window-ovd")}
    assert found["windows"].state == "holds"
    equivariance = found["equivariance"]
    assert equivariance.state == "holds"
    assert equivariance.baseline == pytest.approx(1.0, abs=1e-4)  # phases 0 and w are one phase twice
    assert found["imprint"].state == found["lvis"].state == "not measured"


def test_at_half_a_window_the_error_vanishes_by_construction(monkeypatch):
    """Why that roll is left out."""
    net = study._random((0, 2), 0, "cpu")
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(study, "ROLLS", (2,))
    assert study.roll_error(net, x) < 1e-10
    monkeypatch.setattr(study, "ROLLS", (1,))
    assert study.roll_error(net, x) > 1e-4
    dense = study._random((0,), 0, "cpu")
    monkeypatch.setattr(study, "ROLLS", (4,))
    assert study.roll_error(dense, x) < 1e-10  # a roll by whole windows is no roll to the windows


def test_the_full_size_trains_every_arm(monkeypatch):
    for name, value in (("STEPS", 2), ("IMAGE", 16), ("WINDOW", 4)):
        monkeypatch.setattr(study, name, value)
    accuracy, imprint = study._train((0, 2), 8, 0, "cpu")
    assert 0 <= accuracy < 0.5
    assert 0 < imprint < 1


def test_the_verdict_needs_both_a_smaller_imprint_and_no_loss(monkeypatch):
    def outcome(accuracy, imprint):
        monkeypatch.setattr(
            study, "_train", lambda phases, dim, seed, device: (accuracy, imprint) if len(phases) > 1 else (0.9, 0.1)
        )
        return study._imprint([0, 1], "cpu")

    assert outcome(0.9, 0.07).state == "holds"
    assert outcome(0.9, 0.09).state == "does not hold"
    assert outcome(0.89, 0.07).state == "does not hold"
    assert outcome(0.9, 0.07).figure == pytest.approx(0.7)
    monkeypatch.setattr(study, "_train", lambda *_: (0.11, 0.1))
    assert study._imprint([0, 1], "cpu").state == "not measured"
