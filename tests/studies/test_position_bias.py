"""Position bias, shrunk: closed forms hold and break where they should, every claim is judged, the control is one."""

import numpy as np
import pytest
import torch

from regard.patterns import Causal, coverage
from regard.studies import position_bias as study
from regard.studies import protocol
from regard.tasks.in_context import InContext


@pytest.fixture
def small(monkeypatch):
    for name, value in {"STEPS": 3, "SEEDS": 2, "TESTS": 40, "BATCH": 8, "DEPTHS": (1, 2)}.items():
        monkeypatch.setattr(study, name, value)


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SAMPLES", 8)
    record = protocol.run_and_record("position-bias", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    for claim in ("influence", "binomial", "peak", "centers", "sink"):
        assert found[claim]["state"] == "holds"
    for claim in ("depth", "dense"):
        assert found[claim]["state"] == "not measured"
    assert abs(found["sink"]["baseline"]) < 0.01  # without a mask token 0 is like any other


def test_full_judges_every_claim(small):
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS}
    by_seed = findings["depth"].details["gap_by_seed"]
    assert set(by_seed) == {f"{e} {d}" for e in (*study.ENCODINGS, "dense") for d in (1, 2)}
    gains = [np.mean(by_seed[f"{e} 2"]) - np.mean(by_seed[f"{e} 1"]) for e in study.ENCODINGS]
    assert findings["depth"].figure == pytest.approx(min(gains))
    assert findings["dense"].state == "holds"
    assert findings["dense"].figure == 0


def test_the_dense_control_cannot_tell_places_apart():
    """Logits of both exchanges agree for any weights; under the causal mask they do not."""
    task = InContext()
    one, two = task.exchange(20, "first", "middle", torch.Generator().manual_seed(0))
    for encoding, blind in (("dense", True), ("none", False), ("decay", False), ("rope", False)):
        network = study.network(task, encoding, 2, 0)
        with torch.no_grad():
            assert torch.allclose(network(one.x), network(two.x), atol=1e-6) == blind or not blind
            moved = (network(one.x) - network(two.x)).abs().max()
        assert (float(moved) > 1e-6) != blind


def test_a_rollout_that_is_off_by_one_layer_is_seen(monkeypatch):
    whole = coverage.influence

    def late(pattern, layers, *rest, **options):
        return whole(pattern, layers + 1, *rest, **options)[1:]

    monkeypatch.setattr(coverage, "influence", late)
    assert study._influence().state == "does not hold"
    assert study._peak().state == "does not hold"


def test_the_decay_mask_of_the_network_is_the_one_rolled_out():
    """With equal inputs a network's weights are the mask's alone."""
    task = InContext(dim=8)
    network = study.network(task, "decay", 3, 0).double()
    share = network.rollout(torch.ones(1, 20, 8, dtype=torch.float64))[:, 0, -1]
    want = coverage.influence(Causal(), 3, 19, 20, decay=study.DECAY)
    torch.testing.assert_close(share, want)
