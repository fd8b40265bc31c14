"""Rotary positions against complex numbers, transformers' own, and their way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.rotary import inverse_frequencies, rotate, unrotate
from regard.layers.position import Rope
from tests.oracles import rotary as oracle


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.booleans(), st.integers(0, 100))
def test_is_multiplication_by_complex_numbers(pairs, rest, length, interleaved, seed):
    x = drawn(2, 3, length, 2 * pairs + rest, seed=seed)
    inv_freq = torch.rand(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = torch.randint(-50, 50, (2, 1, length), generator=torch.Generator().manual_seed(seed))
    out = rotate(x, at, inv_freq, interleaved=interleaved)
    for b in range(2):
        for h in range(3):
            np.testing.assert_allclose(out[b, h], oracle.rotate(x[b, h], at[b, 0], inv_freq, interleaved), atol=1e-12)
    torch.testing.assert_close(unrotate(out, at, inv_freq, interleaved=interleaved), x, rtol=0, atol=1e-12)


def test_several_axes_turn_their_own_pairs():
    inv_freq = torch.zeros(3, 6, dtype=torch.float64)
    for axis, pairs in enumerate(((0, 1), (2, 3, 4), (5,))):
        inv_freq[axis, list(pairs)] = inverse_frequencies(2 * len(pairs), 100, dtype=torch.float64)
    at = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    x = drawn(1, 2, 24, 12)
    out = rotate(x, at, inv_freq)
    np.testing.assert_allclose(out[0, 1], oracle.rotate(x[0, 1], at, inv_freq), atol=1e-12)
    parts = [
        rotate(torch.cat([x[..., i : i + 1], x[..., i + 6 : i + 7]], -1), at[:, 1], inv_freq[1, i : i + 1])
        for i in (2, 3)
    ]
    for i, part in zip((2, 3), parts, strict=True):
        assert torch.equal(out[..., [i, i + 6]], part)  # a grid's axis is a line's rotation, to the bit
    torch.testing.assert_close(unrotate(out, at, inv_freq), x, rtol=0, atol=1e-12)


def test_float32_comes_back_to_rounding_at_long_positions_and_half_keeps_its_dtype():
    x, at, inv_freq = drawn(1, 2, 64, 32, dtype=torch.float32), torch.arange(64) * 16_384, inverse_frequencies(32)
    assert (unrotate(rotate(x, at, inv_freq), at, inv_freq) - x).abs().max() < 2e-6
    half = x.to(torch.bfloat16)
    assert rotate(half, at, inv_freq).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(half, at, inv_freq), rotate(half.float(), at, inv_freq).to(torch.bfloat16))


def test_is_transformers_rotation_and_rope_uses_it():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    theirs, at = LlamaRotaryEmbedding(config), torch.arange(900, 940)
    x = drawn(1, 2, 40, 16, dtype=torch.float32)
    inv_freq = inverse_frequencies(16, 500.0)
    assert torch.equal(inv_freq, theirs.inv_freq)
    want, _ = apply_rotary_pos_emb(x, x, *theirs(x, at[None]))
    torch.testing.assert_close(rotate(x, at, inv_freq), want, rtol=0, atol=1e-6)
    assert torch.equal(Rope(16, 500.0).rotate(x, x, at, at)[0], rotate(x, at, inv_freq))


def test_gradients_turn_back():
    x = drawn(1, 1, 5, 6).requires_grad_()
    at, inv_freq = torch.arange(5), inverse_frequencies(6, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: rotate(x, at, inv_freq, interleaved=True), (x,))


def test_what_does_not_fit_is_refused():
    x, inv_freq = drawn(2, 3, 5, 8), inverse_frequencies(8)
    with pytest.raises(ValueError, match="inv_freq has 5 pairs, x of head_dim 8 has 4"):
        rotate(x, torch.arange(5), inverse_frequencies(10))
    with pytest.raises(ValueError, match=r"positions must broadcast to the rows \[2, 3, 5\] of x, got shape \[4\]"):
        rotate(x, torch.arange(4), inv_freq)
    with pytest.raises(ValueError, match=r"positions must broadcast"):
        rotate(x, torch.zeros(2, 5, dtype=torch.long), inv_freq)  # [batch, length] says not which axis heads are
    with pytest.raises(ValueError, match="positions must end in inv_freq's 2 axes"):
        rotate(x, torch.arange(5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="head_dim must be even"):
        inverse_frequencies(5)
    with pytest.raises(ValueError, match="theta must be above 0"):
        inverse_frequencies(4, 0)
