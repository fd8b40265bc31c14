import pytest
import torch

from regard.layers.channel import ChannelAttention
from regard.layers.channel_gate import SE
from tests.layers.contract import check_gradients, jitter, reached, tokens
from tests.oracles import layers as oracle
from tests.vision import import_timm


@pytest.mark.parametrize(("groups", "length"), [(1, 5), (2, 7), (4, 1)])
@pytest.mark.parametrize("scale", ["head", "length"])
def test_equals_the_formula(groups, length, scale):
    layer = jitter(ChannelAttention(8, groups, scale)).double()
    x = tokens(2, length, 8, dtype=torch.float64)
    factor = (8 // groups if scale == "head" else length) ** -0.5
    torch.testing.assert_close(layer(x), oracle.channel_attention(layer, x, factor), atol=1e-12, rtol=1e-10)
    check_gradients(layer, x)


def test_one_layer_reaches_every_token():
    assert reached(jitter(ChannelAttention(4, 2)), 9, 4).all()


@pytest.mark.parametrize("scale", ["head", "length"])
def test_padding_does_not_leak_and_comes_back_zero(scale):
    layer = jitter(ChannelAttention(8, 2, scale)).double()
    x = tokens(2, 6, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    y = layer(x, valid=valid)
    torch.testing.assert_close(y[0], layer(x[:1])[0])
    alone = x[1:, [0, 1, 3]]
    torch.testing.assert_close(y[1, [0, 1, 3]], layer(alone)[0])
    assert (y[1, [2, 4, 5]] == 0).all()
    moved = torch.where(valid[..., None], x, 1e6)
    assert torch.equal(layer(moved, valid=valid), y)


@pytest.mark.parametrize("which", ["ChannelAttention", "ChannelAttentionV2"])
def test_equals_timms_davit(which):
    import_timm()
    from timm.models import davit

    torch.manual_seed(0)
    theirs = jitter(getattr(davit, which)(16, 4, qkv_bias=True))
    ours = ChannelAttention(16, 4, "head" if which == "ChannelAttention" else "length")
    order = [0, 1, 2] if which == "ChannelAttention" else [2, 0, 1]  # the release's k^T v is the later one's q^T k
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.qkv.weight.unflatten(0, (3, 16))[order].flatten(0, 1))
        ours.qkv.bias.copy_(theirs.qkv.bias.unflatten(0, (3, 16))[order].flatten())
        ours.proj.load_state_dict(theirs.proj.state_dict())
        x = tokens(2, 35, 16)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_refusals():
    layer = ChannelAttention(8, 2)
    x = tokens(1, 3, 8)
    for name in ("context", "pattern", "state"):
        with pytest.raises(ValueError, match=f"{name} must be None: ChannelAttention takes no {name}"):
            layer(x, **{name: x})
    with pytest.raises(ValueError, match="groups must be at least 1 and divide dim, got dim=8, groups=3"):
        ChannelAttention(8, 3)
    with pytest.raises((ValueError, TypeError), match="scale"):
        ChannelAttention(8, 2, "tokens")


def test_squeeze_excite_scales_channels():
    gate = jitter(SE(8, 4)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    mean = x.mean((2, 3))
    expected = torch.sigmoid(gate.excite(torch.relu(gate.squeeze(mean))))
    torch.testing.assert_close(gate(x), x * expected[:, :, None, None])
    assert gate.squeeze.out_features == 2
    with pytest.raises(ValueError, match="dim and r must be at least 1"):
        SE(8, 0)


def test_contract_of_other_lengths():
    assert ChannelAttention(8, 2)(tokens(0, 3, 8)).shape == (0, 3, 8)
