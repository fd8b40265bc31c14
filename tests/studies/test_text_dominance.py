"""Text dominance, shrunk: an identity, groups that add up, controls that are controls."""

import numpy as np
import pytest
import torch

from regard.studies import protocol, text_dominance
from regard.tasks.vlm import seer


@pytest.fixture(scope="module")
def eye():
    return seer("testbed:vlm")


def test_every_claim_is_judged_and_the_identity_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("regard.studies.testbed.below_gate", lambda *_: "")
    monkeypatch.setitem(text_dominance.QUESTIONS, "smoke", 8)
    monkeypatch.setitem(text_dominance.DRAWS, "smoke", 2)
    monkeypatch.setattr(text_dominance, "REMOVED", (0.75,))
    record = protocol.run_and_record("text-dominance", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["identity"]["state"] == "holds"
    assert found["identity"]["figure"] < 1e-12
    assert len(found["dominance"]["details"]["thirds"]["without it"]) == 3
    assert set(found["compression"]["details"]["mdi and accuracy"]) == {
        *(f"75% removed, {how}" for how in text_dominance.WAYS),
        "nothing removed",
    }


def test_mass_is_what_a_row_has_and_keys_are_counted(eye):
    w = text_dominance.watched(eye, eye.questions(8, 0))
    text, image = (text_dominance.GROUPS.index(name) for name in ("text", "image"))
    heads = eye.model.config.text_config.num_attention_heads
    np.testing.assert_allclose(w.mass[..., text] + w.mass[..., image], 8 * heads, rtol=1e-5)
    first, question = (text_dominance.GROUPS.index(name) for name in ("first", "question"))
    np.testing.assert_allclose(w.mass[..., first] + w.mass[..., question], w.mass[..., text], rtol=1e-5)
    assert (w.keys[0, 0] / heads / 8).tolist() == [1, 6, 5, 36]


def test_keeping_every_token_is_keeping_the_picture(eye):
    probes = eye.questions(8, 1)
    whole = text_dominance.watched(eye, probes, torch.arange(36).expand(8, -1))
    plain = text_dominance.watched(eye, probes)
    np.testing.assert_allclose(whole.mass, plain.mass)
    assert text_dominance.copies(eye, 2).shape == (2, 180)
    diluted = text_dominance.watched(eye, probes, text_dominance.copies(eye, 8))
    image = text_dominance.GROUPS.index("image")
    assert (diluted.keys[..., image] == 5 * plain.keys[..., image]).all()


def test_an_interval_of_equal_draws_is_a_point():
    class Same:
        mass = np.zeros((4, 1))

    assert text_dominance._resampled(lambda w, rows: 2.0, [Same(), Same()], draws=10) == (2.0, 2.0)
