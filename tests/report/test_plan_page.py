"""The page of a plan in a real browser: what it shows, hostile names, keyboard, filters, themes, widths."""

from __future__ import annotations

from dataclasses import replace

import pytest

import regard
from regard.patterns import Columns, Window
from regard.plan.measure import measure
from regard.plan.options import Option
from regard.report import plan_page
from regard.report.plan_page import outcome, plan_report

from .models import HOSTILE, ids, llama


@pytest.fixture(scope="module")
def planned():
    """A measured plan of a small model, with a hostile option and one that this length alone has."""
    model = llama(layers=3)
    made = regard.plan(model, [{"input_ids": ids(96, seed)} for seed in (0, 1)], speed=1.5, windows=[8])
    measure(model, made, [{"input_ids": ids(96, 2)}])
    layers = dict(made.layers)
    last = list(layers)[-1]
    layers[last] = (Option(HOSTILE[0], Window(4)), Option("three columns", Columns(((3, 6),))), *layers[last][2:])
    return replace(made, layers=layers)


@pytest.fixture(scope="module")
def page(planned, tmp_path_factory):
    return plan_report(planned, tmp_path_factory.mktemp("plan") / "plan.html", title=HOSTILE[0])


def test_every_head_stands_there_with_what_it_was_given(planned, page, opened):
    o = opened(page)
    cells = o.page.locator("#grid .cell")
    assert cells.count() == 12
    given = [option.name for options in planned.layers.values() for option in options]
    assert o.page.locator("#grid .given").all_text_contents() == given
    assert o.page.locator("h1").inner_text() == f"Plan of {HOSTILE[0]}"
    assert o.page.locator("#legend button").count() == len(planned.options)
    assert not o.complaints
    assert all(url.startswith("file:") for url in o.requests)


def test_the_head_chosen_shows_its_candidates(planned, page, opened):
    o = opened(page)
    record = planned.heads[5]  # layer 1, head 1
    o.page.locator('.cell[data-key="1.1"]').click()
    detail = o.page.locator("#detail")
    assert "Layer 1, head 1" in detail.inner_text()
    assert record["layer"] in detail.inner_text()
    rows = detail.locator("tbody tr")
    assert rows.count() == len(record["candidates"])
    assert detail.locator("tr.chosen th").inner_text() == record["given"]
    assert record["why"][1:] in detail.inner_text()


def test_the_keyboard_moves_and_a_filter_dims(planned, page, opened):
    o = opened(page)
    o.page.locator('.cell[data-key="0.0"]').focus()
    o.keys("ArrowRight", "ArrowDown")
    assert o.focused() == "1.1"
    o.keys("Enter")
    assert o.page.locator('.cell[aria-pressed="true"]').get_attribute("data-key") == "1.1"
    button = o.page.locator("#legend button", has_text="three columns")
    button.click()
    assert o.page.locator(".cell:not(.dim)").count() == 1
    assert "of this length" in o.page.locator("#count").inner_text()
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert o.page.locator(".cell.dim").count() == 0


def test_maps_show_what_is_computed(planned, page, opened):
    header = plan_page.payload(planned)
    by_name = {o["name"]: o for o in header["options"]}
    rows = by_name["three columns"]["map"].split("/")
    assert all(row[1:2] != "0" and set(row[2:]) == {"0"} for row in rows[2:])  # keys 3 to 6, in cells of 3
    dense = by_name["dense"]["map"].split("/")
    assert all(set(row[: max(0, n - 1)]) <= {"2"} and set(row[n + 1 :]) <= {"0"} for n, row in enumerate(dense))
    o = opened(page)
    pixels = o.page.evaluate(
        """() => {
        const c = document.querySelector('.cell[data-key="2.1"] canvas');
        const at = (x, y) => [...c.getContext("2d").getImageData(x, y, 1, 1).data];
        return [c.width, c.height, at(1, 20), at(9, 20)]; }"""
    )
    assert pixels[:2] == [32, 32]
    assert pixels[2] != pixels[3]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1500])
def test_it_fits_in_both_themes(opened, page, theme, width):
    o = opened(page, width=width, theme=theme)
    assert o.page.evaluate("document.documentElement.dataset.theme") == theme
    assert o.overflow() <= 0
    o.page.locator("#theme").click()
    assert o.page.evaluate("document.documentElement.dataset.theme") != theme
    assert not o.complaints


def test_what_is_gained_and_lost_in_words(planned):
    tables = dict(outcome(planned))
    gained, lost = ({row[0]: row for row in tables[name]} for name in ("gained", "lost"))
    measured = planned.measured
    assert gained["Attention, measured"][3] == f"{measured['attention_speedup']:.2f}× faster"
    assert gained["Attention, predicted"][3] == f"{planned.predicted['attention_speedup']:.2f}× faster"
    ratio = measured["perplexity"]["all"]["planned"] / measured["perplexity"]["all"]["dense"]
    assert lost["Perplexity"][3] == f"{100 * (ratio - 1):+.2f} %"
    assert lost["Mass kept, mean over heads"][2] == f"{100 * planned.predicted['kept_mass']:.1f} %"


def test_a_plan_without_records_or_measurements(planned, tmp_path, opened):
    bare = replace(planned, heads=[], predicted={}, calibration={}, measured=None)
    assert outcome(bare) == []
    o = opened(plan_report(bare, tmp_path / "bare.html"))
    assert o.page.locator("#grid .cell").count() == 12
    assert "no record of what else was tried" in o.page.locator("#detail").inner_text()
    assert "Not measured yet" in o.page.locator("#outcome").inner_text()
    assert not o.complaints
