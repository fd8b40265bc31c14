"""Grokking diagnostics, shrunk: instruments hold, the leak of ordered pairs shows, every claim is judged."""

import numpy as np
import pytest
import torch

from regard.studies import grokking_diagnostics as study
from regard.studies import protocol


@pytest.fixture
def small(monkeypatch):
    for name, value in {"P": 11, "STEPS": 60, "DIM": 32, "LOGS": 4, "SEEDS": {"smoke": 1, "full": 2}}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "GRID_ON", ("cpu",))
    monkeypatch.setattr(study, "GRID", {"p": 5, "layers": 2, "steps": 20, "seeds": 2, "decays": (0.1, 1.0)})


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("grokking-diagnostics", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["numbers"]["state"] == "holds"
    # Without decay what is known is what was trained on: mirror images where there are some, nothing elsewhere.
    assert found["regimes"]["baseline"] > 0.35
    log = found["regimes"]["details"]["log"]
    assert log["decay 1"]["norm"][-1] < log["decay 0"]["norm"][-1]
    for claim in ("unseen", "threshold", "foretell", "reinitialise"):
        assert found[claim]["state"] == "not measured"


def test_full_judges_every_claim_that_does_not_wait(small):
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    assert findings["regimes"].baseline > 0.35
    assert findings["unseen"].baseline < 0.2
    assert len(findings["unseen"].details["test_accuracy"]["decay 0"]) == 2


def grid(edge, tell, seeds=8):
    """Runs that generalise above a decay; the spread at 30% tells which, or nothing does."""
    generator = np.random.default_rng(0)
    decay, seed = (x.ravel() for x in np.meshgrid(np.geomspace(0.003, 3, 8), np.arange(seeds), indexing="ij"))
    done = decay * np.exp(generator.normal(0, 0.3, len(decay))) > edge
    log = generator.normal(1, 0.1, (4, len(decay), 4)) ** 2
    log[1, :, 3] += tell * done
    return {"decay": decay, "seed": seed, "test": np.repeat(done[:, None] * 1.0, 5, 1), "log": log,
            "times": [1, 30, 60, 100], "steps": 100}  # fmt: skip


def test_the_threshold_is_found():
    found = study._threshold(grid(0.1, 0), 0)
    assert found.state == "holds"
    assert found.figure == pytest.approx(0.1, rel=0.35)
    # Between the decays tried on either side of it, 0.058 and 0.155.
    assert 0.058 < found.interval[0] <= found.figure <= found.interval[1] < 0.155
    assert study._threshold(grid(100, 0), 0).state == "not measured"


def test_numbers_that_tell_are_worth_something_and_noise_is_not():
    assert study._foretell(grid(0.1, 3.0), 0).state == "holds"
    assert study._foretell(grid(0.1, 0), 0).state == "does not hold"
    assert study._foretell(grid(100, 0), 0).state == "not measured"


def test_logistic_finds_its_weights():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(20_000, 1))
    y = generator.random(20_000) < 1 / (1 + np.exp(-(2 * x[:, 0] - 1)))
    assert study.logistic(x, y * 1.0) == pytest.approx([2, -1], abs=0.1)


def test_the_grid_is_refused_by_name_on_a_cpu(small, monkeypatch):
    monkeypatch.setattr(study, "GRID_ON", ("cuda",))
    monkeypatch.setattr(study, "STEPS", 4)
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert findings["threshold"].state == findings["foretell"].state == "not measured"
    assert "--device cuda" in findings["threshold"].reason


def test_the_last_block_on_the_last_token_alone_is_the_model():
    model = study.build(7, 2, 0).double()
    ids = torch.tensor([[1, 2, 7], [6, 0, 7]])
    torch.testing.assert_close(study.answers(model, ids), model(ids)[:, -1])
