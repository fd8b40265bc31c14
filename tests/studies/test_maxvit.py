import itertools

import pytest

from regard.studies import maxvit, protocol


def seen(n, side, blocks, order):
    """Coordinates of one axis reached from each query, by the predicates, one layer at a time."""
    stride = n // side
    allows = {"plain": lambda q, k: q // side == k // side, "grid": lambda q, k: q % stride == k % stride}
    total = 0
    for query in range(n):
        reached = {query}
        for mode in reversed(order * blocks):
            reached = {k for k in range(n) if any(allows[mode](q, k) for q in reached)}
        total += len(reached)
    return (total / n / n) ** 2


@pytest.mark.parametrize(("n", "side"), [(12, 3), (14, 7)])
def test_coverage_is_that_of_the_predicates(n, side):
    for order, blocks in itertools.product([("plain", "grid"), ("grid", "plain"), ("plain", "plain")], (1, 2)):
        assert maxvit.coverage(n, side, blocks, order) == pytest.approx(seen(n, side, blocks, order), abs=1e-12)


def test_the_published_setting():
    assert maxvit.coverage(56, 7, 1) == pytest.approx(0.765625)
    assert maxvit.coverage(49, 7, 1) == maxvit.coverage(56, 7, 2) == 1.0


def test_smoke_judges_what_is_exact_and_defers_what_is_trained():
    found = {f.claim: f for f in protocol.study("maxvit")}
    assert [found[c].state for c in ("layer", "pair", "stage")] == ["holds", "does not hold", "holds"]
    assert found["stage"].baseline < 0.1  # windows alone
    assert all(found[c].state == "not measured" for c in ("same-mark", "rivals", "imagenet"))


def test_the_full_size_runs_and_windows_alone_are_at_chance(monkeypatch):
    monkeypatch.setattr(maxvit, "STEPS", {"small": 3, "large": 1})
    monkeypatch.setattr(maxvit, "TEST", 600)
    monkeypatch.setattr(maxvit, "SEEDS", 1)
    found = maxvit._same_mark([0], "cpu")
    assert found.state == "does not hold"
    assert abs(found.baseline - 0.5) < 0.07
    monkeypatch.setattr(
        maxvit, "accuracy", lambda arm, *_args: {"window + grid": 0.90, "row + column": 0.906}.get(arm, 0.5)
    )
    rivals = maxvit._rivals([0, 1], "cpu")
    assert rivals.state == "does not hold"
    assert rivals.figure == pytest.approx(-0.6)
    same = set(rivals.details["parameters"].values())
    assert max(same) / min(same) < 1.05
