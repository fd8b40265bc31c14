"""HiP attention, shrunk: the tree gains by locality alone, controls are controls, and a broken tree is seen."""

import pytest
import torch

from regard.patterns import HiP
from regard.studies import hip_attention, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(hip_attention, "LENGTH", 256)
    monkeypatch.setattr(hip_attention, "HEADS", 4)
    monkeypatch.setattr(hip_attention, "SEEDS", {"smoke": 2, "full": 2})
    monkeypatch.setattr(hip_attention, "SMALL", {"k": 16, "block": (8, 2), "window": 8, "sink": 2})
    monkeypatch.setattr(hip_attention, "LENGTHS", {"smoke": (128, 512), "full": (128, 512)})


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("hip-attention", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    kept = found["kept"]
    assert kept["floor"] + 0.15 < kept["figure"] < kept["ceiling"]
    assert kept["baseline"] + 0.15 < kept["figure"]
    assert found["locality"]["figure"] < kept["figure"] - kept["floor"]
    assert 1 <= found["dots"]["figure"] < 2
    counted = found["dots"]["details"]
    for dots, most in zip(counted["dots"], counted["by formula"], strict=True):
        assert 0.95 * most <= dots <= most  # the largest ranges may be dropped early
    assert [c for c, f in found.items() if f["state"] == "not measured"] == ["loss", "recall"]


def test_a_tree_that_looks_at_nothing_is_seen(small, monkeypatch):
    """Scores that are noise leave the route where random blocks are."""
    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(HiP, "_scores", lambda self, queries, k, centre: torch.rand(centre.shape, generator=g))
    finding = hip_attention._kept("smoke", "cpu", 0)
    assert finding.state == "does not hold"
    assert abs(finding.figure - finding.floor) < 0.08


def test_full_runs_the_decoder(small, monkeypatch):
    monkeypatch.setattr(hip_attention, "TEXTS", 2)
    monkeypatch.setattr(hip_attention, "TEXT_LENGTH", 192)
    monkeypatch.setattr(hip_attention, "LARGE", {"k": 32, "block": (16, 2), "window": 16, "sink": 4})
    findings = {f.claim: f for f in hip_attention.run("full", seed=0)}
    assert set(findings) == {c.id for c in hip_attention.CLAIMS}
    loss, recall = findings["loss"], findings["recall"]
    assert loss.state in ("holds", "does not hold")
    assert abs(loss.figure) < 1
    assert recall.floor < recall.figure <= recall.ceiling
