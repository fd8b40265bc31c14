"""SENER, shrunk: instruments hold and see what they should, both heads train on the same texts."""

import pytest
import torch

from regard.layers import band
from regard.studies import protocol
from regard.studies import sener as study


def test_smoke(monkeypatch, tmp_path):
    monkeypatch.setitem(study.SQUARES, "smoke", 64)
    record = protocol.run_and_record("sener", seed=2)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    for claim in ("arrow", "plus", "candidates", "logn", "memory"):
        assert found[claim]["state"] == "holds"
    assert found["f1"]["state"] == found["long-ner"]["state"] == "not measured"
    assert found["candidates"]["figure"] == pytest.approx(2048 / 257)
    assert found["logn"]["figure"] == pytest.approx(512 / (512 + 8191))


def test_full_trains_both_heads(monkeypatch):
    monkeypatch.setattr(study, "TRAINED", (16, (16, 24), 6, 4, 12, 2))
    monkeypatch.setattr(study, "TESTS", 4)
    finding = study._f1("cpu", 0)
    details = finding.details
    assert {arm: len(x) for arm, x in details["f1"].items()} == {"plus": 2, "without": 2}
    assert details["parameters"]["plus"] < 1.05 * details["parameters"]["without"]
    if finding.state != "not measured":
        gains = [sum(p) / 2 - sum(w) / 2 for p, w in zip(*details["f1"].values(), strict=True)]
        assert finding.figure == pytest.approx(sum(gains) / 2)
    else:
        assert "not learned" in finding.reason


def test_the_instrument_sees_columns_that_stay_rolled(monkeypatch):
    """The trap: the column result of the mirror cell where that of the cell belongs."""
    assert study._plus(0).state == "holds"
    whole = band.PlusAttention.forward

    def rolled(self, x, **how):
        joined, self.joined = self.joined, "mirror"
        out = whole(self, x, **how)
        self.joined = joined
        return out

    monkeypatch.setattr(band.PlusAttention, "forward", rolled)
    assert study._plus(0).state == "does not hold"


def test_bytes_are_those_autograd_keeps():
    x = torch.randn(100, requires_grad=True)
    weight = torch.randn(100, requires_grad=True)
    assert study.kept_bytes(lambda: x * 2) == 0
    assert study.kept_bytes(lambda: (x * 2).exp()) == 400  # its own result
    assert study.kept_bytes(lambda: (x * 2) * weight) == 400  # x * 2; the weight is a leaf
    assert study.kept_bytes(lambda: [(y := x * 2) * weight, y * weight]) == 400  # once
    with torch.no_grad():
        assert study.kept_bytes(lambda: (x * 2).exp()) == 0
