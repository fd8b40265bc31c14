"""Superlinear attention's study, shrunk: gaps are counted, gradients seen, arms differ in what they claim to."""

import pytest
import torch

from regard.patterns.superlinear import Superlinear
from regard.studies import protocol
from regard.studies import superlinear as study
from tests.oracles import superlinear as oracle

SMALL = {"COUNTED": 400, "LENGTHS": (9, 12), "DIM": 8, "BATCH": 4, "TRAINED": (24, 40), "TESTED": (64, 100), "STEPS": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (SMALL | {"SEEDS": 2, "QUESTIONS": 40}).items():
        monkeypatch.setattr(study, name, value)


def test_smoke_counts_and_says_what_needs_training(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LENGTHS", (12, 14))
    record = protocol.run_and_record("superlinear", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert [found[name]["state"] for name in ("covered", "growth", "gate")] == ["holds"] * 3
    for name in ("end-to-end", "distilled", "speed"):
        assert found[name]["state"] == "not measured"


def test_gaps_are_keys_that_no_span_holds():
    for b, f in ((2, 0), (1, 1), (0.5, 0)):
        counted = study.gaps(Superlinear(b=b, f=f), 150).tolist()
        for t in range(150):
            each, window = oracle.spans(t, 2, 3, b, f)
            assert counted[t] == t + 1 - len(set().union(window, *each))


def test_a_search_that_learns_past_the_gate_is_seen(monkeypatch):
    from regard.layers.superlinear import SuperlinearAttention

    whole = SuperlinearAttention.forward

    def leaking(self, x, **how):
        return whole(self, x, **how) + 1e-3 * self.search_proj(x)

    monkeypatch.setattr(SuperlinearAttention, "forward", leaking)
    assert study._gate(0).state == "does not hold"


def test_full_judges_every_claim():
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    details = findings["end-to-end"].details
    assert set(details["share"]) == set(study.ARMS)
    assert all(0 <= x <= 1 for each in details["share"].values() for x in each.values())
    assert findings["end-to-end"].figure == pytest.approx(details["share"]["gate"]["64"] - details["random"])


def test_reading_at_the_last_token_is_the_layer_over_the_text():
    model = study.build(True, False, 0)
    ids = torch.randint(16, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.embed(ids)
        average = torch.stack([x[:, max(0, t + 1 - study.AVERAGE) : t + 1].sum(1) for t in range(50)], 1) / 8
        x = x + average
        want = model.head(model.last(x + model.attention(model.norm(x))))[:, -1]
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-4)
        blind = study.build(False, False, 0)
        assert not torch.allclose(blind(ids), want, atol=1e-2)
