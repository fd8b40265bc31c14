"""The page of measures: whole, what its command makes, and heads whose figures are known."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.measures import gallery
from regard.measures.registry import get, names

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def made():
    return gallery.pages()


def test_the_page_is_what_the_command_makes(made):
    for name, text in made.items():
        kept = (DOCS / name).read_text(encoding="utf-8")
        # figures may differ in their last digit from machine to machine
        assert NUMBER.sub("#", kept) == NUMBER.sub("#", text), f"{name}: run python -m regard.measures.gallery docs"
        numbers = ([float(x) for x in NUMBER.findall(t)] for t in (kept, text))
        np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.2, err_msg=name)
    assert {f"measures/{p.name}" for p in (DOCS / "measures").iterdir()} == set(made) - {"measures.md"}


def test_every_measure_has_a_picture():
    assert set(gallery.PICTURES) == set(names())


def test_heads_that_show_much_of_it_get_more():
    """Each first panel is made to show more than the second, but for shares of pairs, which no weight changes."""
    for name in names():
        shown = gallery.PICTURES[name]
        high, low = (shown.values(get(name), panel) for panel in shown.panels)
        if name == "template_share":
            assert high == low
        elif high.ndim == 0:
            assert high > low, name
        elif name == "window_mass":
            assert np.nanmean(high) > np.nanmean(low)
        elif name == "ring_strength":  # each head looks at one distance
            assert (int(high.argmax()), int(low.argmax())) == (1, 2)
        else:
            assert np.nanmax(high) > np.nanmax(low), name


def test_figures_that_follow_from_the_weights():
    i, j = torch.arange(gallery.LENGTH)[:, None], torch.arange(gallery.LENGTH)[None]
    for name, head in (("previous_token", gallery.previous()), ("self_token", gallery.itself())):
        offset = int(name == "previous_token")
        shown = gallery.PICTURES[name]
        got = shown.values(get(name), shown.panels[0])
        np.testing.assert_allclose(got, head[(i - j == offset)].mean(), rtol=1e-5)
    sink = gallery.PICTURES["sink"]
    np.testing.assert_allclose(sink.values(get("sink"), sink.panels[0]), gallery.first()[1:, 0].mean(), rtol=1e-5)
    even = gallery.PICTURES["entropy"]
    wanted = np.log(np.arange(1, gallery.LENGTH + 1)).mean()
    np.testing.assert_allclose(even.values(get("entropy"), even.panels[0]), wanted, rtol=1e-5)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "pages", lambda: {"measures.md": "# Measures\n", "measures/a.svg": "<svg/>"})
    assert gallery.main([str(tmp_path)]) == 0
    assert (tmp_path / "measures" / "a.svg").read_text() == "<svg/>"
    assert gallery.main([]) == 2
    assert "usage:" in capsys.readouterr().err
