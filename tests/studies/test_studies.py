"""The studies of the shipped decoder, small: instruments hold, every claim is judged, controls are controls."""

import json

import numpy as np
import pytest
import torch

from regard.studies import preplan_anchor, protocol, retrieval_heads, secondary_sinks
from regard.tasks.needle import Needle
from regard.tasks.testbeds import load


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(retrieval_heads.TESTS, "smoke", 4)
    monkeypatch.setitem(secondary_sinks.SAMPLES, "smoke", 2)
    monkeypatch.setattr(secondary_sinks, "LENGTH", 96)
    monkeypatch.setitem(preplan_anchor.SAMPLES, "smoke", 2)
    monkeypatch.setattr(preplan_anchor, "RESPONSE", 60)
    for name, value in (("SHOWN", 2), ("STEPS", 1), ("QUESTIONS", 4)):
        monkeypatch.setitem(getattr(preplan_anchor, name), "smoke", value)


INSTRUMENT = {"retrieval-heads": "score", "secondary-sinks": "cosine", "preplan-anchor": "waad"}


@pytest.mark.parametrize("name", sorted(INSTRUMENT))
def test_a_study_judges_every_claim_and_its_instrument_holds(name, tmp_path):
    record = protocol.run_and_record(name, size="smoke", seed=1)
    json.loads(protocol.keep(record, tmp_path).read_text())
    found = {f["claim"]: f for f in record["findings"]}
    assert found[INSTRUMENT[name]]["state"] == "holds"
    for finding in found.values():
        if finding["state"] == "not measured":
            assert finding["reason"]
        elif finding["interval"] is not None:
            low, high = finding["interval"]
            assert low <= high


@pytest.mark.parametrize("name", sorted(INSTRUMENT))
def test_a_study_below_the_gate_says_so(name, monkeypatch):
    from regard.studies import testbed

    monkeypatch.setattr(testbed, "below_gate", lambda loaded, *gates: "testbed below its gate: for the test")
    findings = protocol.study(name)
    kinds = {c.id: c.kind for c in protocol.get(name).CLAIMS}
    for finding in findings:
        if kinds[finding.claim] == "instrument":
            assert finding.state == "holds"
        else:
            assert finding.state == "not measured"


def test_masking_every_head_is_no_retrieval_and_masking_none_is_the_model():
    loaded = load("testbed:decoder")
    task = Needle(256, split="test")
    drawn = [task.batch(6, torch.Generator().manual_seed(0))]
    plain = retrieval_heads.exact(loaded.model, drawn)
    with torch.no_grad():
        top = loaded.model(drawn[0].input_ids).logits[:, :-1].argmax(-1)
    asked = drawn[0].labels[:, 1:]
    assert plain.tolist() == ((top == asked) | (asked < 0)).all(-1).double().tolist()
    layers, heads = loaded.model.config.num_hidden_layers, loaded.model.config.num_attention_heads
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    assert retrieval_heads.exact(loaded.model, drawn, everything).sum() == 0


def test_the_other_code_differs_only_in_the_needle():
    task = Needle(256, split="test")
    plain = task.batch(8, torch.Generator().manual_seed(3))
    other = retrieval_heads.OtherCode(task).batch(8, torch.Generator().manual_seed(3))
    assert torch.equal(plain.labels, other.labels)
    for row, (a, b) in enumerate(plain.spans["value"].tolist()):
        changed = (plain.input_ids[row] != other.input_ids[row]).nonzero().flatten()
        assert len(changed)
        assert ((changed >= a) & (changed < b)).all()


def test_a_vector_of_norm_zero_changes_nothing():
    loaded = load("testbed:decoder")
    import regard
    from regard.tasks.retoken import texts

    ids = texts(loaded, 2, 96, 0)
    parts = regard.anatomy(loaded.model, {"input_ids": ids})
    at = ((10, 20), (11, 30))
    out = secondary_sinks._inject(loaded.model, ids, at, 2, parts, 0)
    plain = secondary_sinks._watched(loaded.model, ids, parts).need("received_raw").isel(layer=slice(3, None))
    expected = np.take_along_axis(plain.mean(("layer", "head")).values, np.array(at), axis=1).mean(1)
    np.testing.assert_allclose(out["score"][0], expected, rtol=1e-5)
    assert out["score"].shape == out["lifetime"].shape == (len(secondary_sinks.FACTORS), 2)
    assert out["random"].shape == (1, 2)
