"""Routing Transformer, shrunk: controls are controls, the instruments see wrong parts, decoders of both rules train."""

import pytest
import torch

from regard.layers.routing import KMeansRoute, RoutingAttention
from regard.patterns import Causal, Window
from regard.studies import protocol
from regard.studies import routing_transformer as study


@pytest.fixture
def small(monkeypatch):
    for name, value in {"LENGTH": 128, "KINDS": 8, "CLUSTERS": 8, "UPDATES": 40, "PROBES": 4, "HEADS": 2}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "SEEDS", {"smoke": 2, "full": 1})
    monkeypatch.setattr(study, "TEXT", {"length": 64, "dim": 16, "heads": 4, "layers": 1, "window": 8, "clusters": 4})
    monkeypatch.setattr(study, "TRAIN", {"rows": 2, "steps": 3, "seeds": 1, "tests": 4})


def test_smoke_judges_both_rules(small):
    record = protocol.run_and_record("routing-transformer", seed=1)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["groups"]["state"] == found["update"]["state"] == "holds"
    mass = found["mass"]
    assert mass["floor"] < mass["baseline"] < mass["figure"] < mass["ceiling"]  # random, local, clusters, oracle
    assert 0 < mass["details"]["queries_in_no_cluster"] < 0.6
    assert found["membership"]["state"] == "does not hold"
    assert found["causal-membership"]["reason"].endswith("0% of changes reach an earlier output")
    assert found["loss"]["state"] == "not measured"
    assert "Wikitext-103" in found["wikitext"]["reason"]


def test_full_trains_every_arm(small):
    found = study._loss([0], "cpu")
    assert set(found.details["by_seed"]) == {"local", "balanced", "nearest", "dense"}
    assert found.state in ("holds", "does not hold")


def test_the_window_is_the_window(small):
    listed, place = study.last_keys(20, 5), torch.arange(20)
    want = (Window(4, 0) & Causal()).allows(place[:, None], place[None])
    assert torch.equal(listed.of().allows(place[:, None], place[None]), want)


def test_text_repeats_far_back_and_nothing_else_changes():
    ids = study.far_repeats(3, 128, torch.Generator().manual_seed(0))
    assert torch.equal(ids, study.far_repeats(3, 128, torch.Generator().manual_seed(0)))
    for row in ids:
        stretches = row.unfold(0, 16, 1)
        same = (stretches[:, None] == stretches[None]).all(-1)
        first, again = same.nonzero().unbind(1)
        assert int((again - first).max()) >= 64


def test_arms_cost_the_same_and_differ_in_attention_alone():
    t, d = study.TEXT, study.TEXT["dim"] // study.TEXT["heads"]
    local, routed = study.decoder("local", 0), study.decoder("nearest", 0)
    layer = routed.blocks[0].attention
    assert isinstance(layer, RoutingAttention)
    route, length = layer.route, t["length"]
    pairs = length * (t["window"] + 1) + length * (length // t["clusters"])  # a local head and a routed one, full rows
    cost = 4 * d * pairs + 2 * route.cost(length, length, d)
    own = local.blocks[0].attention.pattern
    assert 2 * 4 * d * length * (own.left + 1) == pytest.approx(cost, rel=0.01)
    assert local.blocks[0].attention.position.theta == layer.position.theta


def test_the_instruments_see_wrong_parts(small, monkeypatch):
    whole = KMeansRoute.update

    def late(self, q, k):
        whole(self, q, k)
        self.centroids += 1e-6

    monkeypatch.setattr(KMeansRoute, "update", late)
    assert study._update(0).state == "does not hold"
    assert study._groups(0).state == "holds"
    monkeypatch.setattr("regard.kernels.attend.attend", lambda q, k, v, pattern, **how: v)
    assert study._groups(0).state == "does not hold"
