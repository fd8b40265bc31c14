import pytest
import torch

from regard.patterns import Rings, ring_positions
from regard.studies import concentric_causal as study
from regard.studies import protocol


def test_the_exact_half_holds_and_the_trained_half_waits():
    found = {f.claim: f for f in protocol.study("concentric-causal")}
    assert [found[c].state for c in ("mask", "distance", "row-bias")] == ["holds"] * 3
    assert found["distance"].figure == pytest.approx(8.49, abs=0.005)
    assert found["distance"].baseline == 288.5
    assert found["row-bias"].figure == pytest.approx(2.8, abs=0.05)
    assert found["row-bias"].baseline == pytest.approx(75, abs=0.5)
    assert found["probe"].state == found["benchmarks"].state == "not measured"


def test_another_mask_is_found_out(monkeypatch):
    """The instrument can fail: a pattern off by one ring differs from the released loop."""
    monkeypatch.setattr("regard.patterns.ring_positions", lambda h, w, start=0: ring_positions(h, w, start + 1))
    assert study._mask().state == "does not hold"


def test_rows_without_positions_are_equal():
    """The control: where all image tokens share a position, no row is preferred."""
    mass = study.row_mass(torch.zeros(6, 6, dtype=torch.long), 9, 32, 1e4, "cpu")
    assert torch.allclose(mass, torch.full((6,), 1 / 6, dtype=torch.float64))
    assert float(study.row_mass(torch.arange(36).view(6, 6), 36, 32, 1e4, "cpu").sum()) == pytest.approx(1)


def test_released_positions_are_rings():
    assert torch.equal(study.released_positions(6).flatten(), ring_positions(6, 6))
    assert Rings(6, 6).row_counts(36, 36).max() == 36
