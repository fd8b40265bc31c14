"""Landmark attention's study, shrunk: the instruments see wrong forms, controls open as many blocks, gates say so."""

import pytest
import torch

from regard.studies import landmark as study
from regard.studies import protocol
from regard.tasks.recall import KeyedPasskey
from tests.oracles import landmark as oracle

SMALL = {
    "COMPARED": (1, 2, 23, 4, 4),
    "DIM": 16,
    "BATCH": 4,
    "TRAINED": 17,
    "TESTED": 65,
    "STEPS": 3,
    "SEEDS": 2,
    "QUESTIONS": 6,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(study, name, value)


def test_smoke_compares_the_forms_and_says_what_needs_training(tmp_path):
    record = protocol.run_and_record("landmark", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert [found[name]["state"] for name in ("forms", "rows", "reading")] == ["holds"] * 3
    for name in ("chosen", "few", "llama"):
        assert found[name]["state"] == "not measured"
        assert found[name]["reason"]


def test_full_judges_every_claim_of_models_that_answer(monkeypatch):
    short = {f.claim: f for f in study.run("full", seed=0)}
    assert "premise not met" in short["chosen"].reason
    monkeypatch.setattr(study, "GATE", 0.0)
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    means = findings["chosen"].details["accuracy"]
    assert set(means) == set(study.ARMS)
    assert findings["few"].figure == pytest.approx(means["chosen"] - means["all"])
    assert findings["chosen"].figure == pytest.approx(means["chosen"] - max(means["last"], means["random"]))


def test_the_forms_of_the_study_are_their_definitions_and_a_wrong_one_is_seen(monkeypatch):
    scores = torch.randn(2, 23, 23, dtype=torch.float64)
    for form, told in ((study.by_groups, oracle.weights), (study.by_masks, oracle.by_masks)):
        for n in range(2):
            torch.testing.assert_close(form(scores, 4)[n], torch.tensor(told(scores[n].numpy(), 4)), rtol=0, atol=1e-12)
    whole = study.by_masks
    monkeypatch.setattr(study, "by_masks", lambda scores, block: whole(scores * 1.001, block))
    assert study._forms(0)[0].state == "does not hold"


def test_controls_open_as_many_blocks_and_the_arms_read_alike():
    model = study.build(0)
    batch = KeyedPasskey(65).batch(2, torch.Generator().manual_seed(0))
    opened = {}
    for arm in ("chosen", "last", "random"):
        attention = model.blocks[0].attention
        attention.chooser, attention.topk = study.choosers(1)[arm], 4
        route, q, k = attention.route, torch.randn(1, 1, 18, 16), torch.randn(1, 1, 54, 16)
        opened[arm] = route.select(q, route.summarize(k), q_start=54)
    assert all((r.count == 4).all() for r in opened.values())
    assert (opened["last"].index == torch.tensor([2, 3, 4, 5])).all()
    assert not torch.equal(opened["random"].index, opened["last"].index)
    plain = study.answers(model, batch, "chosen", "cpu")
    assert (plain == study.answers(model, batch, "chosen", "cpu")).all()
