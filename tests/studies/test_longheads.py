"""LongHeads' study, shrunk: the instrument sees misplaced chunks, arms read as many keys, gates say so."""

import pytest
import torch

from regard.kernels import renumbered
from regard.steer.long_heads import LongHeads
from regard.studies import longheads as study
from regard.studies import protocol
from regard.tasks.recall import KeyedPasskey

SMALL = {"COMPARED": (1, 2, 1, 50, 8), "SHAPE": (4, 4), "DIM": 16, "BATCH": 4, "TRAINED": 16, "TESTED": 48, "STEPS": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (SMALL | {"SEEDS": 2, "QUESTIONS": 6, "CHUNK": 4, "TOTAL": 4}).items():
        monkeypatch.setattr(study, name, value)


def test_smoke_compares_the_forms_and_says_what_needs_training(tmp_path):
    record = protocol.run_and_record("longheads", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert [found[name]["state"] for name in ("slots", "short", "all")] == ["holds"] * 3
    for name in ("renumbering", "chunks", "llama"):
        assert found[name]["state"] == "not measured"
        assert found[name]["reason"]


def test_full_judges_every_claim_of_models_that_answer(monkeypatch):
    short = {f.claim: f for f in study.run("full", seed=0)}
    assert "premise not met" in short["chunks"].reason
    monkeypatch.setattr(study, "GATE", 0.0)
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    means = findings["renumbering"].details["accuracy"]
    assert set(means) == set(study.ARMS)
    assert findings["chunks"].figure == pytest.approx(means["paper"] - max(means["window"], means["random"]))


def test_the_instrument_sees_queries_at_other_places(monkeypatch):
    whole = renumbered.attend_slots

    def moved(q, *given, **how):
        return whole([x * 1.01 for x in q], *given, **how)

    monkeypatch.setattr(renumbered, "attend_slots", moved)
    assert study._forms(0)[0].state == "does not hold"


def test_arms_read_as_many_chunks_of_the_same_model():
    model = study.build(0)
    ids = KeyedPasskey(48).batch(2, torch.Generator().manual_seed(0)).input_ids[:, :-1]
    chosen = {}
    for arm, route in study.routes(0).items():
        with torch.no_grad(), LongHeads(model, route) as context:
            model(ids)
        (routed,) = context.chosen.values()
        chosen[arm] = routed
        assert (routed.count[:, :, 16:] == 4).all()
        assert (routed.index[:, :, -1, 0] == 0).all()
        assert (routed.index[:, :, -1, -1] == 11).all()
    assert not torch.equal(chosen["random"].index, chosen["paper"].index)
    assert not torch.equal(chosen["max"].index, chosen["paper"].index)
