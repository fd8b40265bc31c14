"""Attention autoencoders, shrunk: sums that are exact, controls that are controls, a gate that can close."""

import numpy as np
import pytest
import torch

from regard.studies import attention_saes, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(attention_saes.STEPS, "smoke", (12, 40))
    monkeypatch.setattr(attention_saes, "SEQUENCES", {"train": 40, "test": 8})
    monkeypatch.setattr(attention_saes, "FEATURES", 64)


def test_a_model_that_has_not_learned_is_not_measured(small):
    findings = attention_saes.run(seed=0)
    assert {f.claim for f in findings} == {c.id for c in attention_saes.CLAIMS if not c.waits}
    assert all(f.state == "not measured" and "testbed not ready" in f.reason for f in findings)


def test_without_learning_the_instrument_holds_and_the_phenomenon_does_not(small, monkeypatch, tmp_path):
    monkeypatch.setattr(attention_saes, "GATE", 100.0)
    record = protocol.run_and_record("attention-saes", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["attribution"]["state"] == "holds"
    assert found["attribution"]["figure"] < 1e-4
    assert found["induction"]["state"] == "does not hold"
    assert found["induction"]["figure"] < 0.4
    assert found["faithful"]["state"] == "does not hold"
    assert found["long-prefix"]["state"] == "not measured"


def test_splicing_the_output_itself_recovers_everything(small, monkeypatch):
    """An autoencoder that is the identity: loss recovered is 1, and zero ablation is 0."""

    class Identity(torch.nn.Module):
        def __init__(self, d):
            super().__init__()
            from regard.train.sae import SAE

            inner = SAE(d, 2 * d).requires_grad_(False)
            inner.encoder.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
            inner.decoder.copy_(inner.encoder)
            self.inner = inner

    monkeypatch.setattr("regard.train.sae.train_sae", lambda x, *a, **k: Identity(x.shape[1]).inner)
    network, _ = attention_saes.trained(12, 0, "cpu")
    judged = attention_saes.judge(network, 1, 0, "cpu")
    np.testing.assert_allclose(judged["losses"]["spliced"], judged["losses"]["clean"], atol=1e-5)
    assert abs(judged["losses"]["zero"] - judged["losses"]["clean"]).max() > 1e-6
    assert judged["prefix"].shape == (attention_saes.SEQUENCES["test"], 2, 4, 8)
    finding = attention_saes._faithful([judged], "")
    assert finding.figure == pytest.approx(1, abs=1e-3)
    assert finding.state == "does not hold"  # every row has as many features as dimensions


def test_heads_that_wait_for_a_long_match_are_counted():
    weights = np.zeros((2, 4, 8))
    weights[1, 0] = 0.8  # at once
    weights[1, 1] = np.linspace(0.1, 0.8, 8)  # late
    weights[0, 2] = np.linspace(0.0, 0.2, 8)  # never
    finding = attention_saes._long_prefix([{"prefix": weights[None]}], "")
    assert (finding.figure, finding.interval, finding.state) == (0.5, (0.5, 0.5), "holds")
    uneven = weights.copy()
    uneven[1, 1] = 0.8  # at once, in half of the sequences
    finding = attention_saes._long_prefix([{"prefix": np.stack([weights, uneven] * 8)}], "")
    assert finding.figure == 0
    assert finding.interval == (0, 0.5)
    two = [{"prefix": weights[None]}, {"prefix": uneven[None]}]
    assert attention_saes._long_prefix(two, "").figure == 0.25
