"""The atlas: merging is exact, saving is whole or not at all, and nothing of the user's text is shown raw."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.watch import atlas as module
from regard.watch.atlas import Atlas, AtlasError, load_atlas, merge, variable
from regard.watch.recorder import watch

PER_SAMPLE = ("received_raw", "entropy_raw", "rhythm")


def llama(seed: int = 0, layers: int = 1) -> tr.LlamaForCausalLM:
    torch.manual_seed(seed)
    return tr.LlamaForCausalLM(
        tr.LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


MODEL = llama()


def run(*texts: torch.Tensor, model=MODEL, **choices) -> Atlas:
    with torch.no_grad(), watch(model, **choices) as w:
        for text in texts:
            model(text[None], use_cache=False)
    return w.atlas


def some(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 16, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator)
        for _ in range(n)
    ]


def close(a: Atlas, b: Atlas) -> None:
    assert set(a.data_vars) == set(b.data_vars)
    for name in a.data_vars:
        x, y = a[name].values, b[name].values
        if x.dtype.kind == "f":
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12, err_msg=str(name))
        else:
            assert (x == y).all(), name


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 5), min_size=0, max_size=4, unique=True), seed=st.integers(0, 3))
def test_any_partition_of_the_samples_gives_the_same_atlas(cuts, seed):
    texts = some(6, seed)
    whole = run(*texts, per_sample=PER_SAMPLE)
    edges = [0, *sorted(cuts), 6]
    parts = [run(*texts[a:b], per_sample=PER_SAMPLE) for a, b in itertools.pairwise(edges)]
    for p, a in zip(parts, edges, strict=False):
        p["sample"] = np.array([str(a + n) for n in range(p.sizes["sample"])], dtype=object)
    close(merge(parts), whole)
    close(sum(parts), whole)
    assert merge(parts)["sample"].values.tolist() == whole["sample"].values.tolist()


def test_counts_are_exact_and_addition_associates():
    a, b, c = (run(t) for t in some(3))
    left, right = (a + b) + c, a + (b + c)
    for name in ("rows", "near_rows", "group_keys", "received_keys", "relation_rows", "top1_offset"):
        assert (left[name].values == right[name].values).all()
    assert isinstance(left, Atlas)
    assert isinstance(left.isel(layer=0), Atlas)
    assert len(left.provenance) >= 1


def test_max_and_a_wider_range_of_offsets():
    def make(top, offsets):
        data = {
            "near": variable("near", np.ones((1, 1, len(offsets)))),
            "peak": (("layer",), np.array([top]), {"merge": "max"}),
        }
        return Atlas(data, {"layer": np.array(["a"], dtype=object), "offset": offsets})

    both = make(2.0, [0, 1]) + make(1.0, [-1, 0, 1])
    assert both["peak"].item() == 2
    assert both["near"].values.ravel().tolist() == [1, 2, 2]
    assert both["offset"].values.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: run(*some(1), model=llama(1)), "fingerprint differs"),
        (lambda: run(*some(1), widths=(1, 2)), "statistics differs: widths"),
        (lambda: run(*some(1), statistics="light"), "statistics differs: statistics"),
        (lambda: run(*some(1), layers=["nothing*", "*self_attn"]), "layers"),
        (lambda: run(*some(1)).assign_coords(layer=np.array(["x"], dtype=object)), "layer differs"),
        (lambda: run(*some(1)).drop_vars("blocks"), "only one of them holds blocks"),
    ],
)
def test_runs_of_another_kind_do_not_merge(other, message):
    with pytest.raises(AtlasError, match=message):
        run(*some(1)) + other()
    with pytest.raises(TypeError):
        run(*some(1)) + 1


@pytest.mark.parametrize("name", ["a.zarr", "a.zip"])
def test_saved_and_loaded_is_identical(tmp_path, name):
    a = run(*some(2), per_sample=PER_SAMPLE, stream=True)
    a["tokens"] = variable("tokens", np.full(a["token_ids"].shape, "<b>é\x00\u2028", dtype=object))
    assert a.save(tmp_path / name) == tmp_path / name
    b = Atlas.load(tmp_path / name)
    assert isinstance(b, Atlas)
    assert b.identical(a)
    assert load_atlas(tmp_path / name).identical(a)
    close(a + b, b + a)
    a.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == [name]  # nothing is left behind
    assert not any(p.suffix in (".pkl", ".pickle") for p in Path(tmp_path).rglob("*"))


def test_computing_still_works_as_in_xarray():
    a = run(*some(1))
    assert a.compute().identical(a)
    assert a.load().identical(a)


KILL = """
    import os, sys
    sys.path.insert(0, {root!r})
    from tests.watch.test_atlas import run, some
    from regard.watch import atlas as module
    rename, renamed = module.Path.rename, []
    def die_between(self, to):
        if renamed:
            os._exit(9)
        renamed.append(self)
        return rename(self, to)
    if {at!r} == "writing":
        module._flush = lambda folder: os._exit(9)
    else:
        module.Path.rename = die_between
    run(*some(2, seed=9)).save(sys.argv[1])
"""


@pytest.mark.parametrize("at", ["writing", "moving"])
def test_killed_while_saving_the_old_atlas_is_still_whole(tmp_path, at):
    old = run(*some(1))
    old.save(tmp_path / "a")
    script = tmp_path / "kill.py"
    script.write_text(textwrap.dedent(KILL.format(root=str(Path(__file__).parents[2]), at=at)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "a")], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 9
    assert (tmp_path / "a").exists() == (at == "writing")  # between the two moves only the old one's copy is there
    assert Atlas.load(tmp_path / "a").identical(old)
    run(*some(2)).save(tmp_path / "a")  # and the place can be used again
    assert Atlas.load(tmp_path / "a").sizes["sample"] == 2


def test_what_is_not_an_atlas_is_neither_read_nor_replaced(tmp_path):
    with pytest.raises(FileNotFoundError, match="no atlas at"):
        Atlas.load(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.zip").write_text("mine")
    for name in ("folder", "file.zip"):
        with pytest.raises(AtlasError, match=r"not an atlas|not a zipped atlas"):
            Atlas.load(tmp_path / name)
        with pytest.raises(AtlasError, match="give another path"):
            run(*some(1)).save(tmp_path / name)
    assert (tmp_path / "file.zip").read_text() == "mine"
    xr.Dataset({"x": 1}).to_zarr(tmp_path / "other", consolidated=False)
    with pytest.raises(AtlasError, match="not an atlas"):
        Atlas.load(tmp_path / "other")
    newer = run(*some(1))
    newer.attrs["format"] = module.FORMAT + 1
    newer.save(tmp_path / "newer")
    with pytest.raises(AtlasError, match="reads up to"):
        Atlas.load(tmp_path / "newer")


def test_what_is_missing_says_how_to_ask_for_it():
    a = run(*some(1), statistics="light")
    for name, how in (
        ("near", "'default'"),
        ("sq", "'full'"),
        ("received_raw", "per_sample"),
        ("bos_cos", "stream=True"),
    ):
        with pytest.raises(AtlasError, match=how):
            a.need(name)


def test_representations_escape_the_users_text():
    a = run(*some(1))
    a.attrs["model"] = "<script>alert(1)</script>"
    page = a._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "1 layers x 2 heads" in repr(a)
