"""Writing pages: from an atlas alone, from a model, their size, their policy, what is refused."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import regard
from regard.report.build import build_report, report
from regard.report.windows import Closeup, Window
from regard.watch.atlas import Atlas, AtlasError

from .models import Pieces, ids, llama


def element(page: str, id_: str) -> str:
    return re.search(rf'id="{id_}">(.*?)</script>', page, re.S)[1]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    model = llama()
    with regard.watch(model, tokenizer=Pieces()) as w, torch.no_grad():
        model(input_ids=ids(40))
    return w.atlas


def test_a_page_from_an_atlas_alone(atlas, tmp_path):
    made = regard.report(atlas, tmp_path / "a.html", title="An <em>atlas</em>")
    page = made.path.read_text(encoding="utf-8")
    assert made.size == len(page.encode())
    assert "<h1>An &lt;em&gt;atlas&lt;/em&gt;</h1>" in page
    header = json.loads(element(page, "regard-header"))
    assert [m["size"] for m in header["maps"]] == [32]
    assert header["windows"] == []
    np.testing.assert_allclose(
        next(m for m in header["measures"] if m["name"] == "entropy")["values"],
        atlas.measure("entropy").values,
        rtol=1e-3,
    )
    assert header["roleOf"] == [[r.replace(" ", "-") for r in row] for row in atlas.roles().names.values]


def test_the_policy_allows_the_page_s_own_script_and_nothing_else(atlas, tmp_path):
    page = report(atlas, tmp_path / "a.html").path.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|@import|url\(", page)
    assert "unsafe" not in policy


def test_the_same_atlas_gives_the_same_page(atlas, tmp_path):
    a, b = (report(atlas, tmp_path / name).path.read_bytes() for name in ("a.html", "b.html"))
    assert a == b


def test_twelve_by_twelve_heads_at_4096_tokens_stay_below_5_mb(tmp_path):
    """With maps of noise, which no packing makes smaller: real ones and random models take less."""
    model = llama(layers=12, heads=12, kv_heads=12)
    with regard.watch(model, tokenizer=Pieces()) as w, torch.no_grad():
        model(input_ids=ids(4096)[:, :64])
    generator = torch.Generator().manual_seed(0)
    closeups = {}
    window = Window((4096 - 128, 4096), (4096 - 128, 4096))
    for name in w.atlas["layer"].values:
        maps = [torch.rand(12, 128, 128, generator=generator).pow(4).tril() for _ in range(2)]
        top = torch.rand(12, 128, 8, generator=generator), torch.randint(0, 4096, (12, 128, 8), generator=generator)
        closeups[name] = Closeup("self", True, 4096, 4096, [(window, maps[0])], [top], blocks=maps[1])
    long = w.atlas.copy()
    assert report(long, tmp_path / "big.html", windows=closeups).size < 5_000_000


def test_the_window_chosen_is_all_of_a_short_text_and_the_end_of_a_long_one(tmp_path):
    short = build_report(llama(), Pieces(), inputs={"input_ids": ids(50)}, out=tmp_path / "s.html")
    long = build_report(llama(), Pieces(), inputs={"input_ids": ids(400)}, out=tmp_path / "l.html")
    for made, expected, covers in ((short, [0, 50], True), (long, [144, 400], False)):
        header = json.loads(element(made.path.read_text(encoding="utf-8"), "regard-header"))
        (window,) = header["windows"]
        assert [layer["rows"] for layer in window["layers"]] == [expected] * 2
        assert all(layer["covers"] is covers for layer in window["layers"])


def test_roles_can_be_judged_on_a_probe(tmp_path):
    model = llama()
    repeated = torch.cat([ids(30), ids(30)], 1)
    with regard.watch(model) as w, torch.no_grad():
        model(input_ids=repeated)
    made = build_report(
        model, Pieces(), inputs={"input_ids": ids(50)}, out=tmp_path / "a.html", probes={"induction": w.atlas}
    )
    own, probe = made.atlas.roles().scores, w.atlas.roles().scores
    for score in ("induction", "induction/lift"):
        np.testing.assert_array_equal(made.roles.scores.sel(role=score), probe.sel(role=score))
    np.testing.assert_array_equal(made.roles.scores.sel(role="sink"), own.sel(role="sink"))
    assert "Judged on tasks" in made.path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="probes: no role 'sinks'"):
        build_report(model, inputs={"input_ids": ids(9)}, out=tmp_path / "a.html", probes={"sinks": w.atlas})


def test_an_encoder_decoder_has_two_token_axes(tmp_path):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    made = build_report(
        model, Pieces(), inputs={"input_ids": ids(40), "decoder_input_ids": ids(23)}, out=tmp_path / "a.html"
    )
    header = json.loads(element(made.path.read_text(encoding="utf-8"), "regard-header"))
    assert [len(axis) for axis in header["axes"]] == [40, 23]
    assert [(layer["kind"], layer["q_axis"], layer["k_axis"]) for layer in header["layers"]] == [
        ("self", 0, 0),
        ("self", 1, 1),
        ("cross", 1, 0),
    ]
    assert [layer["keys"] for layer in header["windows"][0]["layers"]] == [[0, 40], [0, 23], [0, 40]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of text, image, inputs; got none"),
        ({"text": "a", "inputs": {}}, "got text, inputs"),
        ({"inputs": {"input_ids": torch.zeros(3, 5, dtype=torch.long)}}, "a batch of 3"),
        ({"inputs": {"input_ids": ids(30)}, "windows": [(10, 40)]}, "ends past the 30 tokens"),
        ({"inputs": {"input_ids": ids(300)}, "windows": [(0, 300)]}, "at most 256 x 256"),
        ({"image": 3}, "image must be a path or a PIL image, got int"),
    ],
)
def test_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_report(llama(), Pieces(), out=tmp_path / "a.html", **options)
    assert not (tmp_path / "a.html").exists()


def test_an_empty_atlas_is_refused(tmp_path):
    with pytest.raises(AtlasError):
        report(Atlas(), tmp_path / "a.html")


def test_a_model_in_training_is_put_back(tmp_path):
    model = llama().train()
    build_report(model, Pieces(), inputs={"input_ids": ids(20)}, out=tmp_path / "a.html")
    assert all(m.training for m in model.modules())
