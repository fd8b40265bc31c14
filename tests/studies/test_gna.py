"""Generalized neighborhood attention, shrunk: wrong simulators are seen, tables follow from definitions."""

import pytest

import regard.patterns
from regard.patterns import TileCost
from regard.studies import gna, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gna, "COUNTED", {"smoke": 20, "full": 20})
    monkeypatch.setattr(gna, "TURNS", {"smoke": 2, "full": 2})
    monkeypatch.setattr(gna, "GRID", ((6, 8), (4, 4), (2, 4)))
    monkeypatch.setattr(gna, "TIMED", [(1, 1), (2, 4), (4, 4)])


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("gna", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    for claim in ("simulator", "bounds", "end-to-end", "flux"):
        assert found[claim]["state"] == "holds", found[claim]
    assert found["blocked-row"]["state"] == "does not hold"
    assert found["blocked-row"]["figure"] == pytest.approx(1.55, abs=0.005)
    tiles = found["order"]["details"]["tiles"]
    assert tiles == sorted(tiles, reverse=True)
    assert [c for c, f in found.items() if f["state"] == "not measured"] == ["reached", "quality"]


def test_full_times_the_bound(small):
    findings = {f.claim: f for f in gna.run("full")}
    assert set(findings) == {c.id for c in gna.CLAIMS if not c.waits}
    assert findings["reached"].state == protocol.verdict(findings["reached"].figure >= 0.7)


def test_a_wrong_simulator_is_seen(small, monkeypatch):
    """Spans of tiles counted without their last one."""
    right = regard.patterns.tile_cost

    def wrong(*arguments):
        cost = right(*arguments)
        return TileCost(cost.flop, cost.worst * 1.1, cost.mean, cost.full)

    monkeypatch.setattr(regard.patterns, "tile_cost", wrong)
    findings = {f.claim: f for f in gna.run("smoke")}
    for claim in ("simulator", "bounds", "end-to-end"):
        assert findings[claim].state == "does not hold"


def test_order_follows_the_measured_times(small, monkeypatch):
    """Times that rise while visits fall give a correlation of -1."""
    monkeypatch.setattr(gna, "take_turns", lambda arms, turns, device: {n: [1.0 + i] * 2 for i, n in enumerate(arms)})
    finding = gna._order("smoke", "cpu", 0)
    assert (finding.state, finding.figure) == ("does not hold", -1.0)
