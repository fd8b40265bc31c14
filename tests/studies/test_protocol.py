import json
import sys
import types

import pytest

from regard.studies import papers, protocol
from regard.studies.protocol import Claim, Finding

CLAIM = Claim("a", "text", "mechanism", ours="a figure", holds_if="above 1")
WAITING = Claim("b", "text", "replication", ours="a figure", holds_if="above 1", waits="needs a cluster")


@pytest.fixture
def toy(monkeypatch):
    """A study named like an open paper, present for the time of a test."""
    module = types.ModuleType("regard.studies.paro")
    module.PAPER, module.CLAIMS = "paro", [CLAIM, WAITING]
    module.run = lambda size, device, seed, model: [Finding("a", "holds", 2.0 + seed, (1.0, 3.0), reason=size)]
    monkeypatch.setitem(sys.modules, "regard.studies.paro", module)
    names = protocol.names()
    monkeypatch.setattr(protocol, "names", lambda: [*names, "paro"])
    return module


def test_every_study_keeps_the_protocol():
    assert {"preplan-anchor", "retrieval-heads", "secondary-sinks"} <= set(protocol.names())
    catalogue = {p["slug"] for p in papers.papers(())}
    for name in protocol.names():
        study = protocol.get(name)
        assert name == study.PAPER
        assert name in catalogue
        assert callable(study.run)
        assert len({c.id for c in study.CLAIMS}) == len(study.CLAIMS) >= 2
        assert any(c.kind == "instrument" for c in study.CLAIMS)


def test_a_finding_needs_a_figure_or_a_reason():
    with pytest.raises(ValueError, match="without a reason"):
        Finding("a", "not measured")
    with pytest.raises(ValueError, match="without a figure"):
        Finding("a", "holds")
    with pytest.raises(ValueError, match="without a figure"):
        Finding("a", "does not hold", float("nan"))
    with pytest.raises(ValueError, match="state must be one of"):
        Finding("a", "maybe", 1.0)


def test_unknown_studies_and_sizes_are_refused_by_name():
    with pytest.raises(KeyError, match=r"no study named 'nope'.*retrieval-heads"):
        protocol.study("nope")
    with pytest.raises(ValueError, match="size must be one of"):
        protocol.study("retrieval-heads", size="tiny")


def test_claims_that_wait_are_findings_too(toy):
    first, second = protocol.study("paro")
    assert (first.claim, first.state) == ("a", "holds")
    assert (second.claim, second.state, second.reason) == ("b", "not measured", "needs a cluster")


def test_a_study_that_brings_its_own_model_takes_no_other(toy):
    assert protocol.default_model("paro") == "testbed:decoder"
    toy.MODEL = None
    assert protocol.run_and_record("paro", size="smoke")["model"] is None
    with pytest.raises(ValueError, match=r"brings its own models.*got model='gpt2'"):
        protocol.study("paro", model="gpt2")


def test_a_study_must_judge_exactly_its_claims(toy):
    toy.run = lambda **_: []
    with pytest.raises(ValueError, match="states the claims"):
        protocol.study("paro")


def test_records_replace_their_own_kind_and_carry_provenance(toy, tmp_path):
    for seed in (0, 1, 0):
        record = protocol.run_and_record("paro", size="smoke", seed=seed)
        path = protocol.keep(record, tmp_path)
    records = json.loads(path.read_text())
    assert [r["seed"] for r in records] == [0, 1]
    assert records[0]["model"] == "testbed:decoder"
    assert {"versions", "machine", "date", "command", "seconds"} <= records[0]["provenance"].keys()


def test_status_follows_from_the_findings(toy, tmp_path):
    def row():
        return next(p for p in papers.papers((tmp_path,)) if p["slug"] == "paro")

    assert row()["status"] == "open"
    assert row()["findings"] == []
    protocol.keep(protocol.run_and_record("paro", size="smoke"), tmp_path)
    assert row()["status"] == "not measured"
    assert papers.summary(row()["findings"]) == "1 holds, 1 not measured"
    toy.CLAIMS = [CLAIM]
    assert row()["status"] == "holds"
    toy.run = lambda **_: [Finding("a", "does not hold", 0.5)]
    protocol.keep(protocol.run_and_record("paro", size="full"), tmp_path)
    assert row()["status"] == "does not hold"  # full counts above smoke
    assert row()["findings"][0]["run"]["size"] == "full"
    toy.CLAIMS = [CLAIM, Claim("c", "new", "mechanism", ours="", holds_if="")]
    assert row()["status"] == "not measured"  # a claim no run has judged


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([], "open"),
        (["holds", "holds"], "holds"),
        (["holds", "does not hold"], "does not hold"),
        (["holds", "not measured", "does not hold"], "not measured"),
    ],
)
def test_status(states, status):
    assert papers.status(states) == status


def test_the_catalogue_is_whole():
    rows = papers.papers()
    assert len(rows) == 166
    assert len({r["slug"] for r in rows}) == 166
    assert all(r["title"] and r["family"] and r["seeds"] and r["status"] in papers.STATUSES for r in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_shipped_findings_name_claims_that_exist():
    for path in protocol.SHIPPED.glob("*.json"):
        claims = {c.id for c in protocol.get(path.stem).CLAIMS}
        for record in json.loads(path.read_text()):
            assert {f["claim"] for f in record["findings"]} == claims
            assert record["provenance"]["command"].startswith("regard study")
