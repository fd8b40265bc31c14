"""Saliency drops, shrunk: figures that equal the matrices', scores that can tell and that cannot."""

import numpy as np
import pytest
import torch

from regard.studies import protocol, saliency_drops
from regard.tasks.scenes import Scenes


@pytest.fixture
def small(monkeypatch):
    for name, value in (("TOKENS", 12), ("DRAWS", 1), ("CAPTIONS", 4), ("SAMPLED", 1)):
        monkeypatch.setitem(getattr(saliency_drops, name), "smoke", value)
    monkeypatch.setattr(saliency_drops, "MOST", 10)


def test_every_claim_is_judged_and_the_instrument_holds(small, tmp_path):
    record = protocol.run_and_record("saliency-drops", seed=3)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["dense"]["state"] == "holds"
    assert found["dense"]["figure"] < 1e-5
    assert found["large"]["state"] == "not measured"
    assert "stop curve" in found["locore"]["reason"]


def draw(saliency, log_p, false, seed=0):
    n = len(false)
    both = np.stack([np.zeros(n), saliency], axis=1).astype(np.float32)
    return {
        "saliency": both,
        "weight": np.ones_like(both),
        "log p": np.asarray(log_p, dtype=np.float32),
        "false": np.asarray(false),
        "caption": np.arange(n) // 2,
        "layers": [1],
    }


def test_saliency_that_tells_and_confidence_that_does_not():
    false = np.arange(40) % 3 == 0
    rng = np.random.default_rng(0)
    told, beyond = saliency_drops._tells([draw(np.where(false, 0.1, 0.9), rng.random(40), false) for _ in range(3)])
    assert (told.state, told.figure, told.baseline) == ("holds", 1.0, 0.5)
    assert beyond.state == "holds"
    assert told.details["saliency by layer"] == [0.5, 1.0]
    other, less = saliency_drops._tells([draw(rng.random(40), np.where(false, 0.1, 0.9), false) for _ in range(3)])
    assert other.state == "does not hold"
    assert less.state == "does not hold"
    none = saliency_drops._tells([draw(rng.random(40), rng.random(40), np.zeros(40, dtype=bool))])
    assert all(f.state == "not measured" and "premise not met" in f.reason for f in none)


def test_saying_less_does_not_count_as_a_cure():
    scenes = Scenes().draw(40, torch.Generator().manual_seed(0))
    first = saliency_drops_words(scenes, lambda there, missing: [*there, missing])
    less = saliency_drops_words(scenes, lambda there, missing: there[:1])
    exact = saliency_drops_words(scenes, lambda there, missing: there)
    curve = [(0.2, 0.0), (1.0, 0.3)]
    cured = saliency_drops._against("sgrs", exact, first, scenes, curve, "", 0)
    assert (cured.state, cured.figure) == ("holds", pytest.approx(-40 / (40 + int(scenes.visible.sum()))))
    curve = [(0.1, 0.0), (0.6, 0.0), (1.0, 0.3)]
    assert saliency_drops._against("sgrs", less, first, scenes, curve, "", 0).state == "does not hold"


def saliency_drops_words(scenes, said):
    """Captions, as ids, that name what `said` picks of what is there and one that is not."""
    from regard.tasks.scene_text import EOS, VOCABULARY
    from regard.tasks.scenes import OBJECTS

    rows = []
    for there in scenes.visible:
        missing = int((~there).nonzero()[0])
        named = said(there.nonzero()[:, 0].tolist(), missing)
        rows.append(VOCABULARY.ids([OBJECTS[o] for o in named] + [EOS] * (8 - len(named))))
    return torch.tensor(rows)
