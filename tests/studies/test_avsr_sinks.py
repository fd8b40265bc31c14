"""Sinks in speech models, shrunk: flags, sinks made by hand, the loss, fine-tuning that runs, verdicts."""

import numpy as np
import pytest
import xarray as xr

from regard.studies import avsr_sinks, protocol
from regard.tasks import decoder
from regard.tasks.bytetext import byte_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    decoder.build(decoder.SIZES["smoke"], 0).save_pretrained(folder)
    byte_tokenizer(512).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(avsr_sinks, "SEEDS", {"smoke": 2, "full": 1})
    monkeypatch.setattr(avsr_sinks, "SAMPLES", 2)
    monkeypatch.setattr(avsr_sinks, "LENGTH", 64)
    monkeypatch.setattr(avsr_sinks, "SHORT", (8, 2, 32, 3e-3, 1.0))
    monkeypatch.setattr(avsr_sinks, "SPEECH", (2, 2, 1e-3, 0.1, 2, 4))
    monkeypatch.setattr(avsr_sinks, "PENALTIES", (1e-3, 1e-2))


def test_smoke(small, tiny, tmp_path):
    record = protocol.run_and_record("avsr-sinks", model=tiny)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert (found["massive"]["state"], found["massive"]["figure"]) == ("holds", 1.0)
    assert found["indices"]["state"] == "not measured"  # an untrained model has none
    assert "none found" in found["indices"]["reason"]
    assert found["decorrelates"]["figure"] < found["decorrelates"]["baseline"]
    assert {found[c]["state"] for c in ("fewer-sinks", "high-downsampling", "low-downsampling")} == {"not measured"}


def test_full_trains_every_arm_and_keeps_to_the_gate(small, tiny, monkeypatch):
    found = {f.claim: f for f in avsr_sinks.run("full", model=tiny)}
    assert set(found) == {c.id for c in avsr_sinks.CLAIMS}
    assert all("below its gate" in found[c.id].reason for c in avsr_sinks.CLAIMS[3:])
    details = found["fewer-sinks"].details
    assert set(details) >= {"without", "with", "l2", "massive", "solver", "penalty"}
    assert all(0 < details[arm][f"r={r}"]["error"] <= 1 for arm in ("without", "with", "l2") for r in (2, 8))
    assert set(details["penalty"]) == {"r=2", "r=8"}


def test_a_sink_is_made_by_weight_and_by_likeness():
    received = xr.DataArray(np.zeros((3, 2, 1, 20)), dims=("layer", "head", "sample", "key"))
    like = xr.DataArray(np.zeros((3, 1, 20)), dims=("layer", "sample", "position"))
    received[1, 1, 0, [0, 4, 6, 15]] = 0.5
    like[0, 0, [0, 4, 5, 15]] = 0.95

    class Atlas:
        def need(self, name):
            return {"received_raw": received, "bos_cos": like}[name]

    found = avsr_sinks.sinks(Atlas())
    assert found.sum() == 1
    assert found[1, 0, 4]


def test_the_blocks_begin_where_the_activations_appear():
    over = np.ones((4, 2, 5))
    over[2:, :, 0] = 50
    assert avsr_sinks.layers_of([{"over": over}, {"over": over}]) == [2, 3]


def test_flagged_tokens_are_compared_with_the_first():
    rng = np.random.default_rng(0)
    over, jaccard = rng.uniform(1, 20, (2, 8, 12)), rng.choice([0.0, 1 / 3], (2, 8, 12))
    over[1, :, 5], jaccard[1, :, 5] = 40, 1.0
    look = {
        "over": over,
        "jaccard": jaccard,
        "sinks": np.zeros((2, 8, 12), bool),
        "flagged": {30: 8, 100: 0, 1000: 0},
        "first": {30: 0, 100: 0, 1000: 0},
    }
    finding = avsr_sinks._indices([look])
    assert (finding.state, finding.figure) == ("holds", 1.0)
    assert finding.floor < 1 / 3
    jaccard[1, :, 5] = 0.0
    assert avsr_sinks._indices([look]).state == "does not hold"


def test_the_verdicts_of_the_fine_tuned():
    def arm(error, sinks, seed):
        noise = np.random.default_rng(seed).normal(size=16) * 0.01
        return {
            "error": error + noise,
            "sinks": sinks + noise,
            "entropy": 0.5 + noise,
            "massive": 10.0,
            "solver": 0.1,
        }

    def found(with_sinks, gain):
        arms = {
            (rate, s): {"without": arm(0.1, 2.0, s), "with": arm(0.1 - gain, with_sinks, s + 9), "l2": arm(0.1, 1.8, s)}
            for rate in (2, 8)
            for s in range(2)
        }
        return {f.claim: f for f in avsr_sinks.judge({"arms": arms, "chosen": {2: 1e-3, 8: 1e-3}})}

    assert all(f.state == "holds" for f in found(0.2, 0.05).values())
    worse = found(1.5, -0.05)
    assert all(f.state == "does not hold" for f in worse.values())
    assert worse["fewer-sinks"].baseline == pytest.approx(0.9, abs=0.01)
