import numpy as np
import pytest
import torch
import xarray as xr

from regard.tasks.heads import overlap, scan_heads
from regard.tasks.testbeds import load
from regard.watch.effects import loss
from regard.watch.intervene import intervene, mask_heads


def test_each_head_is_taken_out_on_its_own():
    loaded = load("testbed:decoder")
    steps = []
    found = scan_heads(
        loaded, "repeated", prompts=2, length=40, kind="uniform", chunk=3, progress=lambda *x: steps.append(x)
    )
    assert steps == [(1, 1)]
    config = loaded.model.config
    assert found.sizes == {"layer": config.num_hidden_layers, "head": config.num_attention_heads, "sample": 2}
    from regard.tasks.probes import repeated_for

    batch = repeated_for(loaded, 40).batch(2, torch.Generator().manual_seed(0))
    metric = loss(batch.labels)
    with torch.no_grad():
        plain = metric(loaded.model(input_ids=batch.input_ids).logits)
        np.testing.assert_allclose(found.plain, plain, rtol=1e-5)
        for layer, head in ((0, 4), (1, 2)):
            with intervene(loaded.model, mask_heads([(layer, head)], "uniform")):
                without = metric(loaded.model(input_ids=batch.input_ids).logits)
            np.testing.assert_allclose(found[layer, head], without - plain, atol=1e-4)


def test_needles_need_the_heads_that_look_one_back():
    found = scan_heads(load("testbed:decoder"), "needle", prompts=4).mean("sample")
    assert divmod(int(found.values.argmax()), found.sizes["head"])[0] == 0
    assert float(found.max()) > 1


def scan(values, kind="zero"):
    return xr.DataArray(np.array(values)[..., None], dims=("layer", "head", "sample"), attrs={"kind": kind})


def test_overlap_counts_the_most_needed_heads_and_knows_chance():
    a = scan([[5.0, 4, 0, 0, 0], [0, 0, 0, 0, np.nan]])
    b = scan([[5.0, 0, 0, 0, 0], [4, 0, 0, 0, np.nan]])
    found = overlap(a, b, share=2 / 9)
    assert found["heads"] == [[(0, 0), (0, 1)], [(0, 0), (1, 0)]]
    assert found["shared"] == [(0, 0)]
    assert found["overlap"] == 0.5
    assert found["chance"] == pytest.approx(2 / 9, abs=0.02)  # expected share of two random pairs among nine
    assert found["chance_99"] == 0.5 or found["chance_99"] == 1.0
    with pytest.raises(ValueError, match="different ways"):
        overlap(a, scan(b.values[..., 0], "uniform"))
    with pytest.raises(ValueError, match="same model"):
        overlap(a, b[:1])


def test_what_cannot_be_scanned_is_refused():
    loaded = load("testbed:decoder")
    with pytest.raises(ValueError, match="task must be one of needle, repeated, got 'sums'"):
        scan_heads(loaded, "sums")
