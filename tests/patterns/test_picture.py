"""Pictures: every pair, density and block drawn as it is, in text, SVG and PNG."""

import re
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from matplotlib.image import imread

import regard.patterns as rp
from regard.patterns import Causal, Pattern, Sinks, Window, per_head, per_sample
from regard.patterns.picture import INK, PAPER, PLAIN, TINTS
from regard.patterns.shades import densities
from tests.oracles import layout as oracle
from tests.patterns import catalogue

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def drawn(svg):
    """The rectangles of an SVG panel, ``(x, y, width, height, fill)``."""
    out = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        for x, y, w, h in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-", path.get("d")):
            opacity = float(path.get("fill-opacity", 1))
            out.append((*(float(n) for n in (x, y, w, h)), path.get("fill"), opacity))
    return out


def painted(svg, rows, columns, ink):
    """Which cells a colour covers."""
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    for x, y, w, h, fill, _ in drawn(svg):
        if fill == "#" + "".join(f"{c:02x}" for c in ink):
            cells[round(y) : round(y + h), round(x) : round(x + w)] = True
    return cells


@settings(max_examples=15)
@given(catalogue.cases())
def test_pairs_and_blocks(case):
    pattern, q_len, kv_len, start, block = case
    want = oracle.pairs(pattern, q_len, kv_len, start)
    picture = pattern.show(q_len, kv_len, start)
    assert [[c == "█" for c in line] for line in str(picture).split("\n")] == want.tolist()
    assert torch.equal(painted(picture.svg(), q_len, kv_len, INK), want)
    blocks = pattern.show(q_len, kv_len, start, block)
    listed, full = oracle.blocks(want, block)
    text = [
        "".join("·▒█"[a + b] for a, b in zip(x, y, strict=True)) for x, y in zip(listed.int(), full.int(), strict=True)
    ]
    assert str(blocks) == "\n".join(text)
    assert torch.equal(painted(blocks.svg(), q_len, kv_len, INK), want)
    bq, bk = (block, block) if isinstance(block, int) else block
    spread = (listed & ~full).repeat_interleave(bq, 0).repeat_interleave(bk, 1)[:q_len, :kv_len]
    assert torch.equal(painted(blocks.svg(), q_len, kv_len, TINTS[1]), spread)


def test_text():
    assert str((Window(1) & Causal() | Sinks(1)).show(4)) == "█···\n██··\n███·\n█·██"
    assert repr(Causal().show(2)) == "█·\n██"
    assert str(Causal().show(8, block=4)) == "▒·\n█▒"
    assert str(per_head([Causal(), Sinks(1)]).show(2)) == "head 0\n█·\n██\n\nhead 1\n█·\n█·"
    assert str(per_sample([per_head([Causal()])] * 2).show(1)) == "sample 0, head 0\n█\n\nsample 1, head 0\n█"
    assert str(Causal().show(2, 4)) == "███·\n████"


@pytest.mark.parametrize("n", [300, 500])
def test_densities(n):
    """Cells of a few queries are exact; what a cell surely is, it is."""
    pattern = (Window(70) | Sinks(9)) & Causal()
    side = -(-n // 64)
    count = -(-n // side)
    sums = torch.zeros(count * side, count * side, dtype=torch.double)
    sums[:n, :n] = oracle.pairs(pattern, n, n).double()
    there = torch.zeros_like(sums)
    there[:n, :n] = 1
    cells, sizes = (x.view(count, side, count, side).sum((1, 3)) for x in (sums, there))
    got = torch.from_numpy(densities(pattern, n, n, 0))
    torch.testing.assert_close(got, cells / sizes, atol=1e-9, rtol=0)
    lines = str(pattern.show(n)).split("\n")
    assert len(lines) == len(lines[0]) == count
    assert lines[0][0] in "▓▒"
    assert lines[-1][0] == "█"


def test_long_sequences():
    """A million tokens: estimated from some queries, sure cells exact."""
    n = 1 << 20
    got = densities(Window(3 * n // 64 - 1) | Sinks(n // 64), n, n, 0)
    assert (got[4:, 0] == 1).all()
    for i in range(8, 64):
        assert (got[i, i - 2 : i] == 1).all()
        assert (got[i, 1 : i - 3] == 0).all()
        assert got[i, i] == pytest.approx(0.5, abs=0.02)
        assert got[i, i - 3] == pytest.approx(0.5, abs=0.02)
    assert str(Causal().show(10_000, block=64)).count("\n") == 52  # 157 blocks a side, three together
    assert str(Causal().show(10_000, block=64)).startswith("▒···")


def test_a_pattern_without_rows():
    class Near(Pattern):
        def allows(self, q_idx, kv_idx, head=None, batch=None):
            return (q_idx - kv_idx).abs() < 50

    got = densities(Near(), 640, 640, 0)
    want = oracle.pairs(Near(), 640, 640).double().view(64, 10, 64, 10).mean((1, 3))
    assert torch.allclose(torch.from_numpy(got), want)


def test_files(tmp_path):
    picture = (Window(5) | Sinks(2)).show(40, block=8)
    assert picture.save(tmp_path / "a.svg").read_text() == picture.svg()
    assert picture.save(tmp_path / "a.txt").read_text() == f"{picture}\n"
    image = (torch.from_numpy(imread(picture.save(tmp_path / "a.png")))[..., :3] * 255).round()
    assert image.shape == (320, 320, 3)  # eight pixels a pair
    assert image[4 * 8 + 3, 4 * 8 + 3].tolist() == list(INK)
    assert image[9 * 8 + 3, 30 * 8 + 3].tolist() == list(PAPER)
    assert image[9 * 8 + 3, 3 * 8 + 3].tolist() == list(TINTS[1])
    plain = Causal().show(2048, block=128).save(tmp_path / "b.png")
    assert (imread(plain)[-30, 5, :3] * 255).round().tolist() == list(PLAIN[2])
    html = per_head([Causal(), Window(2)]).show(9)._repr_html_()
    assert html.startswith("<figure><svg")
    assert "&lt;" not in html
    assert "head 1" in html
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .txt, got 'x.gif'"):
        picture.save("x.gif")
    with pytest.raises(ValueError, match="at most 64 heads and samples, this pattern has 65"):
        per_head([Causal()] * 65).show()
    with pytest.raises(ValueError, match="kv_len must be 4"):
        rp.Rings(2, 2).show(5)


def test_captions_are_escaped():
    class Odd(Window):
        def __repr__(self):
            return "<b>&"

    assert "&lt;b&gt;&amp;" in Odd(1).show(4)._repr_html_()
    assert "<b>" not in Odd(1).show(4)._repr_html_()
