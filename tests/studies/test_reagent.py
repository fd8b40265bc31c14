"""ReAGent, shrunk: an untrained model; areas of scores that are known; a model that reads by one rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from regard.studies import reagent as study
from regard.tasks.lists import ColouredObjects
from regard.tasks.symbolic import SYMBOLIC


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lists")
    replace(SYMBOLIC["lists"], layers=2, dim=32, heads=4).build(0).save_pretrained(path)
    SYMBOLIC["lists"].vocabulary.tokenizer(80).save_pretrained(path)
    return path


@pytest.fixture
def small(monkeypatch):
    small = {"STEPS": 6, "RUNS": 2, "CHECK": 3, "MASKS": 2, "POINTS": 2, "SAMPLES": 32, "ITEMS": 4}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    for size in ("smoke", "full"):
        monkeypatch.setitem(study.PROMPTS, size, 3)


def test_an_untrained_model_is_not_measured(folder, small):
    findings = study.run(model=str(folder))
    assert {f.claim for f in findings} == {c.id for c in study.CLAIMS if not c.waits}
    assert all("lists of 4 rightly, 3 are needed" in f.reason for f in findings)


def test_both_sizes_on_prompts_of_any_kind(folder, small, monkeypatch):
    monkeypatch.setattr(
        "regard.studies.circuit_reuse.answered", lambda m, b, e=(): torch.ones(len(b), dtype=torch.bool)
    )
    smoke = {f.claim: f for f in study.run(model=str(folder))}
    assert smoke["faithful"].state == "not measured"
    assert set(smoke["planted"].details["auroc"]) == {"reagent", "attention"}
    assert smoke["step"].state == "holds"
    monkeypatch.setattr(study, "one_step", lambda *_: torch.zeros(()))
    assert {f.claim: f.state for f in study.run(model=str(folder))}["step"] == "does not hold"
    full = {f.claim: f for f in study.run("full", model=str(folder))}
    assert set(full["planted"].details["auroc"]) == {"reagent", *study.OTHERS}
    assert len(full["faithful"].details["differences"]) == 2 * 7
    assert full["planted"].state == full["faithful"].state == "does not hold"


def test_areas_of_scores_that_are_known():
    batch = ColouredObjects(4).batch(5, torch.Generator().manual_seed(0))
    perfect = torch.zeros(5, batch.input_ids.shape[1] - 1)
    for name in study.RELEVANT:
        perfect[torch.arange(5), batch.spans[name][:, 0]] = 1
    perfect[:, 0] = 9  # the first token does not count
    assert (study.planted(batch, perfect) == 1).all()
    np.testing.assert_allclose(study.planted(batch, 0 * perfect), 0.5)
    other = torch.rand(perfect.shape, generator=torch.Generator().manual_seed(0))
    assert study._planted(batch, {"reagent": perfect, "attention": other}, 0).state == "holds"
    assert study._planted(batch, {"reagent": other, "attention": perfect}, 0).state == "does not hold"
    assert study._planted(batch, {"reagent": perfect, "attention": perfect}, 0).state == "does not hold"
