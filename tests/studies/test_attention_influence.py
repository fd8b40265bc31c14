"""AttentionInfluence, shrunk: documents of both kinds, masks that are uniform, training on choices, verdicts."""

import re

import numpy as np
import pytest
import torch

from regard.studies import attention_influence as study
from regard.studies import protocol
from regard.tasks.bytetext import decode


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_documents_of_one_length_of_which_some_need_recall():
    recall, filler = study.recall_documents(6, seeded()), study.filler_documents(40, seeded())
    assert recall.shape[1] == filler.shape[1] == study.LENGTH
    for row in recall:
        text = decode(row)
        said = re.findall(r"the code of ([a-z]+) is (\d{5})", text)
        assert len(said) == 5  # three told, two of them again as answers
        assert len(set(said)) == 3
    counts = []
    for row in filler:
        text = decode(row)
        said = re.findall(r"the code of ([a-z]+) is \d{5}\. ", text)
        assert "what" not in text
        assert len(said) == len(set(said))
        counts.append(len(said))
    assert set(counts) == set(range(7))


def test_smoke(monkeypatch, tmp_path):
    monkeypatch.setitem(study.PROBES, "smoke", (2, 800))
    monkeypatch.setattr(study, "TESTS", 2)
    monkeypatch.setattr(study, "TEST_LENGTH", 800)
    monkeypatch.setattr(study, "DOCUMENTS", 4)
    monkeypatch.setattr(study, "DRAWS", 1)
    record = protocol.run_and_record("attention-influence")
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["uniform"]["state"] == "holds"
    assert found["selected-data"]["state"] == "not measured"
    assert 0 <= found["selects"]["figure"] <= 1
    assert len(found["masking"]["details"]["heads"]) == 2


def test_full_trains_on_three_choices_and_judges(monkeypatch):
    monkeypatch.setattr(study, "POOL", (10, 4, 2))
    monkeypatch.setattr(study, "TRAINING", (32, 32, 3, 3, 1))
    monkeypatch.setattr(study, "LAYERS", 1)
    found = [study.trained_on_choices(s, "cpu") for s in range(2)]
    for one in found:
        for name in ("selected", "random", "highest loss"):
            assert one[name]["right"].shape == (512,)
            assert 0 <= one[name]["recall_share"] <= 1
            assert one[name]["filler_loss"] > 0
    finding = study._selected(found)
    assert finding.claim == "selected-data"
    for one in found:
        one["selected"]["right"] = 0.9 + 0 * one["selected"]["right"]
    assert study._selected(found).state == "holds"
    for one in found:
        one["selected"]["right"] = 0 * one["selected"]["right"]
    assert study._selected(found).state == "does not hold"


def test_a_mask_that_costs_as_much_as_random_ones_does_not_hold(monkeypatch):
    scores = np.array([[0.9, 0.0]])
    finding = judged(monkeypatch, scores, own=0.2, other=0.9)
    assert (finding.state, finding.figure) == ("holds", pytest.approx(0.8))
    assert finding.baseline == pytest.approx(0.1)
    assert judged(monkeypatch, scores, own=0.5, other=0.5).state == "does not hold"


def judged(monkeypatch, scores, own, other):
    values = {(): 1.0, ((0, 0),): own, ((0, 1),): other}
    monkeypatch.setattr(study, "right", lambda m, t, heads=(): values[tuple(heads or ())] + np.zeros(4))
    return study._masking(None, [], [(0, 0)], [[(0, 1)]], [], scores)
