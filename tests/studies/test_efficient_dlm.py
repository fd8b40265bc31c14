"""Efficient-DLM, shrunk: the mask is exact, arms differ as they say, every claim is judged."""

import numpy as np
import pytest
import torch

from regard.patterns import BlockDiffusion, Sections
from regard.studies import efficient_dlm, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(efficient_dlm, "SMALL", (24, 1, 16, 2, 4, 6, 3e-3))
    monkeypatch.setattr(efficient_dlm, "SMOKE", (4, 2))
    monkeypatch.setattr(efficient_dlm, "FULL", (64, 2, 2, 1, 2))
    monkeypatch.setattr(efficient_dlm, "BLOCK", 8)


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("efficient-dlm", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["mask"]["state"] == "holds"
    drifts = found["drift"]["details"]
    assert set(drifts) == set(efficient_dlm.ARMS)
    assert all(len(d) == 2 and min(d) > 0 for d in drifts.values())
    ratios = np.array(drifts["clean context"]) / np.array(drifts["bidirectional"])
    assert found["drift"]["figure"] == pytest.approx(ratios.mean())
    for claim in ("accuracy", "places", "speed", "8b"):
        assert found[claim]["state"] == "not measured"


def test_full_judges_every_claim_that_does_not_wait(small):
    findings = {f.claim: f for f in efficient_dlm.run("full", seed=0)}
    assert set(findings) == {c.id for c in efficient_dlm.CLAIMS if not c.waits}
    assert all(f.state != "not measured" for f in findings.values())
    assert findings["accuracy"].baseline > 0.6  # the start copies
    assert 0.7 < findings["speed"].figure <= efficient_dlm.BLOCK


def test_the_instrument_sees_a_leak_of_the_answer(monkeypatch):
    from regard import patterns
    from regard.patterns import BlockCausal, Blocks

    def leaks(n, block):  # not strict: a noisy block sees its own clean tokens
        return Sections([n, n], [[Blocks(block), BlockCausal(block)], [None, BlockCausal(block)]])

    assert efficient_dlm._mask(0).state == "holds"
    monkeypatch.setattr(patterns, "BlockDiffusion", leaks)
    assert efficient_dlm._mask(0).state == "does not hold"
    assert BlockDiffusion is not leaks


def test_arms_corrupt_as_they_say():
    ids = torch.randint(200, (400, 48), generator=torch.Generator().manual_seed(0))
    last = {}
    for arm in efficient_dlm.ARMS:
        corrupt, _ = efficient_dlm.recipe(arm)
        masked = corrupt(ids, 258, torch.Generator().manual_seed(1)).masked
        places = masked.float().unflatten(1, (3, 16)).mean((0, 1))
        last[arm] = float(places[8:].mean() - places[:8].mean())
        assert 0.45 < masked.float().mean() < 0.55
    assert last["clean context, places"] > 0.1
    assert max(abs(v) for arm, v in last.items() if arm != "clean context, places") < 0.03


def test_a_model_that_would_not_be_used_is_refused():
    with pytest.raises(ValueError, match="takes no model, got 'other'"):
        efficient_dlm.run("smoke", model="other")
