"""The figures for papers: what is drawn is what the atlas holds, with labels and units."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import regard

from .models import ids, llama


@pytest.fixture(scope="module")
def atlas():
    model = llama(layers=3)
    with regard.watch(model) as w, torch.no_grad():
        model(input_ids=ids(90))
    return w.atlas


def saved(ax) -> None:
    out = io.BytesIO()
    ax.figure.savefig(out, format="pdf")
    assert out.getbuffer().nbytes > 2000


def test_heads_draws_any_measure_of_a_head(atlas):
    ax = atlas.plot.heads(measure="mean_distance")
    np.testing.assert_array_equal(ax.images[0].get_array(), atlas.measure("mean_distance").values)
    assert ax.get_xlabel() == "head"
    assert ax.get_ylabel() == "layer"
    assert "(tokens)" in ax.images[0].colorbar.ax.get_ylabel()
    saved(ax)
    with pytest.raises(ValueError, match=r"'window_mass' is \[layer, head, width\]"):
        atlas.plot.heads(measure="window_mass")


def test_roles_carry_their_codes(atlas):
    from regard.report.taxonomy import LOOKS

    ax = atlas.plot.roles()
    names = atlas.roles().names.values
    assert sorted(t.get_text() for t in ax.texts) == sorted(LOOKS[r].code for r in names.ravel())
    saved(ax)


@pytest.mark.parametrize(("name", "measure"), [("sinks", "sink"), ("distance", "mean_distance")])
def test_every_head_is_a_dot(atlas, name, measure):
    ax = getattr(atlas.plot, name)()
    drawn = sorted(float(y) for c in ax.collections for _, y in c.get_offsets())
    np.testing.assert_allclose(drawn, sorted(atlas.measure(measure).values.ravel()))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), atlas.measure(measure).mean("head"))
    saved(ax)


def test_role_counts_stack_to_the_heads(atlas):
    ax = atlas.plot.role_counts()
    tops = {}
    for bar in ax.patches:
        at = round(bar.get_x() + bar.get_width() / 2)
        tops[at] = max(tops.get(at, 0), bar.get_y() + bar.get_height())
    assert tops == {0: 4, 1: 4, 2: 4}


def test_one_head(atlas):
    name = atlas["layer"].values[1]
    profile = atlas.measure("offset_profile").values[1, 2]
    ax = atlas.plot.offsets(name, 2)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), profile[np.isfinite(profile)])
    saved(ax)
    ax = atlas.plot.entropy(1, 2)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), atlas.measure("entropy_at").values[1, 2])
    assert "(nats)" in ax.get_ylabel()
    ax = atlas.plot.map(1, 2)
    share = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(np.nansum(share, -1), 1, rtol=1e-5)
    saved(ax)


def test_a_figure_of_one_s_own(atlas):
    axes = Figure().subplots(1, 2)
    assert atlas.plot.sinks(ax=axes[0]) is axes[0]
    assert atlas.plot.map(0, 0, ax=axes[1]) is axes[1]


@pytest.mark.parametrize(
    ("layer", "head", "message"), [(7, 0, "layer must be 0 .. 2"), ("no", 0, "got 'no'"), (0, 4, "head must be 0 .. 3")]
)
def test_a_head_that_is_not_there(atlas, layer, head, message):
    with pytest.raises(ValueError, match=message):
        atlas.plot.offsets(layer, head)
