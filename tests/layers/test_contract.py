"""What every sequence layer keeps: shapes, gradients, its pattern to the last bit, stepping, refusals by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regard.kernels.normalize import Elementwise
from regard.layers.alibi import Alibi
from regard.layers.dual_triangle import DualTriangleAttention
from regard.layers.multihead import MultiHead
from regard.layers.position import Rope
from regard.layers.state import RecurrentState
from regard.patterns import Causal, Columns, Full, Window, per_head, per_sample
from tests.oracles.multihead import multihead

DIM, HEADS = 16, 4


class LogN(nn.Module):
    """Queries that see many keys are sharpened."""

    def forward(self, q, n):
        return q * n.clamp(min=1).log1p().to(q.dtype)


class Sink(nn.Module):
    """A learned logit a head with no value: sigma(lse - a) z."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, z, lse, q, v, n, x):
        return torch.sigmoid(lse - self.logit[:, None])[..., None] * z


class HeadGate(nn.Module):
    """One gate a head, read from x."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(DIM, HEADS)

    def forward(self, x, z):
        return torch.sigmoid(self.read(x)).transpose(1, 2)[..., None] * z


class Scale(nn.Module):
    """A gate for the projections and the output: any width."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(DIM, 1)

    def forward(self, x, value):
        return torch.sigmoid(self.read(x)) * value


class Swap(nn.Module):
    """Mixes neighbouring heads."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, x):
        return (1 - self.share) * z + self.share * z.flip(1)


def make(name, pattern=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PRESETS[name](pattern).eval()


PRESETS = {
    "plain": lambda p: MultiHead(DIM, HEADS, pattern=p),
    "bias": lambda p: MultiHead(DIM, HEADS, pattern=p, bias=True),
    "gqa": lambda p: MultiHead(DIM, HEADS, kv_heads=2, head_dim=6, v_dim=5, pattern=p),
    "rope": lambda p: MultiHead(DIM, HEADS, kv_heads=1, position=Rope(4), pattern=p),
    "distance": lambda p: MultiHead(DIM, HEADS, position=Alibi.geometric(HEADS), pattern=p),
    "rms": lambda p: MultiHead(DIM, HEADS, qk_norm="rms", pattern=p),
    "layer": lambda p: MultiHead(DIM, HEADS, qk_norm="layer", pattern=p),
    "l2": lambda p: MultiHead(DIM, HEADS, qk_norm="l2", pattern=p),
    "temper": lambda p: MultiHead(DIM, HEADS, temper=LogN(), pattern=p),
    "sigmoid": lambda p: MultiHead(DIM, HEADS, normalize=Elementwise("sigmoid"), pattern=p),
    "weigh": lambda p: MultiHead(DIM, HEADS, weigh=Sink(), pattern=p),
    "gate": lambda p: MultiHead(DIM, HEADS, gate=HeadGate(), pattern=p),
    "gate q": lambda p: MultiHead(DIM, HEADS, gate=Scale(), gate_at="q", pattern=p),
    "gate k": lambda p: MultiHead(DIM, HEADS, gate=Scale(), gate_at="k", pattern=p),
    "gate v": lambda p: MultiHead(DIM, HEADS, gate=Scale(), gate_at="v", pattern=p),
    "gate out": lambda p: MultiHead(DIM, HEADS, gate=Scale(), gate_at="out", pattern=p),
    "mixer": lambda p: MultiHead(DIM, HEADS, mixer=Swap(), pattern=p),
    "guide": lambda p: MultiHead(DIM, HEADS, source="guide", position=Rope(4), pattern=p),
    "dual triangle": lambda p: DualTriangleAttention(DIM, 2, Rope(4)),
}
SELF = [n for n in PRESETS if n != "guide"]
STEPPED = [n for n in SELF if n != "dual triangle"]


def context(name, x):
    return {"context": x.flip(1)} if name == "guide" else {}


def draw(batch, length, seed=0, **how):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), **how)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 1), (3, 2)])
def test_shapes_and_finite_gradients(name, batch, length):
    layer, x = make(name, Causal()), draw(batch, length).requires_grad_()
    y = layer(x, **context(name, x))
    assert y.shape == (batch, length, DIM)
    y.square().sum().backward()
    for key, p in [("x", x), *layer.named_parameters()]:
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", SELF)
@pytest.mark.parametrize("pattern", [Causal(), Window(1, 2), Causal() & Columns(((2, 5),))], ids=str)
def test_the_pattern_is_obeyed_to_the_last_bit(name, pattern):
    length = 6
    layer, x = make(name).double(), draw(1, length, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, pattern=pattern), x)[0, :, :, 0].abs().amax((1, 3))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    met = pattern.allows(i, j)
    own = i == j  # a query moves its own output, whatever it may see
    assert (jacobian[~met & ~own] == 0).all()
    if name == "dual triangle":
        assert (jacobian[met] > 0).all()
    else:
        counts = met.sum(1, keepdim=True)
        assert (jacobian[met & (counts > 1)] > 0).all()


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("pattern", [Causal(), Window(3)], ids=str)
def test_stepping_gives_the_numbers_of_the_parallel_form(name, pattern):
    layer, x = make(name, pattern), draw(2, 9)
    with torch.no_grad():
        whole, state = layer(x), layer.new_state()
        parts = [layer(x[:, a:b], state=state) for a, b in ((0, 1), (1, 2), (2, 6), (6, 7), (7, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert state.length == 9
    assert state.nbytes > 0


@pytest.mark.parametrize("name", ["plain", "bias", "gqa", "rope"])
@given(length=st.integers(1, 12), left=st.integers(0, 12), right=st.integers(0, 3), seed=st.integers(0, 99))
def test_equal_to_explicit_weights(name, length, left, right, seed):
    pattern = Window(left, right) & Columns(((1, 9),))  # the first rows may see nothing
    layer, x = make(name, pattern), draw(2, length, seed)
    expected = multihead(layer, x, pattern, theta=10_000.0 if name == "rope" else None)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "rope", "temper", "weigh", "mixer", "sigmoid"])
def test_a_row_without_keys_is_zero_before_the_gate(name):
    layer, x = make(name), draw(2, 5).requires_grad_()
    y = layer(x, pattern=Causal() & Columns(((2, 5),)))
    assert (y[:, :2] == 0).all()
    assert (y[:, 2:] != 0).any()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_temper_and_weigh_know_how_many_keys_each_head_sees():
    """Under a pattern of its own, each head has its own count."""
    patterns = [Causal(), Window(1), Full(), Causal(future=True)]
    seen = []

    class Count(nn.Module):
        def forward(self, q, n):
            seen.append(n)
            return q

    layer, x = MultiHead(DIM, HEADS, temper=Count(), pattern=per_head(patterns)), draw(1, 5)
    layer(x)
    i, j = torch.arange(5)[:, None], torch.arange(5)
    assert torch.equal(seen[0][..., 0], torch.stack([p.allows(i, j).expand(5, 5).sum(1) for p in patterns]))
    MultiHead(DIM, HEADS, temper=Count(), pattern=Causal())(x)
    assert seen[1].shape == (1, 5, 1)


def test_cross_attention_reads_the_context_alone():
    layer = MultiHead(DIM, HEADS, source="cross", kv_heads=2)
    x, other = draw(2, 4), draw(2, 9, seed=1)
    assert layer(x, context=other).shape == x.shape
    y = layer(x, context=other, pattern=Columns(((0, 3),)))
    other[:, 3:] += 1
    torch.testing.assert_close(layer(x, context=other, pattern=Columns(((0, 3),))), y)


def test_guide_takes_values_from_x_and_weights_from_the_context():
    layer, x = make("guide", Causal()).double(), draw(1, 5, dtype=torch.float64)
    guide = draw(1, 5, seed=1, dtype=torch.float64)
    one, two = layer(x, context=guide), layer(3 * x, context=guide)
    torch.testing.assert_close(3 * one, two)  # linear in x
    assert not torch.allclose(layer(x, context=2 * guide), one)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_rope_depends_on_distances_alone_and_keeps_lengths(theta):
    rope, generator = Rope(8, theta), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 8, generator=generator, dtype=torch.float64)
    scores = []
    for shift in (0, 1000):
        positions = torch.arange(5) + shift
        turned, keys = rope.rotate(q, k, positions, positions)
        torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
        scores.append(turned @ keys.mT)
    torch.testing.assert_close(scores[0], scores[1])
    assert not torch.allclose(scores[0], q @ k.mT)


def test_rope_is_the_one_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    q, k = torch.randn(2, 3, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40, 47)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    for ours, theirs in zip(
        Rope(16, 500.0).rotate(q, k, positions, positions), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_positions_may_differ_from_indices():
    layer, x = make("rope", Full()), draw(1, 6)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(layer(x[:, order], positions=order), layer(x)[:, order])


class TestRefusals:
    @pytest.mark.parametrize(
        ("match", "how"),
        [
            ("heads must divide dim = 16", {"heads": 3}),
            ("kv_heads must divide heads = 4", {"kv_heads": 3}),
            ("v_dim must be at least 1", {"v_dim": 0}),
            ("source must be one of .*'guide', got 'both'", {"source": "both"}),
            ("qk_norm must be one of", {"qk_norm": "batch"}),
            ("gate_at must be one of", {"gate_at": "w"}),
        ],
    )
    def test_arguments(self, match, how):
        from jaxtyping import TypeCheckError

        with pytest.raises((ValueError, TypeCheckError), match=match if "one of" not in match else None):
            MultiHead(DIM, **{"heads": 4} | how)

    def test_context(self):
        x = draw(1, 3)
        with pytest.raises(ValueError, match="context must be None with source='self'"):
            make("plain")(x, context=x)
        with pytest.raises(ValueError, match="context must be given with source='cross'"):
            MultiHead(DIM, HEADS, source="cross")(x)
        with pytest.raises(ValueError, match="context must have the batch and length of x"):
            make("guide")(x, context=draw(1, 4))

    @pytest.mark.parametrize(
        "pattern",
        [None, Full(), Window(2, 1), Causal(future=True), per_head([Causal()] * 3 + [Full()]), per_sample([Full()])],
        ids=str,
    )
    def test_a_state_under_a_pattern_that_looks_ahead(self, pattern):
        layer = make("plain", pattern)
        with pytest.raises(ValueError, match="sees key 3, which has not come"):
            layer(draw(1, 3), state=layer.new_state())

    def test_a_state_without_use_for_it(self):
        with pytest.raises(ValueError, match="state must be None"):
            make("guide").new_state()
        with pytest.raises(ValueError, match="state must be None"):
            make("dual triangle").new_state()

    def test_shapes(self):
        from jaxtyping import TypeCheckError

        layer = make("rope")
        for x, how in ((draw(1, 3)[0], {}), (draw(1, 3)[..., :9], {}), (draw(1, 3), {"positions": torch.arange(4)})):
            with pytest.raises((ValueError, TypeCheckError)):
                layer(x, **how)
        with pytest.raises(ValueError, match=r"x must be \[batch, length, 16\], got shape \(1, 3, 9\)"):
            layer._check(draw(1, 3)[..., :9], None, None, None)
        with pytest.raises(ValueError, match=r"positions must be \[length\] = \[3\], got shape \(4,\)"):
            layer._check(draw(1, 3), None, None, torch.arange(4))

    def test_a_state_of_another_batch(self):
        layer = make("plain", Causal())
        state = layer.new_state()
        layer(draw(2, 3), state=state)
        with pytest.raises(ValueError, match="batch of 2, got x of a batch of 1"):
            layer(draw(1, 1), state=state)
        with pytest.raises(ValueError, match=r"length must be in 0\.\.3"):
            state.cut(4)
        with pytest.raises(ValueError, match="cannot go back"):
            RecurrentState().cut(0)

    def test_rope(self):
        with pytest.raises(ValueError, match="head_dim must be even"):
            Rope(5)
        with pytest.raises(ValueError, match="theta must be above 0"):
            Rope(4, 0)
        with pytest.raises(ValueError, match="q has head_dim 4, this Rope was made for 6"):
            MultiHead(DIM, HEADS, position=Rope(6))(draw(1, 2))


def test_a_state_can_be_cut_and_copied():
    layer, x = make("rope", Causal()), draw(1, 6)
    with torch.no_grad():
        state = layer.new_state()
        layer(x[:, :4], state=state)
        copy = state.clone()
        first = layer(x[:, 4:], state=state)
        state.cut(4)
        torch.testing.assert_close(layer(x[:, 4:], state=state), first)
        assert copy.length == 4
        torch.testing.assert_close(layer(x[:, 4:], state=copy), first)
        state.reset()
        assert (state.length, state.nbytes) == (0, 0)
