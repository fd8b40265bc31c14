"""Paths of training, shrunk: the instrument is exact, nulls are nulls, made-up runs are judged as they should be."""

import numpy as np
import pytest

from regard.studies import execution_manifolds as study
from regard.studies import protocol


@pytest.fixture
def small(monkeypatch):
    shape = {"smoke": (1, 8, 2, 20), "full": (2, 8, 2, 20)}
    for name, value in {"SHAPE": shape, "SEEDS": 2, "BATCH": 8, "POINTS": 10, "PAIRS": 1, "RANDOM": 2}.items():
        monkeypatch.setattr(study, name, value)


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("execution-manifolds", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["commutator"]["state"] == "holds"
    assert found["commutator"]["figure"] < 1e-3
    for f in found.values():
        assert (f["state"] == "not measured") == (f["claim"] in ("routing", "execution"))
        if f["interval"]:
            assert f["interval"][0] <= f["figure"] <= f["interval"][1]
    runs = found["dimension"]["details"]["by_run"]
    assert [r["seed"] for r in runs] == [1, 2]
    assert all(r["dimension"] <= 9 for r in runs)
    # 8 x 8 keys of a causal row of 2 to 31 keys: entropies lie below log 31.
    assert all(0 < entropy < np.log(31) and 0 < mass < 1 for r in runs for entropy, mass in r["noted"])


def test_full_judges_every_layer_of_every_run(small):
    found = {f.claim: f for f in study.run("full", seed=0)}
    assert set(found) == {c.id for c in study.CLAIMS}
    assert len(found["dimension"].details["by_run"]) == 2 * 2 * 2
    assert "THE SUM IS NOT LEARNED" in found["routing"].reason


def made(dimension=3, walk=12, curve=4, inside=0.05, early=8.0, seed=0):
    return {"dimension": dimension, "nulls": {"walk": walk, "curve": curve}, "first": 0.7, "bubble": 0.5, "noted": [],
            "inside": [inside] * 4, "early": early, "whole": 6.0, "chance": 0.01, "seed": seed}  # fmt: skip


def test_verdicts():
    seeds = range(3)
    assert study._dimension([made(seed=s) for s in seeds], "").state == "holds"
    # As flat as any smooth curve says nothing, few dimensions or not.
    assert study._dimension([made(curve=3, seed=s) for s in seeds], "").state == "does not hold"
    assert study._dimension([made(dimension=5, curve=6, seed=s) for s in seeds], "").state == "does not hold"
    assert study._inside([made(seed=s) for s in seeds], "").state == "holds"
    assert study._inside([made(early=4.9, seed=s) for s in seeds], "").state == "does not hold"
    assert study._outside([made(seed=s) for s in seeds], "").state == "holds"
    assert study._outside([made(inside=0.09, seed=s) for s in seeds], "").state == "does not hold"


def test_the_interval_is_over_seeds():
    judged = [made(early=e, seed=s) for s, e in ((0, 2.0), (0, 4.0), (1, 9.0))]
    figure, (low, high) = study.over_seeds(judged, lambda j: j["early"])
    assert figure == 6
    assert (low, high) == (3, 9)


def test_features_of_a_layer_that_is_needed(small, monkeypatch):
    """A layer made to be needed: what the autoencoder's features are judged by stays within what it can be."""
    monkeypatch.setattr(study, "SAE_STEPS", 30)
    monkeypatch.setattr(study, "SEQUENCES", (8, 40))
    monkeypatch.setattr(study, "LEARNED", -1.0)
    found = {f.claim: f for f in study.run("full", seed=0)}
    coded = found["routing"].details["by_run"]
    assert [c["seed"] for c in coded] == [0, 1, 0, 1]
    assert all(c["layer"] in (0, 1) for c in coded)
    assert all(0 <= c["auc"] <= 1 and 0 <= c["random_auc"] <= 1 for c in coded)


def coded(auc=0.99, lost=0.2, seed=0):
    return {"auc": auc, "random_auc": 0.8, "lost": lost, "random_lost": 0.1, "seed": seed, "layer": 0, "l0": 3.0,
            "accuracy": 1.0, "mean": 0.2}  # fmt: skip


def test_verdicts_of_features():
    assert study._routing([coded(), coded(seed=1)], "").state == "holds"
    assert study._routing([coded(auc=0.9)], "").state == "does not hold"
    assert study._execution([coded(), coded(seed=1)], "").state == "holds"
    assert study._execution([coded(lost=0.9)], "").state == "does not hold"
