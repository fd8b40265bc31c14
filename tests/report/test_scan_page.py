"""The page of a causal scan in a real browser: what it shows, hostile names, keyboard, contrast, themes, widths."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard.report.scan_page import in_words, payload, scan_report

from .models import HOSTILE

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


def record(task, turned=False):
    """Three layers of four heads; layer 2 has two."""
    heads = [(layer, head) for layer in range(3) for head in range(4 if layer < 2 else 2)]
    effects = [4.0, 0.02, -0.5, 0.0, 1.0, 1e-5, -1e-5, 0.3, 0.0, 0.1]
    effects = effects[::-1] if turned else effects
    told = [
        {"layer": layer, "head": head, "increase": x, "interval": [x - 0.1, x + 0.1]}
        for (layer, head), x in zip(heads, effects, strict=True)
    ]
    return {"task": task, "kind": "zero", "prompts": 16, "loss": 0.25, "heads": told}


OVERLAP = {"overlap": 0.5, "chance": 0.2, "chance_99": 0.6, "heads": [[(0, 0), (1, 0)]] * 2, "shared": [(1, 0)]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "scan.html"
    return scan_report([record("needle"), record(HOSTILE[0], True)], path, model=HOSTILE[1], overlap=OVERLAP)


def test_every_head_has_its_square_and_figure(page, opened):
    o = opened(page)
    assert o.page.locator(".heat").count() == 2
    cells = o.page.locator(".heat").first.locator("button.cell")
    assert cells.count() == 10
    assert o.page.locator(".heat").first.locator(".nothing").count() == 2
    assert cells.first.inner_text() == "+4"
    assert o.page.locator('.cell[data-scan="0"].helps').all_inner_texts() == ["−0.5", "−1e-5"]
    shades = o.page.eval_on_selector_all(
        '.cell[data-scan="0"] .square', "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(shades)) == 9  # two heads without effect share theirs
    assert shades[3] == shades[8]
    assert not o.complaints
    assert all(url.startswith("file:") for url in o.requests)


def test_names_stay_text(page, opened):
    o = opened(page)
    assert HOSTILE[0] in o.page.locator("h1").inner_text()
    assert o.page.locator("main img[src=x], header img").count() == 0
    assert o.page.locator(".maps h3").nth(1).inner_text() == f"{HOSTILE[0]}, heads taken out by zero"


def test_the_head_chosen_shows_both_tasks(page, opened):
    o = opened(page)
    assert "Layer 0, head 0" in o.page.locator("#detail").inner_text()  # the most needed one
    o.page.locator('.cell[data-key="1.0"]').first.click()
    detail = o.page.locator("#detail")
    assert detail.locator("tbody tr").first.locator("td").all_inner_texts() == ["+1", "+0.9 to +1.1", "2 of 10"]
    assert "In both circuits" in detail.inner_text()
    assert o.page.locator('.cell[aria-pressed="true"]').count() == 2
    assert o.page.locator(".cell.shared").count() == 2
    assert o.page.locator("#ranking tr.chosen").count() == 2
    assert in_words(OVERLAP, ["needle", HOSTILE[0]]) == o.page.locator(".verdict").inner_text()


def test_the_keyboard_moves(page, opened):
    o = opened(page)
    o.page.locator('.cell[data-scan="0"][data-key="0.0"]').focus()
    o.keys("ArrowRight", "ArrowDown", "Enter")
    assert o.focused() == "1.1"
    assert "Layer 1, head 1" in o.page.locator("#detail").inner_text()
    o.page.locator('.cell[data-scan="1"][tabindex="0"]').focus()
    o.keys("ArrowLeft")
    assert o.page.evaluate("document.activeElement.dataset.scan") == "1"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1500])
def test_it_fits_in_both_themes(opened, page, theme, width):
    o = opened(page, width=width, theme=theme)
    assert o.page.evaluate("document.documentElement.dataset.theme") == theme
    assert o.overflow() <= 0
    assert o.page.evaluate(CONTRAST) == []
    o.page.locator("#theme").click()
    assert o.page.evaluate("document.documentElement.dataset.theme") != theme
    assert not o.complaints


def test_heads_are_ordered_and_nothing_is_refused_in_silence(tmp_path):
    told = payload([record("needle")], None)["scans"][0]
    figures = [h["increase"] for h in told["heads"]]
    assert figures == sorted(figures, reverse=True)
    assert (told["layers"], told["width"], told["most"]) == (3, 4, 4.0)
    flat = record("needle")
    for head in flat["heads"]:
        head["increase"] = 0.0
    assert payload([flat], None)["scans"][0]["most"] == 0
    for wrong in ([], [dict(record("needle"), heads=[])]):
        with pytest.raises(ValueError, match="at least one"):
            scan_report(wrong, tmp_path / "none.html")
