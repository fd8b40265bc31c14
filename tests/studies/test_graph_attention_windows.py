"""Hop windows, shrunk: the instrument sees wrong pairs, arms differ in the window alone, every claim is judged."""

import pytest
import torch

from regard.patterns import hops
from regard.studies import graph_attention_windows as study
from regard.studies import protocol
from regard.tasks import graphs


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(study.SIZES, "smoke", (25, 16, 1, 200))
    monkeypatch.setitem(study.SIZES, "full", (2, 4, 2, 200))
    for name, value in {"LAYERS": 1, "DIM": 16, "HEADS": 2, "LR": 1e-2}.items():
        monkeypatch.setattr(study, name, value)
    whole = graphs.Community
    monkeypatch.setattr(graphs, "Community", lambda **given: whole(60, 2, 0.5, 0.05, 0.8, 4, **given))


def test_smoke(small, monkeypatch, tmp_path):
    record = protocol.run_and_record("graph-attention-windows", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["window"]["state"] == "holds"
    assert found["best"]["details"]["vote"] > 80
    assert found["best"]["details"]["posterior"] >= found["best"]["details"]["vote"] - 3
    assert set(found["best"]["details"]["by_seed"]) == {"1 both", "4 both", "causal"}
    assert found["transfer"]["state"] == "not measured"
    assert found["shuffled"]["figure"] > 5
    assert len(found["topology"]["details"]["weight_by_hops"][0]) == 5


def test_full_judges_every_claim(small, monkeypatch):
    monkeypatch.setattr(study, "hits", lambda task, model, prompts, *rest: (prompts[:, 1] > 0).double().numpy())
    findings = {f.claim: f for f in study.run("full", seed=0)}
    assert set(findings) == {c.id for c in study.CLAIMS if not c.waits}
    assert all(f.state != "not measured" for f in findings.values())
    by_seed = findings["best"].details["by_seed"]
    assert set(by_seed) == set(study.ARMS["full"])
    assert all(len(x) == 2 for x in by_seed.values())
    assert findings["best"].state == "does not hold"  # every arm answers alike
    assert findings["transfer"].figure == 0


def test_nothing_learned_is_said(small, monkeypatch):
    monkeypatch.setattr(study, "hits", lambda task, model, prompts, *rest: prompts[:, -1].double().numpy() * 0)
    findings = {f.claim: f for f in study.run("smoke", seed=0)}
    assert all("not learned" in findings[c].reason for c in ("best", "transfer", "topology", "shuffled"))


def test_the_instrument_sees_a_window_that_is_one_hop_short(monkeypatch):
    task = graphs.Community(60, 2, 0.5, 0.2, branch=2)
    assert study._window(task, 0).state == "holds"
    plain = hops.HopWindow.__init__

    def short(self, positions, table, K, bidirectional=True):
        plain(self, positions, table, max(K - 1, 0), bidirectional)

    monkeypatch.setattr(hops.HopWindow, "__init__", short)
    assert study._window(task, 0).state == "does not hold"


def test_arms_start_alike_and_see_what_they_should():
    task = graphs.Community(60, 2, 0.5, 0.2, branch=2)
    prompts = study.draw(task, 200, 0)
    assert torch.equal(prompts, study.draw(task, 200, 0))
    assert not torch.equal(prompts, study.draw(task, 200, 1))
    full, causal = (study.window(task, arm) for arm in (study.FULL, "causal"))
    at = torch.arange(task.prompt)
    seen = full.allows(at[:, None], at[None])
    assert seen[task.positions[:, None], task.positions].all()
    text = torch.ones(task.prompt, dtype=torch.bool)
    text[task.positions] = False
    assert torch.equal(seen[text], causal.allows(at[:, None], at[None])[text])
    before = [study.train(task, arm, 1, 2, 3, "cpu").embed.weight.detach() for arm in ("1 both", "causal")]
    assert before[0].shape == before[1].shape


def test_topology_is_one_where_weights_follow_hops(monkeypatch):
    """A model whose rotated q and k make the weight of a pair fall with its hops."""
    task = graphs.Community(60, 2, 0.5, 0.2, branch=2)
    prompts = study.draw(task, 200, 0)
    scores = torch.zeros(task.prompt, task.prompt)
    scores[task.positions[:, None], task.positions] = -task.hops.float()
    length = task.prompt

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.Module()
            self.attention.position = torch.nn.Module()
            k = torch.eye(length)[None, None]
            self.attention.position.last = (scores[None, None] * length**0.5, k)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [Block()]

        def forward(self, ids):
            return ids

    finding = study._topology(task, [Model()], prompts, "cpu")
    assert finding.state == "does not hold"
    assert finding.figure > 0.9
