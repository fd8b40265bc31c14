"""Attention on integers: equal to the oracle, within its bound, exact where integers say all, refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard.patterns as rp
from regard.kernels.attend import attend
from regard.kernels.quantized import integer_product, quantize, quantized_attend
from tests.kernels.calls import calls
from tests.oracles import quantized as oracle

LENGTHS = st.one_of(st.integers(1, 40), st.integers(41, 150))


@st.composite
def quantised(draw, dtypes=(torch.float64,)):
    """(q, k, v, pattern, arguments)."""
    drawn = draw(calls(dtypes=dtypes, lengths=LENGTHS, dims=(8, 16, 40)))
    kwargs = {n: x for n, x in drawn.kwargs.items() if n in ("q_start", "scale")}
    kwargs |= {
        "qk_bits": draw(st.sampled_from([4, 8])),
        "pv_bits": draw(st.sampled_from([2, 4, 8])),
        "rows": draw(st.sampled_from([(32, 64), (1, 1), (5, 7), (64, 32)])),
        "block": draw(st.sampled_from([(64, 64), (8, 16), (33, 5)])),
    }
    return drawn.q, drawn.k, drawn.v, drawn.pattern, kwargs


def heads_of(q, k, v, pattern, kwargs):
    """Each head's arguments for the oracle, and where its numbers stand."""
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]
    start = kwargs.get("q_start", kv_len - q_len)
    i, j = torch.arange(q_len)[:, None] + start, torch.arange(kv_len)[None]
    scale = kwargs.get("scale", dim**-0.5)
    rest = [kwargs[n] for n in ("qk_bits", "pv_bits", "rows", "block")]
    for b in range(batch):
        for h in range(heads):
            g = h * k.shape[1] // heads
            ok = torch.ones(q_len, kv_len, dtype=torch.bool)
            if pattern is not None:
                ok = ok & pattern.allows(i, j, torch.tensor(h), torch.tensor(b))
            yield (b, h), (q[b, h], k[b, g], v[b, g], ok, scale, *rest)


@given(quantised())
def test_it_is_what_the_formula_says(drawn):
    q, k, v, pattern, kwargs = drawn
    out, lse = quantized_attend(q, k, v, pattern, return_lse=True, **kwargs)
    assert out.dtype == torch.float64
    for at, arguments in heads_of(*drawn):
        want, want_lse = oracle.quantized(*arguments)
        assert torch.allclose(out[at], want, atol=1e-11)
        assert torch.allclose(lse[at], want_lse, atol=1e-11)


@given(quantised(dtypes=(torch.float32, torch.float64)))
def test_no_output_is_further_off_than_the_bound(drawn):
    q, k, v, pattern, kwargs = drawn
    out = quantized_attend(q, k, v, pattern, **kwargs)
    for at, arguments in heads_of(*drawn):
        exact, most = oracle.bound(*arguments)
        assert bool(((out[at].double() - exact).abs() <= most + 1e-5).all())


@given(st.integers(0, 99), st.integers(1, 90), st.integers(1, 30), st.sampled_from([1, 7, 64]), st.integers(2, 8))
def test_no_entry_is_further_off_than_half_a_step(seed, length, width, rows, bits):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, width, generator=g, dtype=torch.float64)
    x[0, : length // 2] = 0
    found = quantize(x, bits, rows)
    most = 2 ** (bits - 1) - 1
    assert found.values.dtype == torch.int8
    assert int(found.values.abs().max()) <= most
    assert bool(((x - found.dequantize()).abs() <= found.row_scale()[..., None] / 2 + 1e-12).all())
    top = torch.stack([part.abs().amax((-2, -1)) for part in x.split(rows, 1)], -1)
    assert torch.equal(found.scale, top / most)


@given(st.integers(0, 99), st.integers(0, 300), st.booleans(), st.booleans())
def test_products_of_integers_are_exact(seed, terms, a_signed, b_signed):
    g = torch.Generator().manual_seed(seed)

    def draw(signed, *shape):
        low, high = (-128, 128) if signed else (0, 256)
        return torch.randint(low, high, shape, generator=g).to(torch.int8 if signed else torch.uint8)

    a, b = draw(a_signed, 2, 3, terms), draw(b_signed, 2, terms, 4)
    a[0, 0], b[0, :, 0] = a.max() if a.numel() else 0, b.max() if b.numel() else 0
    found = integer_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long())


def test_integers_that_say_all_give_attention_itself():
    """Inputs on the grid of 8 bits and uniform weights: nothing is lost; one key: its value."""
    g = torch.Generator().manual_seed(0)
    v = torch.randint(-127, 128, (1, 1, 64, 16), generator=g).double() / 16
    v[..., 0, 0] = 127 / 16
    q, k = torch.zeros(1, 1, 64, 16).double(), torch.randn(1, 1, 64, 16, generator=g).double()
    assert torch.allclose(quantized_attend(q, k, v), v.mean(2, keepdim=True).expand_as(v), atol=1e-12)
    only = quantized_attend(torch.randn(1, 1, 64, 16, generator=g).double(), k, v, rp.Window(0), block=16)
    wide = [part.abs().max() / 127 for part in v.split(16, 2)]
    assert all(
        bool(((a - b).abs() <= s / 2 + 1e-12).all())
        for a, b, s in zip(only.split(16, 2), v.split(16, 2), wide, strict=True)
    )


def test_more_bits_lose_less_and_blocks_of_like_tokens_lose_least():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 256, 32, generator=g).double()
    wanted = attend(q, k, v)
    error = {b: float((quantized_attend(q, k, v, qk_bits=b, pv_bits=b) - wanted).norm()) for b in (2, 4, 8)}
    assert error[8] < error[4] / 8 < error[2] / 16
    sizes = torch.ones(256, dtype=torch.float64)
    sizes[::2] = 30  # every other token is large: scales suit nobody; the large ones first: they suit all
    mixed, order = v * sizes[:, None], sizes.argsort(descending=True, stable=True)
    wanted = attend(q, k, mixed)
    spread = quantized_attend(q, k, mixed, pv_bits=8)
    sorted_ = quantized_attend(q, k[:, :, order], mixed[:, :, order], pv_bits=8)
    assert float((sorted_ - wanted).norm()) < float((spread - wanted).norm())


def test_queries_without_a_key_and_empty_calls():
    q = torch.randn(1, 2, 9, 8)
    out, lse = quantized_attend(q, q, q, rp.Columns(((0, 3),)) & rp.Queries(((4, 9),)), return_lse=True)
    assert not out[:, :, :4].any()
    assert bool((lse[:, :, :4] == -torch.inf).all())
    assert bool(lse[:, :, 4:].isfinite().all())
    out, lse = quantized_attend(q, q, q, ~rp.Full(), return_lse=True)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    assert quantized_attend(q[:, :, :0], q, q).shape == (1, 2, 0, 8)
    assert not quantized_attend(q, q[:, :, :0], q[:, :, :0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_bits": 1}, "bits must be an integer from 2 to 8, got 1"),
        ({"pv_bits": 16}, "pv_bits must be an integer from 2 to 8, got 16"),
        ({"rows": (0, 64)}, "rows must be an integer >= 1, got 0"),
        ({"block": 0}, "block must be an integer >= 1"),
        ({"k": torch.full((1, 2, 9, 8), torch.nan)}, "NaN or infinite"),
        ({"q": torch.zeros(1, 2, 9, 8, requires_grad=True)}, "rounding has no gradient"),
    ],
)
def test_refused_by_name(change, message):
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match=message):
        quantized_attend(**{"q": q, "k": q, "v": q} | change)


def test_products_of_anything_else_are_refused():
    with pytest.raises(ValueError, match=r"a must be int8 or uint8, got torch\.int32"):
        integer_product(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int8))
