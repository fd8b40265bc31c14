"""What a study says of a testbed below its gate."""

import json

import pytest

from regard.studies.testbed import below_gate
from regard.tasks.testbeds import Loaded


@pytest.fixture
def bed(tmp_path):
    def made(**values):
        gates = {"values": values, "thresholds": {"right": 0.9}, "ceilings": {"excess": 0.05}}
        (tmp_path / "training.json").write_text(json.dumps({"gates": gates}))
        return Loaded(None, None, str(tmp_path))

    return made


def test_both_kinds_of_gate_count(bed):
    assert below_gate(bed(right=0.9, excess=0.05)) == ""
    assert below_gate(bed(right=0.8, excess=0.07)) == "testbed below its gate: right 0.8 < 0.9, excess 0.07 > 0.05"
    assert below_gate(bed(right=0.8, excess=0.07), "excess") == "testbed below its gate: excess 0.07 > 0.05"


def test_a_gate_it_does_not_have_is_an_error(bed):
    with pytest.raises(KeyError, match="no gate 'left'; it has right, excess"):
        below_gate(bed(right=1, excess=0), "left")


def test_a_model_without_a_record_has_no_gates(tmp_path):
    assert below_gate(Loaded(None, None, str(tmp_path))) == ""
