"""The seam on PyTorch's own modules, where the call hides inside `F.multi_head_attention_forward`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.watch.seam import Seam, SeamError
from tests.watch.seam_models import Spy, flat, same, watched

PAD = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "causal": {"attn_mask": LATER},
    "hint": {"attn_mask": LATER, "is_causal": True},
    "float": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(3))},
    "heads": {"attn_mask": torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(3))},
    "padding": {"key_padding_mask": PAD},
    "both": {"attn_mask": LATER, "key_padding_mask": PAD},
}


def mha(train: bool = True, **how) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    return nn.MultiheadAttention(16, 4, **how).train(train)


def x(batch: int = 2, length: int = 5, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masks", list(MASKS))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need", [{"need_weights": False}, {}, {"average_attn_weights": False}])
def test_self_attention(masks, batch_first, need):
    module, given = mha(batch_first=batch_first), x() if batch_first else x().transpose(0, 1)
    spy = watched(module, lambda: module(given, given, given, **MASKS[masks], **need))
    (call,) = spy.calls
    assert call.layer == ""
    assert call.module is module
    assert call.q.shape == call.k.shape == (2, 4, 5, 4)
    assert (call.kind, call.folded) == ("self", False)
    assert call.causal == (masks in ("causal", "hint", "both"))
    rows = [5, 3] if masks in ("padding", "both") else [5, 5]
    assert (call.valid.sum(1).tolist(), call.kv_valid.sum(1).tolist()) == (rows, rows)
    assert call.positions_known


@pytest.mark.parametrize("how", [{}, {"dropout": 0.5}, {"bias": False}, {"kdim": 16, "vdim": 16}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention_and_kinds_of_module(how, need_weights):
    module, memory = mha(**how), x(3, 5, seed=4)  # sequence first: 2 queries, 3 keys, batch 5
    (call,) = watched(module, lambda: module(x(), memory, memory, need_weights=need_weights)).calls
    assert (call.kind, call.causal, tuple(call.q.shape), call.k.shape[2]) == ("cross", False, (5, 4, 2, 4), 3)
    assert call.dropout == how.get("dropout", 0.0)


@pytest.mark.parametrize("how", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_that_are_no_tokens_have_no_positions(how):
    module = mha(**how)
    (call,) = watched(module, lambda: module(x(), x(), x())).calls
    assert call.k.shape[2] == call.q.shape[2] + 1
    assert call.kind == "self"  # equal tensors, though not the same one
    assert not call.positions_known


def test_unbatched():
    module = mha()
    for need_weights in (True, False):
        (call,) = watched(module, lambda need=need_weights: module(x()[0], x()[0], x()[0], need_weights=need)).calls
        assert (tuple(call.q.shape), call.folded) == ((1, 4, 5, 4), False)


def test_weights_follow_what_the_handler_did():
    module = mha(batch_first=True)
    shift = 3.0 * torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(5))
    with Seam(module, lambda call: call.run(q=call.q + shift), edits=True):
        out, weights = module(x(), x(), x(), average_attn_weights=False)
    seen = Spy()
    with Seam(module, seen):
        module(x(), x(), x())
    call = seen.calls[0]
    expected = ((call.q + shift) @ call.k.mT * call.scale).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, module.out_proj((expected @ call.v).transpose(1, 2).flatten(2)))
    # the only run's output, changed afterwards: the weights are still that run's
    with Seam(module, lambda call: call.run() * 2, edits=True):
        _, kept = module(x(), x(), x(), average_attn_weights=False)
    torch.testing.assert_close(kept, (call.q @ call.k.mT * call.scale).softmax(-1))


@pytest.mark.parametrize("answer", [lambda call: torch.zeros_like(call.q), lambda call: call.run() + call.run()])
def test_weights_that_belong_to_nothing_are_refused(answer):
    module = mha()
    with pytest.raises(
        SeamError, match=r"also returns its weights .* call nn.MultiheadAttention with need_weights=False"
    ):
        with Seam(module, answer, edits=True):
            module(x(), x(), x())
    with Seam(module, answer, edits=True):
        out, weights = module(x(), x(), x(), need_weights=False)
    assert weights is None
    assert out.shape == x().shape


def test_the_function_is_given_back_after_errors():
    module, before = mha(), F.scaled_dot_product_attention

    def fail(call):
        raise KeyError("mine")

    for need_weights in (True, False):
        with pytest.raises(KeyError, match="mine"), Seam(module, fail):
            module(x(), x(), x(), need_weights=need_weights)
        assert F.scaled_dot_product_attention is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_handlers_compute_attention_themselves():
    """Inside a hidden call too, where the function itself is being stood in for."""
    module, got = mha(), []

    def handler(call):
        got.append(F.scaled_dot_product_attention(call.q, call.k, call.v))

    for need_weights in (True, False):
        with Seam(module, handler):
            module(x(), x(), x(), need_weights=need_weights)
    assert len(got) == 2


@pytest.mark.parametrize("need_weights", [True, False])
def test_nested_seams_inside_the_hidden_call(need_weights):
    module, order = mha(), []

    def outer(call):
        order.append("outer")
        return call.run() + 1

    def inner(call):
        order.append("inner")
        return call.run() * 2

    plain = module(x(), x(), x(), need_weights=need_weights)[0]
    z = []
    with Seam(module, lambda call: z.append(call.run())):
        module(x(), x(), x(), need_weights=need_weights)
    with Seam(module, outer, edits=True), Seam(module, inner, edits=True):
        out = module(x(), x(), x(), need_weights=need_weights)[0]
    assert order == ["inner", "outer"]
    edited = ((z[0] + 1) * 2).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(out, module.out_proj(edited))
    assert not torch.allclose(out, plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padding", [None, PAD])
@torch.no_grad()
def test_transformer_encoder(train, batch_first, padding):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).train(train)
    given = x() if batch_first else x().transpose(0, 1)

    def run():
        return model(given, src_key_padding_mask=padding)

    plain = run()
    with Seam(model):  # without a handler the fast path is left alone
        assert same(run(), plain)
    spy = Spy(rerun=True)
    with Seam(model, spy):
        out = run()
    assert spy.layers == ["layers.0.self_attn", "layers.1.self_attn"]
    real = torch.ones_like(PAD) if padding is None else ~PAD
    keep = real if batch_first else real.T
    torch.testing.assert_close(out[keep], plain[keep])  # to rounding: the fast path is off under a handler
    if train:
        assert same(out, plain)
    for call in spy.calls:
        assert torch.equal(call.valid, real)
        assert torch.equal(call.kv_valid, real)
    assert same(run(), plain)
    assert torch.backends.mha.get_fastpath_enabled()


def test_transformer_with_decoder():
    torch.manual_seed(1)
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    target_pad = torch.tensor([[False] * 4, [False] * 3 + [True]])
    spy = watched(
        model,
        lambda: model(
            x(), x(2, 4, 3), tgt_mask=causal, src_key_padding_mask=PAD.float().masked_fill(PAD, -torch.inf),
            memory_key_padding_mask=PAD, tgt_key_padding_mask=target_pad.float().masked_fill(target_pad, -torch.inf),
        ),
    )  # fmt: skip
    assert [(c.kind, c.causal, c.valid.sum(1).tolist(), c.kv_valid.sum(1).tolist()) for c in spy.calls] == [
        ("self", False, [5, 3], [5, 3]),
        ("self", True, [4, 3], [4, 3]),
        ("cross", False, [4, 3], [5, 3]),
    ]


def test_gradients_flow_through_what_the_handler_gives():
    module, given = mha(), x().requires_grad_()
    module(given, given, given)[0].sum().backward()
    expected = [given.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    given.grad = None
    module.zero_grad()
    with Seam(module, lambda call: call.run()):
        flat(module(given, given, given))[0].sum().backward()
    for a, b in zip([given.grad, *(p.grad for p in module.parameters())], expected, strict=True):
        torch.testing.assert_close(a, b)
