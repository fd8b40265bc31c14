"""The seam on timm, diffusers and hand-written models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.watch.seam import Seam, SeamError
from tests.vision import import_timm
from tests.watch.seam_models import OwnAttention, OwnModel, Spy, same, watched


def x(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- timm


@torch.no_grad()
def test_timm_vit():
    torch.manual_seed(1)
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    spy = watched(model, lambda: model(x(2, 3, 32, 32)))
    assert spy.layers == ["blocks.0.attn", "blocks.1.attn"]
    for call in spy.calls:
        assert call.q.shape == (2, 3, 17, 64)
        assert (call.kind, call.causal, call.folded, call.positions_known) == ("self", False, False, True)
        assert call.valid.all()


@torch.no_grad()
def test_timm_features_without_the_root():
    """`forward_features` runs the parts, not the model: still one forward a run."""
    torch.manual_seed(1)
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    spy = watched(model, lambda: [model.forward_features(x(2, 3, 32, 32)), model.forward_features(x(2, 3, 32, 32))])
    assert [(c.forward, c.layer) for c in spy.calls] == [
        (0, "blocks.0.attn"), (0, "blocks.1.attn"), (1, "blocks.0.attn"), (1, "blocks.1.attn"),
    ]  # fmt: skip
    assert not any(c.folded for c in spy.calls)


@torch.no_grad()
def test_timm_latents_that_read_the_whole_image_are_cross():
    torch.manual_seed(1)
    model = import_timm().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, global_pool="map", class_token=False
    )
    spy = watched(model.eval(), lambda: model(x(2, 3, 32, 32)))
    assert [(c.layer, c.kind, c.q.shape[2], c.k.shape[2]) for c in spy.calls] == [
        ("blocks.0.attn", "self", 16, 16),
        ("attn_pool", "cross", 1, 16),
    ]


@torch.no_grad()
def test_timm_swin_is_refused_unfused_and_said_to_fold():
    torch.manual_seed(1)
    model = import_timm().create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 1, 1, 1))
    model.eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with pytest.raises(SeamError, match=r"'layers.0.blocks.0.attn'.* set `fused_attn = True` on these modules"):
        with Seam(model, Spy()):
            pass
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    spy = watched(model, lambda: model(x(2, 3, 32, 32)))
    assert spy.calls[0].folded
    assert spy.calls[0].q.shape[0] == 8


# -- diffusers


@torch.no_grad()
def test_diffusers_block():
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(1)
    model = BasicTransformerBlock(32, 4, 8, cross_attention_dim=16).eval()
    bias = torch.zeros(2, 1, 5)
    bias[1, :, 3:] = -10000.0
    spy = watched(model, lambda: model(x(2, 7, 32), encoder_hidden_states=x(2, 5, 16), encoder_attention_mask=bias))
    assert [(c.layer, c.kind, c.causal, c.q.shape[2], c.k.shape[2]) for c in spy.calls] == [
        ("attn1", "self", False, 7, 7),
        ("attn2", "cross", False, 7, 5),
    ]


@torch.no_grad()
def test_diffusers_unet_with_a_mask_of_words():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 32), cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    ).eval()  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    spy = watched(model, lambda: model(x(2, 4, 8, 8), torch.tensor(3), x(2, 5, 16), encoder_attention_mask=mask))
    own, cross = spy.calls[:2]
    assert (own.kind, own.q.shape, own.folded) == ("self", (2, 4, 64, 8), False)
    assert (cross.kind, cross.valid.sum(1).tolist(), cross.kv_valid.sum(1).tolist()) == ("cross", [64, 64], [5, 3])


@torch.no_grad()
def test_diffusers_joint_attention_is_one_sequence():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    spy = watched(
        model,
        lambda: model(
            hidden_states=x(1, 16, 4), encoder_hidden_states=x(1, 5, 32), pooled_projections=x(1, 32),
            timestep=torch.ones(1), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3),
        ),
    )  # fmt: skip
    assert [(c.kind, c.q.shape[2], c.k.shape[2]) for c in spy.calls] == [("self", 21, 21), ("self", 21, 21)]


def test_diffusers_old_processors_are_refused():
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import AttnProcessor

    model = BasicTransformerBlock(32, 4, 8)
    model.attn1.set_processor(AttnProcessor())
    with pytest.raises(SeamError, match=r"'attn1' run attention by diffusers' AttnProcessor.*AttnProcessor2_0"):
        with Seam(model, Spy()):
            pass


# -- hand-written


@torch.no_grad()
def test_own_model_with_a_cache_by_concatenation():
    torch.manual_seed(1)
    model, given = OwnModel().eval(), x(2, 6, 32)

    def run():
        past: list[list[Tensor]] = [[], []]
        return [model(given, past=past), *(model(x(2, 1, 32, seed=i), past=past) for i in range(3))]

    spy = watched(model, run)
    assert spy.layers == ["blocks.0", "blocks.1"] * 4
    for call in spy.calls:
        assert call.forward == (call.q_pos[-1] - 5)
        assert call.kv_pos.tolist() == list(range(6 + call.forward))
        assert (call.causal, call.positions_known) == (True, True)
        assert call.step == ("generated" if call.forward else "prompt")


@torch.no_grad()
def test_a_cache_that_nothing_tells_of_has_no_positions():
    """Opened in the middle of generation, keys may as well be learned memories."""
    torch.manual_seed(1)
    model, past, spy = OwnModel().eval(), [[], []], Spy()
    model(x(2, 6, 32), past=past)
    with Seam(model, spy):
        model(x(2, 1, 32), past=past)
        model(x(2, 1, 32), past=past)
    assert [c.positions_known for c in spy.calls] == [False, False, True, True]


@torch.no_grad()
def test_own_cross_attention():
    torch.manual_seed(1)
    model = OwnModel().eval()
    for length in (3, 6):  # another length, and by chance the same
        spy = watched(model, lambda n=length: model(x(2, 6, 32), x(2, n, 32, seed=3)))
        assert [(c.layer, c.kind) for c in spy.calls] == [
            ("blocks.0", "self"),
            ("blocks.1", "self"),
            ("cross", "cross"),
        ]


class Packed(nn.Module):
    """Calls attention with the tensors of `pack`."""

    def __init__(self, pack):
        super().__init__()
        self.pack, self.qkv = pack, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.pack(q, k, v)


def heads_in_batch(q, k, v):
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(8, 5, 5, dtype=torch.bool).tril())
    return z.unflatten(0, (2, 4)).transpose(1, 2).flatten(2)


def one_head(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())


def five_axes(q, k, v):
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2)[:, None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].transpose(1, 2).flatten(2)


def one_key_head(q, k, v):
    q = q.unflatten(-1, (4, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k[:, None, :, :4], v[:, None, :, :4], is_causal=True).transpose(1, 2)


def learned_queries(q, k, v):
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q[:1], k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())


def one_query_head(q, k, v):
    k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q[:, None, :, :4], k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize(
    ("pack", "heads", "kv_heads"),
    [
        (one_query_head, 4, 4),
        (heads_in_batch, 4, 4),
        (one_head, 1, 1),
        (five_axes, 4, 4),
        (one_key_head, 4, 1),
        (learned_queries, 4, 4),
    ],
)
def test_packings(pack, heads, kv_heads):
    torch.manual_seed(1)
    model = Packed(pack)
    (call,) = watched(model, lambda: model(x(2, 5, 16))).calls
    assert call.q.shape[:3] == (2, heads, 5)
    assert call.k.shape[:3] == (2, kv_heads, 5)
    assert call.causal
    assert not call.folded
    # replaced tensors go the same way
    plain = model(x(2, 5, 16))
    with Seam(model, lambda call: call.run(q=call.q, k=call.k, v=call.v, mask=call.mask)):
        torch.testing.assert_close(model(x(2, 5, 16)), plain)


class SequenceFirst(nn.Module):
    """`[length, batch, width]`, heads folded into the batch."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        q, k, v = (t.reshape(length, batch * 4, 4).transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, batch, 16)


def test_sequence_first_models_are_no_folds():
    torch.manual_seed(1)
    model = nn.Sequential(SequenceFirst(), SequenceFirst())
    for length in (8, 5, 1):
        for call in watched(model, lambda n=length: model(x(n, 2, 16))).calls:
            assert (tuple(call.q.shape), call.folded) == ((2, 4, length, 4), False)


class Grouped(nn.Module):
    """Repeats its keys itself, or says it does and does not."""

    def __init__(self, honest: bool):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.honest = 4, 2, honest
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 16 if honest else 32)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        if self.honest:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize(("honest", "kv_heads"), [(True, 2), (False, 4)])
def test_repetition_is_undone_only_where_keys_really_repeat(honest, kv_heads):
    torch.manual_seed(1)
    model = Grouped(honest)
    (call,) = watched(model, lambda: model(x(2, 5, 16))).calls
    assert call.k.shape[1] == kv_heads
    plain = model(x(2, 5, 16))
    with Seam(model, lambda call: call.run(k=call.k, v=call.v)):
        assert same(model(x(2, 5, 16)), plain)


class Buffered(nn.Module):
    """A preallocated key buffer with a mask, told where the queries start."""

    def __init__(self, told: bool):
        super().__init__()
        self.inner, self.told = OwnAttention(16, 4), told
        self.register_buffer("keys", torch.zeros(2, 4, 12, 4))
        self.register_buffer("values", torch.zeros(2, 4, 12, 4))

    def forward(self, x: Tensor, input_pos: Tensor | None = None, at: int = 0) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.inner.qkv(x).chunk(3, -1))
        here = slice(at, at + x.shape[1])
        self.keys[:, :, here], self.values[:, :, here] = k, v
        mask = torch.arange(12) <= torch.arange(at, at + x.shape[1])[:, None]
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_own_static_buffer(told):
    torch.manual_seed(1)
    model = Buffered(told)
    spy = Spy()
    with Seam(model, spy):
        for at, n in ((0, 5), (5, 1), (6, 3)):
            model(x(2, n, 16), input_pos=torch.arange(at, at + n) if told else None, at=at)
    assert [(c.q_pos.tolist(), c.q_start, c.kv_valid[0].sum().item(), c.step) for c in spy.calls] == [
        ([0, 1, 2, 3, 4], 0, 5, "prompt"),
        ([5], 5, 6, "generated"),
        ([6, 7, 8], 6, 9, "prompt"),
    ]
    assert all(c.causal and c.positions_known for c in spy.calls)


class Core(nn.Module):
    """A part without weights that is handed queries and keys, as some models write it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Outer(nn.Module):
    def __init__(self, heads: bool):
        super().__init__()
        self.heads, self.core, self.qkv = heads, Core(), nn.Linear(16, 48)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if context is not None:
            _, k, v = self.qkv(context).chunk(3, -1)
        if self.heads:
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, k, v))
        return self.core(q, k, v)


@pytest.mark.parametrize("heads", [True, False])
def test_attention_made_by_a_part_without_weights(heads):
    torch.manual_seed(1)
    model = Outer(heads)
    for context, kind in ((None, "self"), (x(2, 5, 16, seed=3), "cross")):
        (call,) = watched(model, lambda c=context: model(x(2, 5, 16), c)).calls
        assert (call.layer, call.kind) == ("core", kind)


class Pooled(nn.Module):
    """Keys of a sequence pooled by two, as in spatial reduction."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = x[:, None], x.unflatten(1, (-1, 2)).mean(2)[:, None]
        return F.scaled_dot_product_attention(q, k, k)[:, 0]


def test_pooled_keys_have_no_positions():
    model = Pooled()
    (call,) = watched(model, lambda: model(x(2, 6, 16))).calls
    assert not call.positions_known


class Ragged(nn.Module):
    """A mask under which some rows see nothing."""

    def forward(self, x: Tensor, additive: bool) -> Tensor:
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        mask[1, :, :2] = False
        mask[1, :, :, :2] = False
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)[:, 0]


@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_are_not_valid(additive):
    model = Ragged()
    (call,) = watched(model, lambda: model(x(2, 5, 16), additive)).calls
    assert call.valid.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    assert call.kv_valid.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    assert call.causal


def test_a_module_that_calls_twice_counts():
    model = OwnAttention(16)
    twice = nn.Sequential(model, model)
    spy = watched(twice, lambda: twice(x(2, 5, 16)))
    assert [(c.layer, c.index, c.forward) for c in spy.calls] == [("0", 0, 0), ("0", 1, 0)]
