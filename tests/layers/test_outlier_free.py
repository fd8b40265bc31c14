"""Attention without outliers against its definition: every kind, patterns, groups of heads, empty rows, stepping."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.layers.multihead import MultiHead
from regard.layers.outlier_free import OutlierFree
from regard.layers.position import Rope
from regard.patterns import Causal, Columns, Window
from tests.layers.contract import check_gradients, jitter, tokens
from tests.oracles.multihead import rotated
from tests.oracles.outlier_free import outlier_free

KINDS = ("softmax", "value", "correction", "pair", "scale", "sigmoid")
DIM, HEADS = 16, 4


def make(kind, seed=0, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return jitter(OutlierFree(kind, DIM, HEADS, **how), seed)


def expected(layer, x, pattern, theta=None):
    """The layer's output from the oracle, sample by sample."""
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    length = x.shape[1]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    allow = pattern.allows(i, j).expand(length, length)
    out = []
    for sample in x.detach().double():

        def part(name, heads, sample=sample):
            y = (sample @ w[f"{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1)
            return y.repeat_interleave(layer.heads // heads, 0)

        q, k = part("q_proj", layer.heads), part("k_proj", layer.kv_heads)
        if theta is not None:
            q, k = rotated(q, range(length), theta), rotated(k, range(length), theta)
        scale = None
        if layer.kind == "scale":
            scale = 2 * torch.sigmoid(sample @ w["gate.read.weight"].T + w["gate.read.bias"]).T
        z = outlier_free(
            layer.kind,
            q,
            k,
            part("v_proj", layer.kv_heads),
            allow,
            key=w.get("weigh.key"),
            value=w.get("weigh.value"),
            scale=scale,
        )
        out.append(z.transpose(0, 1).flatten(1) @ w["o_proj.weight"].T)
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
@given(
    length=st.integers(1, 9),
    left=st.integers(0, 9),
    right=st.integers(0, 2),
    kv_heads=st.sampled_from((1, 2, 4)),
    seed=st.integers(0, 99),
)
def test_equal_to_the_definition(kind, length, left, right, kv_heads, seed):
    pattern = Window(left, right) & Columns(((1, 7),))  # the first rows may see nothing
    layer, x = make(kind, seed, kv_heads=kv_heads, v_dim=3), tokens(2, length, DIM, seed)
    torch.testing.assert_close(layer(x, pattern=pattern).double(), expected(layer, x, pattern), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_rotary_positions_the_added_key_stays_where_it_is(kind):
    layer, x = make(kind, position=Rope(4)).double(), tokens(1, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x, pattern=Causal()), expected(layer, x, Causal(), theta=10_000.0))


@pytest.mark.parametrize("kind", ["pair", "correction"])
def test_a_pair_is_one_more_token_of_plain_attention(kind):
    """The definition in one call: k' and v' put before the keys; (c) divides the tokens' part by its mass."""
    layer, x = make(kind).double(), tokens(2, 6, DIM, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    key, value = (p[:, None].expand(2, -1, -1, -1) for p in (layer.weigh.key, layer.weigh.value))
    allow = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ torch.cat([key, k], 2).mT / 2).masked_fill(~torch.nn.functional.pad(allow, (1, 0), value=True), -9e9)
    weights = scores.softmax(-1)
    own = weights[..., 1:] @ v
    own = own if kind == "pair" else own / weights[..., 1:].sum(-1, keepdim=True)
    z = own + weights[..., :1] * value
    torch.testing.assert_close(layer(x, pattern=Causal()), layer.o_proj(z.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    check_gradients(make(kind, pattern=Causal()), tokens(2, 7, DIM))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [Causal(), Window(3)], ids=str)
def test_stepping_gives_the_numbers_of_the_parallel_form(kind, pattern):
    layer, x = make(kind, pattern=pattern, position=Rope(4)), tokens(2, 8, DIM)
    with torch.no_grad():
        whole, state = layer(x), layer.new_state()
        parts = [layer(x[:, a:b], state=state) for a, b in ((0, 1), (1, 5), (5, 6), (6, 8))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_the_scale_starts_as_plain_attention():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = MultiHead(DIM, HEADS)
        torch.manual_seed(0)
        scaled = OutlierFree("scale", DIM, HEADS)
    torch.testing.assert_close(scaled(tokens(1, 5, DIM)), plain(tokens(1, 5, DIM)))


@pytest.mark.parametrize("kind", ["pair", "correction"])
def test_gradients_stay_finite_where_a_query_has_no_key(kind):
    layer, x = make(kind, pattern=Causal() & Columns(((2, 5),))), tokens(1, 5, DIM).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_refusals():
    with pytest.raises((ValueError, TypeError), match="kind"):
        OutlierFree("tanh", DIM, HEADS)
    with pytest.raises(ValueError, match="sets gate itself"):
        OutlierFree("pair", DIM, HEADS, gate=None)
