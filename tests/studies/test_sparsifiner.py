"""Sparsifiner, shrunk: the instrument sees wrong guesses, controls keep as many keys, every arm trains sparse."""

import pytest
import torch

from regard.layers.lowrank_route import LowRankRoute
from regard.studies import protocol
from regard.studies import sparsifiner as study


@pytest.fixture
def small(monkeypatch):
    sizes = {"dim": 16, "heads": 2, "layers": 2, "batch": 8, "steps": 4, "distil": 4, "tests": 8}
    monkeypatch.setattr(study, "SMALL", sizes)
    monkeypatch.setattr(study, "SEEDS", {"smoke": 1, "full": 1})


def test_smoke_judges_the_parts_and_a_small_vit(small):
    record = protocol.run_and_record("sparsifiner", seed=1)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["guess"]["state"] == "holds"
    mass = found["mass"]
    assert mass["floor"] == pytest.approx(0.25, abs=0.1)
    assert set(mass["details"]["mass"]) == {"picked", "untaught", "random", "nearest", "window", "oracle"}
    assert mass["ceiling"] >= max(mass["figure"], mass["baseline"])
    assert found["accuracy"]["state"] == found["chosen"]["state"] == "not measured"
    assert "ImageNet" in found["imagenet"]["reason"]


def test_operations_are_counted_with_the_predictor():
    found = study._operations()
    n, d, c, r, keys = 197, 64, 32, 32, 50
    dense = 2 * d * n * n
    guess = 2 * n * d * c + 2 * n * c * r + 8 * n * n
    sparse = 2 * d * (n + 196 * keys)
    assert found.figure == pytest.approx(1 - (sparse + guess) / dense)
    assert found.figure < found.baseline < found.ceiling
    assert found.state == "does not hold"  # 0.44 with the predictor's projections, 0.61 without


def test_full_trains_every_arm_on_the_shipped_vit(small, monkeypatch):
    from regard.tasks import vision

    monkeypatch.setattr(study, "FULL", {"distil": 1, "sparse": 1, "batch": 4})
    whole = vision.digits

    def few(split):
        images = whole(split)
        return vision.Images(images.x[:8], images.labels[:8])

    monkeypatch.setattr(vision, "digits", few)
    found = {f.claim: f for f in study._accuracy("testbed:vit", [0], "cpu")}
    assert set(found["accuracy"].details["by_seed"]) == set(study.ARMS)
    assert found["accuracy"].state in ("holds", "does not hold")
    assert found["chosen"].figure == pytest.approx(found["accuracy"].figure - found["accuracy"].floor)


def test_a_model_below_its_gate_is_not_measured(monkeypatch):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda loaded, *gates: "testbed below its gate: accuracy")
    found = study._accuracy("testbed:vit", [0], "cpu")
    assert {f.state for f in found} == {"not measured"}


def test_controls_keep_as_many_keys_and_choose_otherwise():
    torch.manual_seed(0)
    route, generator = LowRankRoute(8, 21), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 21, 8).unbind(0)
    own = route(q, k)
    assert study.control(route, "picked", generator) is route
    for arm in ("random", "oracle"):
        other = study.control(route, arm, generator)(q, k)
        assert torch.equal(other.count, own.count)
        assert not other.equal(own)
        assert other.keep == own.keep


def test_the_instrument_sees_a_wrong_guess_and_wrong_keys(monkeypatch):
    assert study._guess(3).state == "holds"
    cut = LowRankRoute.select
    with monkeypatch.context() as patched:
        patched.setattr(
            LowRankRoute, "predict", lambda self, q, k: self._coefficients(q, self.summarize(k)) @ self.mix.T
        )
        assert study._guess(3).state == "does not hold"

    def ascending(self, q, summary, **how):
        self.coefficients = 1
        return cut(self, q, summary, **how)

    monkeypatch.setattr(LowRankRoute, "select", ascending)
    assert study._guess(3).state == "does not hold"
