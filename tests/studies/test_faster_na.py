"""Faster neighborhood attention, shrunk: the oracle is written apart, wrong patterns and slow tiles do not pass."""

import pytest
import torch

from regard.patterns import Neighborhood
from regard.studies import faster_na, protocol
from regard.studies.timing import peak_bytes, ratio, take_turns
from tests.oracles.grids import neighborhood_keys


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(faster_na, "SHAPE", (16, 16))
    monkeypatch.setattr(faster_na, "WINDOW", 5)
    monkeypatch.setattr(faster_na, "GROWTH", (3, 7))
    monkeypatch.setattr(faster_na, "TURNS", {"smoke": 3, "full": 3})
    monkeypatch.setattr(faster_na, "SAMPLES", [((6, 7), (3, 4), (2, 1)), ((15,), 4, 1, 2)])
    monkeypatch.setattr(faster_na, "SWEEP", [((8, 8), 3), ((64,), 9), ((8, 8), 7)])


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("faster-na", seed=1)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["equal"]["state"] == "holds"
    assert found["memory"]["figure"] > 0
    assert found["constant"]["baseline"] > 3  # the gather's memory grows with the window
    assert [c for c, f in found.items() if f["state"] == "not measured"] == ["dense", "gpu"]
    assert set(found["faster"]["details"]["seconds"]) == {"gather", "tiles", "dense", "masked"}


def test_full_sweeps_windows(small):
    findings = {f.claim: f for f in faster_na.run("full")}
    assert set(findings) == {c.id for c in faster_na.CLAIMS}
    dense = findings["dense"]
    assert dense.state == protocol.verdict(dense.figure > 1)
    by_density = [(row[2], row[3]) for row in dense.details["sweep"]]
    assert dense.figure == min(r for density, r in by_density if density <= faster_na.DENSITY)
    assert len(by_density) == 3
    assert findings["gpu"].state == "not measured"


def test_the_gather_has_the_keys_of_the_definition():
    for sample in faster_na.SAMPLES[:4]:
        grid = Neighborhood(*sample)
        index, there = faster_na.keys_of(grid)
        there = torch.ones_like(index, dtype=torch.bool) if there is None else there
        if len(grid.shape) == 1:
            of = grid.shape[0], grid.window[0], grid.stride[0], grid.dilation[0], grid.causal[0]
            for q, (keys, real) in enumerate(zip(index, there, strict=True)):
                assert set(keys[real].tolist()) == neighborhood_keys(q, *of)
        i = torch.arange(len(index))
        mask = torch.zeros(len(index), len(index), dtype=torch.bool)
        mask[i[:, None].expand_as(index)[there], index[there]] = True
        assert torch.equal(grid.allows(i[:, None], i[None]), mask)


def test_a_wrong_window_is_seen(small, monkeypatch):
    """The trap of even windows: the extra key on the right."""
    right = faster_na.keys_of

    def wrong(grid):
        index, there = right(grid)
        return index.flip(0), there

    monkeypatch.setattr(faster_na, "keys_of", wrong)
    assert faster_na._equal("cpu", 0).state == "does not hold"


def test_slow_tiles_do_not_pass(small, monkeypatch):
    monkeypatch.setattr(faster_na, "_tiles", lambda q, k, v, grid: [faster_na._slow(q, k, v) for _ in range(9)])
    monkeypatch.setattr(faster_na, "_slow", lambda q, k, v: faster_na.gather_attention(q, k, v, INDEX), raising=False)
    assert faster_na._faster("smoke", "cpu", 0).state == "does not hold"
    assert faster_na._memory("cpu", 0).state == "does not hold"


INDEX = faster_na.keys_of(Neighborhood((16, 16), 5))[0]


def test_turns_ratios_and_peaks():
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3  # one turn of warming up
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}
    figure, (low, high) = ratio([2.0, 8.0, 3.0], [1.0, 2.0, 1.0])
    assert (figure, low, high) == (3.0, 2.0, 4.0)

    def three():
        a = torch.ones(1000, dtype=torch.float32)
        b = a + 1
        del a
        return (b + 1).view(10, 100)

    assert peak_bytes(three) == 8000
    kept = torch.ones(1000)
    assert peak_bytes(lambda: kept.view(10, 100)) == 0
