"""PowerAttention, shrunk: exact geometry, budgets that are equal, a probe whose reach decides, every claim judged."""

import pytest
import torch

from regard.patterns import BlockWindow
from regard.studies import power_attention, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(power_attention.PROBE, "smoke", (8, 1, 1, 32, 2, 32, 120, 1e-2, 1))
    monkeypatch.setitem(power_attention.PROBE, "full", (32, 2, 1, 16, 2, 4, 3, 1e-2, 2))
    monkeypatch.setattr(power_attention, "BYTES", (2, 3, 1e-2))
    monkeypatch.setattr(power_attention, "TESTS", 300)


def test_smoke(small, monkeypatch, tmp_path):
    plain = power_attention.patterns
    few = {"window": BlockWindow(1, 4, 0)}
    monkeypatch.setattr(power_attention, "patterns", lambda block, *a: plain(block, *a) | (few if block == 1 else {}))
    record = protocol.run_and_record("power-attention", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    for claim in ("reach", "doubling", "fewest-layers"):
        assert found[claim]["state"] == "holds"
    assert found["doubling"]["figure"] == 125
    assert (found["fewest-layers"]["figure"], found["fewest-layers"]["baseline"]) == (6, 8)
    assert found["inside"]["figure"] > 0.6
    assert found["inside"]["floor"] < 0.35
    shares = found["passkey"]["details"]["share_inside"]
    assert shares["power"] > shares["window"]
    for claim in ("perplexity", "ruler", "speed"):
        assert found[claim]["state"] == "not measured"


def test_full_judges_every_claim_that_does_not_wait(small):
    findings = {f.claim: f for f in power_attention.run("full", seed=0)}
    assert set(findings) == {c.id for c in power_attention.CLAIMS if not c.waits}
    assert all(f.state != "not measured" for f in findings.values())
    assert set(findings["passkey"].details["accuracy_by_seed"]) == set(power_attention.ARMS["full"])
    assert "dense" not in findings["inside"].details["outside"]
    assert len(findings["perplexity"].details["nats"]["power"]) == 2


@pytest.mark.parametrize(("block", "length", "keys"), [(1, 64, 8), (8, 1024, 80)])
def test_no_arm_but_dense_spends_more_keys_on_the_question(block, length, keys):
    arms = power_attention.patterns(block, length)
    spent = {name: int(p.row_counts(length, length)[-1]) for name, p in arms.items()}
    assert spent.pop("dense") == length
    assert all(n <= keys for n in spent.values())
    assert spent["power"] == spent["window"] == spent["random keys"] == keys


def test_random_keys_are_causal_drawn_from_all_and_hold_the_own():
    pattern = power_attention.random_keys(8, 100, 3)
    at = torch.arange(100)
    allowed = pattern.allows(at[:, None], at[None])
    assert not allowed.triu(1).any()
    assert allowed.diagonal().all()
    assert torch.equal(allowed.sum(1), (at + 1).clamp(max=8))
    assert not torch.equal(allowed, power_attention.random_keys(8, 100, 4).allows(at[:, None], at[None]))
