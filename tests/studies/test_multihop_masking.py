"""Multi-hop masking, shrunk: the instrument sees wrong masses, contributions are sums over layers, gates say so."""

import numpy as np
import pytest
import torch

from regard.patterns import Prefix
from regard.studies import multihop_masking as study
from regard.studies import protocol
from regard.tasks.multihop import TwoChains
from tests.oracles import groups as oracle


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(study.SIZES, "smoke", (10, 4, 2, 12, 1, 80, 12))
    monkeypatch.setitem(study.SIZES, "full", (12, 5, 1, 6, 2, 60, 8))
    monkeypatch.setattr(study, "BATCH", 8)


def test_smoke_is_judged_and_a_model_that_has_not_learned_is_not(small, tmp_path):
    record = protocol.run_and_record("multihop-masking", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["mass"]["state"] == "holds"
    for claim in ("order", "peak", "best-order", "untuned"):
        assert found[claim]["state"] == "not measured"
        assert "premise not met" in found[claim]["reason"]
    assert "Qwen" in found["qwen"]["reason"]


def test_full_judges_every_claim_of_models_that_answer(small, monkeypatch):
    for floor in ("shortcut", "chance"):  # a few steps teach nothing
        monkeypatch.setattr(TwoChains, floor, property(lambda self: -1.0))
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    order = findings["order"].details["accuracy"]
    assert set(order["causal"]) == {"forward", "backward", *(f"forward_{i}" for i in range(4))}
    assert findings["order"].figure == pytest.approx(100 * (order["causal"]["forward"] - order["causal"]["backward"]))
    assert len(findings["prefix"].details["by_seed"]["causal"]) == 2
    best = findings["best-order"]
    assert best.figure <= best.ceiling + 1e-9


def test_the_instrument_sees_a_mass_that_misses_keys(small, monkeypatch):
    from regard.kernels import fused

    task = TwoChains(10, 4)
    models = {arm: [study.build(task, arm, 2, 0)] for arm in ("causal", "prefix")}
    assert study._mass(task, models, "cpu", 0).state == "holds"
    whole = fused.row_expectation
    monkeypatch.setattr(fused, "row_expectation", lambda q, k, f, pattern: whole(q, k, f * 0.999, pattern=pattern))
    assert study._mass(task, models, "cpu", 0).state == "does not hold"


def test_contributions_are_sums_over_layers_of_explicit_weights():
    task = TwoChains(12, 5)
    model = study.build(task, "causal", 3, 0)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    top, told = study.answers(model, batch, "cpu", docs=5)
    with torch.no_grad():
        assert top.tolist() == model(batch.input_ids[:, :-1])[:, -1].argmax(-1).tolist()
        kept = [block.attention.position.last for block in model.blocks]
    at = torch.arange(task.prompt)
    weights = []
    for q, k in kept:
        scores = (q.double() @ k.double().mT / 4.0).masked_fill(at > at[:, None], -torch.inf)
        weights.append(scores.softmax(-1))
    documents = [[1 + 2 * d, 2 + 2 * d] for d in range(5)]
    for b in range(4):
        want = oracle.information_contribution([w[b] for w in weights], [task.prompt - 1], documents)
        np.testing.assert_allclose(told[b], want[-1], rtol=1e-4, atol=1e-6)


def test_arms_start_from_the_same_weights_and_differ_in_the_mask_alone():
    task = TwoChains(10, 4)
    causal, prefix = (study.build(task, arm, 2, 5) for arm in ("causal", "prefix"))
    ours, theirs = causal.state_dict(), prefix.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = task.batch(6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = causal(batch.input_ids[:, :-1], pattern=Prefix(task.prompt))
        torch.testing.assert_close(same, prefix(batch.input_ids[:, :-1]))
        assert not torch.allclose(causal(batch.input_ids[:, :-1]), same, atol=1e-3)


def test_area_under_the_curve():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert study.evidence.auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(study.evidence.auc(scores, np.ones(40, bool)))
