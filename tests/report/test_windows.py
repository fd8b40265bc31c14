"""Exact windows, heaviest keys and block maps against dense float64 attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.report.windows import Window, close_up, exact_weights

from .models import Bare, ids, llama


def dense(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) with masked pairs at 0, by loops over heads in float64; rows without a key are 0."""
    q, k = q.double().numpy(), k.double().numpy()
    batch, heads, rows, dim = q.shape
    out = np.zeros((batch, heads, rows, k.shape[2]))
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h] @ k[b, h // (heads // k.shape[1])].T / np.sqrt(dim)
            allowed = np.ones_like(scores, dtype=bool)
            if causal:
                allowed &= np.tril(allowed)
            if mask is not None:
                m = mask.expand(batch, heads, rows, k.shape[2])[b, h]
                allowed &= m.numpy() if m.dtype == torch.bool else ~torch.isneginf(m).numpy()
                if m.dtype != torch.bool:
                    scores = scores + np.where(allowed, m.double().numpy(), 0)
            for i in range(rows):
                if allowed[i].any():
                    e = np.where(allowed[i], np.exp(scores[i] - scores[i][allowed[i]].max()), 0)
                    out[b, h, i] = e / e.sum()
    return out


@st.composite
def calls(draw):
    length = draw(st.integers(2, 90))
    groups, kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    batch = draw(st.integers(1, 2))
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q = torch.randn(batch, groups * kv_heads, length, 8, generator=generator) * 2
    k = torch.randn(batch, kv_heads, length, 8, generator=generator) * 2
    mask = None
    if kind in ("bool", "additive"):
        mask = torch.rand(1, 1, length, length, generator=generator) < 0.7
        mask |= torch.eye(length, dtype=torch.bool)
    if kind == "additive":
        mask = torch.randn(1, 1, length, length, generator=generator).masked_fill(~mask, float("-inf"))
    r0 = draw(st.integers(0, length - 1))
    k0 = draw(st.integers(0, length - 1))
    rows = slice(r0, draw(st.integers(r0 + 1, length)))
    keys = slice(k0, draw(st.integers(k0 + 1, length)))
    return q, k, mask, kind == "causal", rows, keys


@settings(max_examples=12)
@given(calls())
def test_a_window_holds_the_model_s_own_weights(call):
    q, k, mask, causal, rows, keys = call
    model = Bare(attn_mask=mask, is_causal=causal)
    (found,) = exact_weights(model, {"q": q, "k": k, "v": k}, rows=rows, keys=keys).values()
    assert found.shape == (*q.shape[:2], rows.stop - rows.start, keys.stop - keys.start)
    np.testing.assert_allclose(found.numpy(), dense(q, k, mask, causal)[:, :, rows, keys], rtol=1e-4, atol=1e-6)


@settings(max_examples=12)
@given(calls(), st.integers(2, 12))
def test_a_close_up_holds_window_heaviest_keys_and_blocks(call, size):
    q, k, mask, causal, rows, keys = call
    window = Window((rows.start, rows.stop), (keys.start, keys.stop))
    model = Bare(attn_mask=mask, is_causal=causal)
    (seen,) = close_up(model, {"q": q, "k": k, "v": k}, [window], blocks=size, top=3).values()
    whole = dense(q, k, mask, causal)[0]
    length = q.shape[2]
    (_, weights), (heaviest, index) = seen.windows[0], seen.heaviest[0]
    np.testing.assert_allclose(weights.numpy(), whole[:, rows, keys], rtol=1e-4, atol=1e-6)
    count = min(3, length)
    np.testing.assert_allclose(
        heaviest.numpy(), np.sort(whole[:, rows], -1)[..., ::-1][..., :count], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(np.take_along_axis(whole[:, rows], index.numpy(), -1), heaviest, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(seen.received.numpy(), whole.sum(1) / length, rtol=1e-4, atol=1e-6)
    block = np.arange(length) * size // length
    expected = np.zeros((len(whole), size, size))
    for a in np.unique(block):
        for b in np.unique(block):
            expected[:, a, b] = whole[:, block == a][:, :, block == b].sum(-1).mean(-1)
    np.testing.assert_allclose(seen.blocks.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_a_transformers_model_with_grouped_heads():
    model, x = llama(), ids(70)
    found = exact_weights(model, {"input_ids": x}, rows=slice(40, 70), keys=slice(0, 70), heads=[1, 3])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=x, output_attentions=True).attentions
    assert list(found) == [f"model.layers.{i}.self_attn" for i in range(2)]
    for ours, theirs in zip(found.values(), weights, strict=True):
        torch.testing.assert_close(ours, theirs[:, [1, 3], 40:70], rtol=1e-4, atol=1e-5)


def test_layers_can_be_chosen():
    found = exact_weights(
        llama(), {"input_ids": ids(9)}, rows=slice(0, 9), keys=slice(2, 4), layers=["model.layers.1.self_attn"]
    )
    assert {k: tuple(v.shape) for k, v in found.items()} == {"model.layers.1.self_attn": (1, 4, 9, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": slice(0, 257)}, "rows spans 257 tokens; a window is at most 256 x 256"),
        ({"keys": slice(0, 300)}, "keys spans 300"),
        ({"rows": slice(5, 5)}, "start < stop"),
        ({"rows": slice(0, 20)}, "rows reaches 20, but layer 'model.layers.0.self_attn' has 12"),
        ({"keys": slice(0, 8, 2)}, "no step"),
        ({"heads": [4]}, r"heads \[4\] are not in layer"),
        ({"layers": ["model.layers.7"]}, "made no attention call; these did"),
    ],
)
def test_refused_by_name(options, message):
    given_ = {"rows": slice(0, 4), "keys": slice(0, 4)} | options
    with pytest.raises(ValueError, match=message):
        exact_weights(llama(), {"input_ids": ids(12)}, **given_)
