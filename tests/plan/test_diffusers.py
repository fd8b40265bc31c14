"""Video transformers of diffusers, tiny and untrained: watched, attended with, planned, reordered."""

import numpy as np
import pytest
import torch

import regard
from regard.patterns import Columns, Diagonals, Full, Queries, Window, per_head
from regard.plan import block_plan, shape_plan
from regard.plan.controls import operations_ratio
from regard.plan.plan import PlanError, load_plan

TEXT, GRID = 6, (3, 4, 4)
LENGTH = 48


def wan():
    """Self-attention over the video, cross-attention to the text; rotary positions in float64."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 3, 8, 8), **prompt()}


def cogvideo():
    """Text and video in one sequence, text first."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=2, max_text_seq_length=TEXT,
    ).eval()  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 3, 4, 8, 8), **prompt()}


def prompt():
    return {"timestep": torch.tensor([3, 500]), "encoder_hidden_states": torch.randn(2, TEXT, 16)}


MODELS = {"wan": (wan, 0, "blocks.{}.attn1"), "cogvideo": (cogvideo, TEXT, "transformer_blocks.{}.attn1")}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request):
    """(model, its arguments, tokens of text before the video, names of its self-attention layers)."""
    make, prefix, name = MODELS[request.param]
    return *make(), prefix, [name.format(n) for n in range(2)]


@torch.no_grad()
def run(model, given):
    return model(**given, return_dict=False)[0]


def test_watched(case):
    model, given, prefix, layers = case
    before = run(model, given)
    with regard.watch(model) as w:
        assert torch.equal(run(model, given), before)
    atlas = w.atlas
    kinds = dict(zip(atlas["layer"].values.tolist(), atlas["kind"].values.tolist(), strict=True))
    assert {name for name, kind in kinds.items() if kind == "self"} == set(layers)
    crossed = set() if prefix else {name[:-1] + "2" for name in layers}  # text in the sequence, or beside it
    assert {name for name, kind in kinds.items() if kind == "cross"} == crossed
    assert float(atlas["rows"].sel(layer=layers[0]).max()) == 2 * (prefix + LENGTH)
    assert w.atlas.roles().names.shape == (len(kinds), 2)


def test_attended_with(case):
    model, given, prefix, layers = case
    before = run(model, given)
    text = ((0, prefix),) if prefix else ()
    bands = Diagonals(16, 2, causal=False) | Columns(text) | Queries(text)
    with regard.attend_with(model, Full()) as whole:
        assert torch.allclose(run(model, given), before, atol=1e-5)
    assert set(whole.used) == set(layers)
    with regard.attend_with(model, {layers[1]: per_head([bands, Full()])}) as one:
        changed = run(model, given)
    assert set(one.used) == {layers[1]}
    assert not torch.allclose(changed, before, atol=1e-5)
    # the same by a mask in the model's own attention
    i = torch.arange(prefix + LENGTH)
    mask = torch.stack([bands.allows(i[:, None], i), torch.ones(len(i), len(i), dtype=torch.bool)])[None]
    with masked(model, layers[1], mask):
        assert torch.allclose(run(model, given), changed, atol=1e-5)


def masked(model, layer, mask):
    """The seam answering one layer by SDPA under a mask written out."""
    from regard.watch.seam import Seam

    return Seam(model, lambda call: call.run(mask=mask) if call.layer == layer else None, edits=True)


def test_planned_by_shapes(case, tmp_path):
    model, given, prefix, layers = case
    found = shape_plan.record_shapes(model, [given], GRID, prefix=prefix)
    assert found.layers == layers
    assert found.projected
    plan = shape_plan.planned(model, found, shape_plan.plan_shapes(found, 0.6, eps=10))
    assert operations_ratio(plan) >= 1 / 0.6
    before = run(model, given)
    with plan.applied(model) as applied:
        changed = run(model, given)
    assert applied.used == dict.fromkeys(layers, 1)
    assert not torch.allclose(changed, before)
    plan.save(tmp_path / "plan.json")
    with load_plan(tmp_path / "plan.json").applied(model):
        assert torch.equal(run(model, given), changed)
    whole = shape_plan.planned(model, found, np.zeros(found.errors.shape[:2], dtype=int))
    with whole.applied(model):
        assert torch.allclose(run(model, given), before, atol=1e-6)
    other = (cogvideo if model.__class__.__name__.startswith("Wan") else wan)()[0]
    with pytest.raises(PlanError, match="made on another model"):
        plan.applied(other)


def test_planned_by_what_heads_attend_to(case):
    model, given, _, layers = case
    plan = regard.plan(model, [given], loss=0.5, patterns=(Window(8, 8),))
    assert set(plan.layers) == set(layers)
    assert plan.calibration["unit"] == "squared relative error of the output"
    assert max(plan.calibration["harm"].values()) <= 0.5
    with plan.applied(model) as applied:
        assert bool(run(model, given).isfinite().all())
    assert set(applied.used) == set(layers)


def test_reordered(case):
    model, given, prefix, layers = case
    orders = block_plan.record_orders(model, [given], GRID, 8, prefix=prefix)
    assert list(orders) == layers
    maps = block_plan.record_maps(model, [given], orders, 8, prefix=prefix)
    before = run(model, given)
    for density, same in ((0.3, False), (1.0, True)):
        routes = block_plan.routes_of(maps, orders, density, 8, prefix=prefix)
        with block_plan.StepRoutes(model, [routes], 1):
            assert torch.allclose(run(model, given), before, atol=1e-5) == same
