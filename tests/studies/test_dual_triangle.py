"""Dual triangle attention, shrunk: the instrument holds, what is blind to order stays so, every claim is judged."""

import pytest
import torch

from regard.layers.dual_triangle import DualTriangleAttention
from regard.patterns import Causal, per_head
from regard.studies import dual_triangle, protocol


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(dual_triangle.PROBE, "smoke", (6, 8, 1, 16, 2, 150, 1))
    monkeypatch.setitem(dual_triangle.PROBE, "full", (5, 6, 1, 16, 2, 4, 2))
    monkeypatch.setattr(dual_triangle, "BYTES", (16, 32, 1, 16, 2, 4, 4, 2))
    monkeypatch.setattr(dual_triangle, "WARMUP", 2)


def test_smoke(small, tmp_path):
    record = protocol.run_and_record("dual-triangle", seed=2)
    protocol.keep(record, tmp_path)
    found = {f["claim"]: f for f in record["findings"]}
    assert found["halves"]["state"] == "holds"
    assert found["bidirectional"]["state"] == "holds"
    assert found["dual"]["figure"] > found["bidirectional"]["figure"] + 0.2
    assert found["bidirectional"]["baseline"] == found["causal"]["figure"]
    for claim in ("longer", "order"):
        assert found[claim]["state"] == "not measured"
    low, high = found["dual"]["interval"]
    assert low < found["dual"]["figure"] < high


def test_full_judges_every_claim(small):
    findings = {f.claim: f for f in dual_triangle.run("full", seed=0)}
    assert set(findings) == {c.id for c in dual_triangle.CLAIMS}
    assert all(f.state != "not measured" for f in findings.values())
    assert set(findings["dual"].details["by_seed"]) == set(dual_triangle.ARMS["full"])
    assert len(findings["dual"].details["by_seed"]["dual"]) == 2
    losses = findings["longer"].details["losses"]
    assert set(losses) == set(dual_triangle.BYTE_ARMS)
    assert findings["order"].figure == pytest.approx(
        sum(b[0] - d[0] for b, d in zip(losses["bidirectional"], losses["dual"], strict=True)) / 2
    )


def test_the_instrument_sees_halves_that_split_by_head(monkeypatch):
    """The trap: all first halves looking back, then all second halves looking forward, in the interleaved order."""
    plain = DualTriangleAttention.__init__

    def split_by_head(self, dim, heads, rope=None, bias=False):
        plain(self, dim, heads, rope, bias)
        self.pattern = per_head([Causal()] * heads + [Causal(future=True)] * heads)

    monkeypatch.setattr(DualTriangleAttention, "__init__", split_by_head)
    finding = dual_triangle._halves(0)
    assert finding.state == "does not hold"
    assert not finding.reason.startswith("0 forbidden")


def test_arms_have_equal_parameters_and_differ_in_order():
    arms = {a: dual_triangle.build(a, 9, 5, 2, 16, 2, 0) for a in dual_triangle.ARMS["full"]}
    counts = {sum(p.numel() for p in m.parameters()) for m in arms.values()}
    assert len(counts) == 1
    ids = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = {
            a: torch.allclose(dual_triangle.pooled(m, ids), dual_triangle.pooled(m, ids.flip(1)), atol=1e-5)
            for a, m in arms.items()
        }
    assert same == {"bidirectional": True, "dual": False, "causal": False, "bidirectional+rope": False}
