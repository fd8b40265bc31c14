"""Cylindrical steering, shrunk: the split, the first strengths, planted geometry, and a gate that can close."""

import numpy as np
import pytest
import torch

from regard.studies import cylindrical_steering as study
from regard.studies.granularity_axis import Roles
from regard.tasks.testbeds import load


@pytest.fixture(scope="module")
def bed():
    roles = Roles(load(study.MODEL).model, "cpu")
    roles.layer = 1
    return roles


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(study.SEEDS, "smoke", 1)
    monkeypatch.setitem(study.SAMPLES, "smoke", 6)
    monkeypatch.setattr(study, "FIT", 24)
    monkeypatch.setitem(study.STRENGTHS, "smoke", (1.0, 4.0))
    monkeypatch.setitem(study.PENALTIES, "smoke", (0.0, 1.0))
    monkeypatch.setitem(study.SLOPES, "smoke", 16)
    monkeypatch.setattr(study, "REPEATS", 2)
    monkeypatch.setattr(study, "RISE", (0.25, 0.5))


def test_every_claim_is_judged(small):
    found = {f.claim: f for f in study.run()}
    assert set(found) == {c.id for c in study.CLAIMS}
    assert found["split"].state == "holds"
    concept = found["concept-later"]
    assert all(np.shape(concept.details["shown"][way]) == (2, 2) for way in study.WAYS)
    assert concept.details["shown"]["mean"][0][1] == 1  # without a penalty, four times the vector always shows
    assert found["corruption-later"].state == "not measured"
    assert all(-1 <= found[claim].figure <= 1 for claim in ("exponents", "unlike"))


def test_slopes_are_of_single_samples(bed, small, monkeypatch):
    monkeypatch.setattr(study, "RISE", (0.0, 4.0))
    slopes = study.steerability(bed, 8, 0)
    assert slopes["slope"].shape == slopes["cosine"].shape == slopes["length"].shape == (8,)
    np.testing.assert_allclose(slopes["slope"], 0.25)  # never without, always at four times the vector
    assert slopes["share"] == [0, 1]
    np.testing.assert_allclose(np.diag(slopes["alike"]), 1, atol=1e-5)


def test_prompts_differ_by_the_speaker_alone(bed):
    without, told = study.prompts(bed, 20, torch.Generator().manual_seed(0))
    assert (without[:, 1] == bed.task.vocabulary["nobody"]).all()
    assert (bed.task.level(told[:, 1] - bed.task.vocabulary["role0"]) == 5).all()
    assert torch.equal(without[:, 2:], told[:, 2:])
    assert (bed.task.judge(without[:, 2:]) < 2.5).all()


@pytest.mark.parametrize("way", study.WAYS)
def test_every_way_leads_towards_the_concept(bed, way):
    mean, other = (study.vector(bed, w, torch.Generator().manual_seed(0)) for w in ("mean", way))
    assert torch.cosine_similarity(mean, other, dim=0) > 0.3
    torch.testing.assert_close(mean.norm(), other.norm(), atol=1e-3, rtol=1e-4)


def test_first_strength_and_none():
    outcome = np.array([[0.0, 0, 1], [1, 0, 0], [1, 0, 1]])
    np.testing.assert_array_equal(study.first(outcome), [1, 3, 0])


def test_other_tokens_are_corrupted(bed):
    ids, _ = study.prompts(bed, 3, torch.Generator().manual_seed(0))
    numbers = torch.full((3, 2), 0.5)
    broken = study.steered(bed, ids, torch.zeros(3, 96), numbers, np.inf)
    assert broken["corrupted"].all()
    assert not study.steered(bed, ids, torch.zeros(3, 96), numbers, -np.inf)["corrupted"].any()


def planted(strength, n=400, seed=0):
    g = np.random.default_rng(seed)
    cosine, length = g.uniform(0.1, 0.9, n), g.uniform(1, 2, n)
    slope = length**2 * (strength * np.sqrt(1 - cosine**2) * cosine + 0.1 * g.normal(size=n))
    axes = g.normal(size=(n, 20))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return {"slope": slope, "length": length, "cosine": cosine, "alike": axes @ axes.T, "share": []}


def test_planted_exponents_are_found_and_none_are_not():
    found = study.exponents(planted(1.0), 0)
    assert found.figure > max(found.baseline, 0.5)
    none = study.exponents(planted(0.0), 0)
    assert none.figure < 0.2
    assert none.state == "does not hold"


def test_likeness_of_random_axes_tells_nothing_and_planted_likeness_is_seen():
    assert study.unlike(planted(0.0, n=120), 0).state == "holds"
    like = planted(0.0, n=120)
    direction = np.linspace(0, np.pi / 2, 120)
    axes = np.stack([np.cos(direction), np.sin(direction)], 1)
    seen = study.unlike(like | {"alike": axes @ axes.T, "slope": direction}, 0)
    assert seen.figure > 0.9
    assert seen.state == "does not hold"


def test_below_the_gate_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda loaded, *gates: "testbed below its gate: excess")
    assert all(f.state == "not measured" and "gate" in f.reason for f in study.run())
