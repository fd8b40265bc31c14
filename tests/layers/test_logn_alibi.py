"""LogN scaling and linear biases against their formulas, alone and plugged into MultiHead."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.layers.alibi import Alibi
from regard.layers.logn import LogN, logn_scale
from regard.layers.multihead import MultiHead
from regard.patterns import Causal, Window


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9000), st.integers(2, 2000))
def test_the_factor_is_the_formula(n, base):
    scale = logn_scale(n, base, q_len=3)
    torch.testing.assert_close(scale, torch.full((3,), math.log(n) / math.log(base)))


@pytest.mark.parametrize("n", [2, 128, 512, 1000, 8192])
def test_a_key_that_stands_out_keeps_half(n):
    """Score log(base) against n - 1 zeros."""
    scores = torch.zeros(n, dtype=torch.float64)
    scores[0] = math.log(512)
    factor = logn_scale(n, queries=[(0, 1)]).double()[0]
    assert float((scores * factor).softmax(0)[0]) == pytest.approx(1 / (1 + (n - 1) / n), abs=1e-5)
    assert float(scores.softmax(0)[0]) == pytest.approx(512 / (512 + n - 1))


def test_queries_and_lengths_of_samples():
    scale = logn_scale(torch.tensor([4, 16]), base=4, queries=[(0, 1), (3, 5)], q_len=6)
    torch.testing.assert_close(scale, torch.tensor([[1.0] * 6, [2.0, 1, 1, 2, 2, 1]]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: logn_scale(0), "length must be at least 1"),
        (lambda: logn_scale(4, base=1), "base must be above 1"),
        (lambda: logn_scale(4, queries=[(2, 5)]), r"queries must be intervals within \[0, 4\)"),
        (lambda: LogN(0.5), "base must be above 1"),
        (lambda: Alibi([-1.0]), "slopes must be one or more numbers >= 0"),
        (lambda: Alibi.geometric(6), "heads must be a power of two"),
        (lambda: Alibi([1.0, 2.0]).bias(random(1, 3, 2, 4), torch.arange(2), torch.arange(2)), "slopes must be 1 or 3"),
    ],
)
def test_errors_name_the_argument(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def head(**plugs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiHead(8, 2, **plugs).double()


def explicit(layer, x, pattern, change):
    """y from whole weights; ``change`` takes scores [heads, q, k]."""
    n = x.shape[1]
    q, k, v = (p(x)[0].view(n, 2, 4).transpose(0, 1) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    at = torch.arange(n)
    allowed = pattern.allows(at[:, None], at[None])
    scores = change(q @ k.transpose(1, 2) / 2.0).masked_fill(~allowed, -torch.inf)
    return layer.o_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))[None]


@pytest.mark.parametrize("pattern", [Causal(), Window(2, 1)])
def test_logn_in_multihead_counts_the_keys_of_each_query(pattern):
    x = random(1, 7, 8)
    n = pattern.row_counts(7, 7).double()[None, :, None]
    layer = head(temper=LogN(base=3))
    torch.testing.assert_close(
        layer(x, pattern=pattern), explicit(layer, x, pattern, lambda s: s * n.log() / math.log(3))
    )
    layer = head(temper=LogN(base=3, queries=[(2, 4)]))
    some = ((torch.arange(7) >= 2) & (torch.arange(7) < 4))[None, :, None]
    torch.testing.assert_close(
        layer(x, pattern=pattern),
        explicit(layer, x, pattern, lambda s: torch.where(some, s * n.log() / math.log(3), s)),
    )


def test_alibi_in_multihead_falls_with_distance():
    x = random(1, 7, 8)
    layer = head(position=Alibi([0.5, 2.0]))
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs().double()
    slopes = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(
        layer(x, pattern=Causal()), explicit(layer, x, Causal(), lambda s: s - slopes * distance)
    )
    assert Alibi.geometric(4).slopes.tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
