"""Curvature cuts, shrunk: controls are of equal size, choice and figures on other halves, every verdict."""

import numpy as np
import pytest

from regard.studies import loss_curvature as study
from regard.studies import protocol
from regard.tasks import recital


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("recital")
    recital.build(recital.SIZES["smoke"], 0).save_pretrained(out)
    return str(out)


@pytest.fixture
def small(monkeypatch):
    for name, value in {"CLEAN_BYTES": 2000, "TEXT_ROWS": 8, "RHOS": (0.6, 0.9), "DRAWS": 2}.items():
        monkeypatch.setattr(study, name, value)


def test_an_untrained_model_recites_nothing_to_begin_with(small, folder, tmp_path):
    record = protocol.run_and_record("loss-curvature", seed=1, model=folder)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["mask"]["state"] == "holds"
    assert found["forgets"]["baseline"] == 0
    assert found["forgets"]["state"] == found["controls"]["state"] == "does not hold"
    assert [row["rho"] for row in found["forgets"]["details"]["curvature"]] == [0.6, 0.9]
    assert [row["kept"] for row in found["forgets"]["details"]["svd"][2:]] == list(study.MILDER)
    assert all(found[c]["state"] == "not measured" for c in ("more-strings", "open-book", "arithmetic"))


class Plain:
    """An exam of four strings and four rows, all recited at a loss of 1."""

    plain = (np.ones(4), np.ones(4))
    rise = study.Exam.rise


def row(rho, recited, losses):
    return (rho, np.array(recited, float), np.array(losses, float))


def test_choice_is_on_the_first_halves_and_figures_on_the_second():
    # 0.5 forgets more, at too high a loss on the rows that choose; 0.7 is next; what 0.9 does elsewhere is not seen.
    rows = [row(0.5, [0, 0, 0, 0], [2, 1, 2, 1]), row(0.7, [0, 1, 0, 1], [1.05, 1.3, 1.05, 1.3]),
            row(0.9, [1, 0, 1, 0], [1, 1, 1, 1])]  # fmt: skip
    found = study.chosen(rows, Plain())
    assert found["rho"] == 0.7
    assert found["recited"].tolist() == [1, 1]
    assert found["rise"] == pytest.approx(0.3)
    assert [x["recitation"] for x in found["table"]] == [0, 1, 0]
    hopeless = study.chosen(rows[:1], Plain())
    assert not hopeless["found"]
    assert hopeless["rho"] == 0.5


def swept(**methods):
    base = {"rho": 0.7, "kept": 0.4, "rise": 0.05, "found": True, "table": []}
    return {name: base | {"recited": np.array(m[0], float)} | m[1] for name, m in methods.items()}


def test_verdicts():
    good, stays = ([0, 0, 0, 1], {}), ([1, 1, 1, 1], {})
    forgets, controls = study.judge(swept(curvature=good, random=stays, svd=stays), Plain(), 0)
    assert (forgets.state, controls.state) == ("holds", "holds")
    assert (forgets.figure, controls.figure) == (0.25, 1.0)
    # A control that forgets as well takes the second claim away, one that breaks the text does not.
    assert study.judge(swept(curvature=good, random=stays, svd=good), Plain(), 0)[1].state == "does not hold"
    broken = ([0, 0, 0, 0], {"found": False})
    assert study.judge(swept(curvature=good, random=broken, svd=broken), Plain(), 0)[1].state == "holds"
    costly = ([0, 0, 0, 0], {"rise": 0.2})
    assert study.judge(swept(curvature=costly, random=stays, svd=stays), Plain(), 0)[0].state == "does not hold"


def test_elsewhere_without_the_arithmetic_testbed(small, monkeypatch, tmp_path):
    from regard.tasks import testbeds

    monkeypatch.setitem(testbeds.TESTBEDS, "arith", tmp_path)
    monkeypatch.setitem(testbeds.TESTBEDS, "decoder", tmp_path)
    found = study._elsewhere(0.8, "cpu", 0)
    assert [f.state for f in found] == ["not measured"] * 2
    assert "no weights of testbed:arith" in found[1].reason
