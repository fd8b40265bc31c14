"""All for one, on small models: what is closed is closed, means keep their token, the search finds what is there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from regard.studies import all_for_one as study
from regard.tasks.arith import Arith3
from regard.tasks.symbolic import SYMBOLIC


@pytest.fixture(scope="module")
def model():
    """Three untrained layers."""
    return replace(SYMBOLIC["arith"], layers=3, dim=32).build(0).eval()


@pytest.fixture(scope="module")
def ids():
    return Arith3("test").batch(6, torch.Generator().manual_seed(0)).input_ids


@pytest.mark.parametrize("at", range(7))
def test_drawn_sums_hold_the_token(at, ids):
    for token in ids[:, at].unique().tolist():
        drawn = study.sums_with(at, token, 40, torch.Generator().manual_seed(1))
        assert drawn.shape == (40, 7)
        assert (drawn[:, at] == token).all()
        others = [p for p in range(1, 6) if p != at]
        assert all(len(drawn[:, p].unique()) > 1 for p in others)


def test_the_last_token_knows_the_operands_only_through_the_layers_that_read(model, ids):
    """Changing an operand changes the logits with a reading layer, and does not where none reads."""
    other = ids.clone()
    other[:, 1] = Arith3().vocabulary["0"] + 5
    for batch, same in ((ids, True), (other, False)):
        mean = study.kept(model, batch, 1, 4, 0)
        read = study.abp(model, mean, 1, 1)
        closed = read[:1] + [replace_pattern(e) for e in read[1:]]
        with torch.no_grad():
            from regard.watch.intervene import intervene

            with intervene(model, read):
                seen = model(input_ids=batch[:, :-1]).logits[:, -1]
            with intervene(model, closed):
                blind = model(input_ids=batch[:, :-1]).logits[:, -1]
        if same:
            first, first_blind = seen, blind
    assert torch.equal(blind, first_blind)  # "=" and the first token are the same everywhere
    assert not torch.allclose(seen, first)


def replace_pattern(edit):
    from regard.patterns import SelfAnd
    from regard.watch.intervene import Edit

    return Edit(edit.site, "pattern", value=SelfAnd())


def test_waiting_for_nothing_and_reading_everywhere_by_all_is_the_model(model, ids):
    mean = study.kept(model, ids, 0, 2, 0)
    embedded = model.get_input_embeddings()(ids[:, :-1])
    torch.testing.assert_close(mean, embedded)
    plain = study.right(model, ids)
    assert (study.right(model, ids, study.abp(model, mean, 0, 3)[:1]) == plain).all()


def test_nothing_is_left_open(model, ids):
    finding = study._closed(model, ids, study.kept(model, ids, 1, 2, 0))
    assert (finding.state, finding.figure) == ("holds", 0.0)
    mass = study.operand_mass(model, ids)
    assert len(mass) == 3
    assert all(0 < m < 6 / 7 for m in mass)


def test_the_search_finds_where_reading_happens(model, ids, monkeypatch):
    monkeypatch.setattr(study, "right", lambda *a: np.zeros(50))
    table = {(w, n): np.full(50, float(w <= 2 and w + n >= 4)) for w in range(5) for n in range(1, 6 - w)}
    finding = study._late(model, ids, table, 60, 0)
    assert finding.state == "holds"
    assert finding.details["chosen"] == [2, 2]
    assert "L_wait 2 of 5 layers and L_transfer 2 keep 0.95" in finding.reason
    early = {key: np.full(50, float(key[0] == 0)) for key in table}  # operands read in layer 0
    finding = study._late(model, ids, early, 60, 0)
    assert finding.state == "does not hold"
    assert "L_wait 0" in finding.reason
    monkeypatch.setattr(study, "right", lambda *a: np.ones(50))  # closing does no harm
    assert study._late(model, ids, table, 60, 0).state == "does not hold"


def test_other_means_are_compared_at_one_layer(model, ids):
    means = {wait: study.kept(model, ids, wait, 2, 0) for wait in range(3)}
    finding = study._alternatives(model, ids, means, 0)
    assert finding.reason.startswith("L_wait 1: CAMA")
    assert finding.state == "does not hold"  # an untrained model is never right


def test_below_the_gate_nothing_is_measured(tmp_path, model):
    model.save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text(
        '{"gates": {"values": {"held_out": 0.5}, "thresholds": {"held_out": 0.95}, "ceilings": {}}}'
    )
    findings = study.run(model=str(tmp_path))
    assert [f.state for f in findings] == ["not measured"] * len(study.CLAIMS)
    assert "held_out 0.5 < 0.95" in findings[0].reason
