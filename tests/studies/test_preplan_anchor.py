"""The learning half of preplan-anchor, small: arms start alike, meet the same questions, and differ in credit alone."""

import numpy as np
import pytest
import torch

from regard.studies import preplan_anchor as study
from regard.train import policy


@pytest.fixture
def tiny(monkeypatch):
    for name, value in (("SHOWN", 4), ("STEPS", 2), ("QUESTIONS", 8), ("SEEDS", 2)):
        monkeypatch.setitem(getattr(study, name), "full", value)


def test_all_arms_see_equal_samples_from_one_start(tiny, monkeypatch):
    runs = []
    real = policy.grpo

    def noted(model, questions, reward, tokens, how, *, credit=None, seed=0):
        first = {k: v.clone() for k, v in model.state_dict().items()}
        asked = questions(how.prompts, torch.Generator().manual_seed(0))
        runs.append((first, how, seed, asked, credit is None))
        return real(model, questions, reward, tokens, how, credit=credit, seed=seed)

    monkeypatch.setattr(policy, "grpo", noted)
    found = study.countdown_arms("full", "cpu", 3)
    assert set(found) == {"warm start", *study.ARMS}
    assert all(len(x) == 8 for x in found.values())
    assert len(runs) == 5
    for first, how, seed, asked, plain in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first.values(), runs[0][0].values(), strict=True))
        assert (how, seed) == runs[0][1:3]
        assert torch.equal(asked, runs[0][3])
        assert not plain
    assert runs[0][4]


def test_the_claims_follow_the_differences(monkeypatch):
    """Twenty points more by coupled credit than by the others, in every seed; and the arms turned around."""
    share = {"warm start": 0.2, "uniform": 0.4, "random": 0.4, "local": 0.5, "global": 0.5, "coupled": 0.6}

    def arms(size, device, seed):
        draw = np.random.default_rng(seed)
        return {name: (draw.random(400) < share[name]).tolist() for name in share}

    monkeypatch.setattr(study, "countdown_arms", arms)
    learns, credit = study._countdown("full", "cpu", 0)
    assert (learns.state, credit.state) == ("holds", "holds")
    assert credit.figure == pytest.approx(20, abs=5)
    assert credit.interval[0] < credit.figure < credit.interval[1]
    share |= {"uniform": 0.1, "coupled": 0.3}
    learns, credit = study._countdown("full", "cpu", 0)
    assert (learns.state, credit.state) == ("does not hold", "does not hold")  # above uniform, below random
    assert study._countdown("smoke", "cpu", 0)[1].state == "not measured"
    share["warm start"] = 0.01
    assert [f.state for f in study._countdown("full", "cpu", 0)] == ["not measured"] * 2
