"""Context awareness, shrunk: both stages, the score against matrices, marks, controls that are controls."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from regard.studies import context_awareness as study
from regard.tasks.symbolic import SYMBOLIC
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def stages():
    return load("testbed:conflict").model, load("testbed:conflict-sft").model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(study, "PROMPTS", 24)
    monkeypatch.setitem(study.DRAWS, "smoke", 2)


def test_the_study_of_the_shipped_stages(small):
    found = {f.claim: f for f in study.run()}
    assert found["score"].state == "holds"
    assert found["loss"].state == "holds"
    assert found["loss"].interval[0] > 0.4
    cells = found["loss"].details["cells"]
    assert cells["before, conflict, plain"] > 0.95
    assert cells["after, none, template"] > 0.95
    assert found["indicator"].state == "not measured"


def test_a_model_compared_with_itself_has_lost_nothing(small, stages):
    before, _ = stages
    share = study.share(before, [0, 1])
    assert (share == study.share(before, [0, 1], edits=lambda m, b: study.turned(m, b, 1.0))).all()
    assert share.mean() > 0.95


def test_turning_weights_moves_them(small, stages):
    from regard.watch.intervene import Site, trace

    _, after = stages
    batch = study.conflicts(0, chat=True)
    site = Site(0, "weights", pos=12)  # <assistant>
    plain, edited = (
        trace(after, {"input_ids": batch.input_ids}, site, edits=e)[site]
        for e in ((), study.turned(after, batch, 0.5)[:1])
    )
    user = batch.groups["user"][0]
    wanted = torch.where(user, plain, 0.5 * plain)
    torch.testing.assert_close(edited, wanted / wanted.sum(-1, keepdim=True))
    assert edited[..., user].sum() > plain[..., user].sum()


def test_examples_are_scored_and_marked(monkeypatch, stages):
    before, _ = stages
    monkeypatch.setattr(study, "EXAMPLES", 200)
    drawn, scores, dependent = study.examples(before, 0)
    assert scores.shape == dependent.shape == (200,)
    assert ((scores >= 0) & (scores <= 1 + 1e-6)).all()
    assert dependent.mean() == pytest.approx(0.1, abs=0.06)
    bed = SYMBOLIC["conflict-sft"]
    monkeypatch.setitem(SYMBOLIC, "conflict-sft", replace(bed, recipe=replace(bed.recipe, steps=2, warmup=1, decay=1)))
    monkeypatch.setattr(study, "SEEDS", 2)
    monkeypatch.setattr(study, "PROMPTS", 24)
    finding = study._indicator(before, 0)
    assert finding.state == "does not hold"  # two steps change little, so there is nothing to keep
    assert abs(finding.figure) < 0.3
    tuned = {}
    for name, score in (("none", None), ("score", scores), ("again", scores)):
        tuned[name] = deepcopy(before)
        study.tune(tuned[name], drawn, score, 3)
    a, b, c = (torch.cat([p.flatten() for p in tuned[n].parameters()]) for n in ("none", "score", "again"))
    assert torch.equal(b, c)
    assert not torch.equal(a, b)


def test_looking_is_the_most_of_any_head(stages):
    before, _ = stages
    batch = study.conflicts(3)[:4]
    seen, all_keys = study.looks(before, batch, "context"), study.looks(before, batch)
    assert seen.shape == (4, 4)
    assert (seen <= all_keys + 1e-6).all()
    assert np.ptp(seen) > 0.01
