"""The learning half of preplan-anchor, small: arms start alike, meet the same questions, and differ in credit alone."""

import numpy as np
import pytest
import torch

from regard.models.decoder import Decoder
from regard.studies import preplan_anchor as study
from regard.tasks.countdown import Countdown
from regard.train import policy
from regard.train.credit import rhythm, token_gain


@pytest.fixture
def tiny(monkeypatch):
    for name, value in (("SHOWN", 4), ("STEPS", 2), ("QUESTIONS", 8), ("SEEDS", 2)):
        monkeypatch.setitem(getattr(study, name), "full", value)


def test_credit_reads_the_models_own_weights():
    """The factors of an arm are those of weights computed by hand from the layers' projections."""
    task = Countdown()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(task.vocab, study.DIM, study.LAYERS, study.HEADS).eval()
    ids = task.batch(5, torch.Generator().manual_seed(1)).input_ids
    n = ids.shape[1]
    weights = []
    with torch.no_grad():
        x = model.embed(ids)
        for block in model.blocks:
            layer, h = block.attention, block.norm1(x)
            q, k = (f(h).unflatten(-1, (study.HEADS, -1)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
            q, k = layer.position.rotate(q, k, torch.arange(n), torch.arange(n))
            scores = q @ k.mT * layer.head_dim**-0.5
            weights.append(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1))
            x = block(x, pattern=model.patterns[0])
    signals = rhythm(weights, task.prompt, near=study.NEAR, far=study.FAR)
    for arm in ("local", "global", "coupled"):
        got = study._credit(arm, task.prompt)(model, ids, None)
        assert got.shape == (5, task.answer)
        torch.testing.assert_close(got, token_gain(*signals, arm))
    assert study._credit("uniform", task.prompt) is None
    drawn = study._credit("random", task.prompt)(model, ids, torch.Generator().manual_seed(0))
    assert (drawn.sum(1) == task.answer + 0.5 * round(0.4 * task.answer)).all()


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
