"""Flux Attention, shrunk: instruments see wrong routers, the written loss is what it says, answers are counted."""

import numpy as np
import pytest
import torch

from regard.layers.layer_router import LayerRouter
from regard.studies import flux_attention as study
from regard.studies import protocol
from regard.tasks.recall import KeyedPasskey


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "STEPS", 12)
    monkeypatch.setattr(study, "SEEDS", {"smoke": 1, "full": 1})
    sizes = {"decoder": 3, "routers": 2, "tests": 8, "dim": 16, "heads": 2, "length": 32}
    monkeypatch.setattr(study, "FULL", sizes)


def test_smoke_judges_the_router_and_says_when_it_has_not_learned(small):
    record = protocol.run_and_record("flux-attention", seed=2)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["feature"]["state"] == found["gate"]["state"] == "holds"
    assert found["targets"]["state"] == found["layer"]["state"] == "does not hold"  # twelve steps
    assert found["targets"]["figure"] == pytest.approx(1.0)  # all layers are still full
    assert found["routed"]["state"] == "not measured"
    assert "Llama" in found["speed"]["reason"]


def test_full_needs_a_decoder_that_answers(small, monkeypatch):
    found = study._routed([0], "cpu")
    assert found.state == "not measured"
    assert "premise not met" in found.reason

    def right(model, batch):
        model(batch["ids"][:, :-1])
        return np.full(8, 0.95)

    monkeypatch.setattr(study, "_right", right)
    found = study._routed([0], "cpu")
    assert found.state == "does not hold"  # no better than a static plan
    assert found.figure == pytest.approx(0)


def test_the_mixture_asks_for_what_each_task_answers():
    batch = study.mixture(40, torch.Generator().manual_seed(0))
    task, ids = KeyedPasskey(study.FULL["length"]), batch["ids"]
    assert batch["task"].tolist() == [0, 1] * 20
    for row, asked, kind, prompt in zip(ids, batch["asked"], batch["task"], batch["prompt"], strict=True):
        at = asked.nonzero()[:, 0]
        assert int(at[0]) == int(prompt)  # nothing of the answer is in the prompt
        if kind == study.RETRIEVAL:
            assert at.tolist() == [len(row) - 1]
            assert task.solve(row[:-1]) == int(row[-1])
        else:
            assert torch.equal(row[at], row[at - study.LAG])
            assert study.LAG <= study.WINDOW


def test_right_answers_are_counted_over_asked_tokens():
    batch = study.mixture(4, torch.Generator().manual_seed(1))
    vocab = KeyedPasskey(study.FULL["length"]).vocab

    def knows(ids):
        return torch.nn.functional.one_hot(batch["ids"][:, 1:], vocab).float() * 50

    def half(ids):
        logits = knows(ids)
        logits[2:] *= -1
        return logits

    assert study._right(knows, batch).tolist() == [1, 1, 1, 1]
    assert study._right(half, batch)[:2].tolist() == [1, 1]
    assert study._right(half, batch)[2:].max() == 0
    assert float(study._loss(knows, batch)) < 1e-6


def test_the_instruments_see_wrong_routers(monkeypatch):
    whole = LayerRouter.features

    def careless(self, q, asked=None):
        return whole(self, q)  # pools the answer too

    with monkeypatch.context() as patched:
        patched.setattr(LayerRouter, "features", careless)
        assert study._feature(0).state == "does not hold"
    mixed = LayerRouter.mixed
    monkeypatch.setattr(LayerRouter, "mixed", lambda self, z, *a, **how: mixed(self, 1 - z, *a, **how))
    assert study._gate(0).state == "does not hold"
