"""Systematic outliers, shrunk: classes of tokens, columns, arms that are trained, verdicts that can go both ways."""

import numpy as np
import pytest
import torch

from regard.studies import protocol, systematic_outliers
from regard.tasks.testbeds import load


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(systematic_outliers, "SEEDS", {"smoke": 1, "full": 1})
    monkeypatch.setattr(systematic_outliers, "SAMPLES", 2)
    monkeypatch.setattr(systematic_outliers, "LENGTH", 64)
    monkeypatch.setattr(systematic_outliers, "TRAINING", (2, 2, 16, 1, 2, 1e-3))
    monkeypatch.setattr(systematic_outliers, "ARMS", {"softmax": 2, "value": 2, "scale": 2, "sigmoid": 1})


@pytest.mark.parametrize("size", ["smoke", "full"])
def test_every_claim_is_judged(small, tmp_path, size):
    record = protocol.run_and_record("systematic-outliers", size=size)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["variants"]["state"] == "holds"
    assert found["variants"]["figure"] < 1e-5
    assert sum(found["places"]["details"]["classes"].values()) == pytest.approx(1)
    assert 0 < found["attention"]["figure"] < 1
    assert found["parameters"]["floor"] > 3
    trained = [found[c]["state"] for c in ("scaling-removes", "convergence", "compression")]
    assert ("not measured" in trained) == (size == "smoke")
    if size == "full":
        assert set(found["convergence"]["details"]["loss"]) == {"softmax", "value", "scale", "sigmoid"}
        assert 0.5 < found["scaling-removes"]["figure"] < 2  # two steps tell them apart no further


def test_classes_of_tokens_go_by_the_word_they_are_part_of():
    text = "\x00if the_cat and, 12:\n"
    assert systematic_outliers.classes(list(text)) == (
        ["initial", "weak", "weak", "weak", "weak", "weak", "weak", "weak", "other", "other", "other", "weak"]
        + ["weak"] * 3
        + ["weak", "weak", "other", "other", "strong", "strong"]
    )
    pieces = ["<s>", "an", "other", " of", " dogs", ".", " ("]
    assert systematic_outliers.classes(pieces) == ["initial", "other", "other", "weak", "other", "strong", "weak"]


def test_a_large_weight_makes_an_outlier_column():
    model = load("testbed:decoder").model
    ids = torch.arange(20).view(2, 10)
    plain = systematic_outliers.down_columns(model, ids)
    assert len(plain) == 6
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 7] = 100.0
    changed = systematic_outliers.down_columns(model, ids)
    assert changed[2][0] > 10 * plain[2][0]
    assert [c for i, c in enumerate(changed) if i != 2] == [c for i, c in enumerate(plain) if i != 2]


def test_the_verdicts_of_the_trained():
    def arm(ratio, loss, rise, seed):
        noise = np.random.default_rng(seed).normal(size=8) * 0.01
        return {"ratio": ratio, "loss": loss + noise, "rounded": loss + rise + noise}

    arms = {
        "softmax": [arm(40, 2.0, 0.3, s) for s in range(2)],
        "value": [arm(36, 2.0, 0.3, s) for s in range(2)],
        "scale": [arm(8, 1.9, 0.1, s) for s in range(2)],
    }
    holds = {f.claim: f for f in systematic_outliers.judge(arms)}
    assert all(f.state == "holds" for f in holds.values())
    assert holds["scaling-removes"].figure == pytest.approx(0.2)
    assert holds["compression"].figure == pytest.approx(0.2)
    arms["scale"] = [arm(20, 2.1, 0.4, s) for s in range(2)]
    assert all(f.state == "does not hold" for f in systematic_outliers.judge(arms))
