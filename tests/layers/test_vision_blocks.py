"""Multi-axis and dual blocks, MBConv, phases: contracts, reach, and timm's blocks with the same weights."""

import pytest
import torch
from torch import nn

from regard.layers.conv import ConvPosition, MBConv
from regard.layers.dual import DualAttention
from regard.layers.ensemble import PhaseAverage
from regard.layers.grid import windowed
from regard.layers.maps import as_map, as_sequence, to_map, to_sequence
from regard.layers.multi_axis import MultiAxis
from tests.layers.contract import check_gradients, check_refusals, jitter, reached, tokens
from tests.vision import import_timm


def test_maps_and_sequences_are_row_major():
    x = torch.arange(24.0).reshape(1, 12, 2)
    m = to_map(x, (3, 4))
    assert m.shape == (1, 2, 3, 4)
    assert m[0, :, 1, 2].tolist() == x[0, 6].tolist()
    assert torch.equal(to_sequence(m), x)
    layer = nn.Linear(2, 2)
    assert torch.equal(as_map(layer)(m), to_map(layer(x), (3, 4)))
    conv = nn.Conv2d(2, 2, 1)
    sequence = as_sequence(conv, 3, 4)
    assert torch.equal(sequence(x), to_sequence(conv(m)))
    with pytest.raises(ValueError, match="x must have 12 tokens, 3 x 4"):
        sequence(x[:, :11])
    with pytest.raises(ValueError, match="context must be None"):
        sequence(x, context=x)


@pytest.mark.parametrize("conv", [False, True])
def test_contract_of_both_blocks(conv):
    for layer, length in (
        (MultiAxis(8, 2, (4, 6), window=2, conv=conv), 24),
        (DualAttention(8, 2, (5, 7), window=3, conv=conv), 35),
    ):
        check_gradients(jitter(layer), tokens(2, length, 8))
        check_refusals(layer, length, 8)


def test_multi_axis_reaches_everything_where_the_window_is_at_least_the_stride():
    assert reached(jitter(MultiAxis(4, 2, (4, 4), window=2, conv=False)), 16, 4).all()
    short = reached(jitter(MultiAxis(4, 2, (8, 8), window=2, conv=False)), 64, 4)
    # Along an axis of 8, windows of 2 and then every 4th coordinate: 2 windows, 4 of 8. A second block adds nothing.
    assert short.sum(1).unique().tolist() == [16]
    twice = nn.Sequential(*(jitter(MultiAxis(4, 2, (8, 8), window=2, conv=False), i) for i in range(2)))
    assert torch.equal(reached(twice, 64, 4), short)


def test_dual_attention_reaches_everything_in_one_pair():
    layer = jitter(DualAttention(4, 2, (5, 6), window=3, conv=False))
    assert reached(layer, 30, 4).all()
    assert not reached(layer.spatial, 30, 4).all()


def test_convolutions_cross_the_borders_of_windows():
    """Why window-only models with convolutions are not blind."""
    plain, conv = (jitter(DualAttention(4, 2, (4, 4), window=2, conv=c)).spatial for c in (False, True))
    grid = plain.mixer.grid
    index = torch.arange(16)
    windows = grid.allows(index[:, None], index[None])
    assert torch.equal(reached(plain, 16, 4), windows)
    assert (reached(conv, 16, 4) & ~windows).any()


def test_mbconv_is_timms():
    import_timm()
    from timm.models.maxxvit import MaxxVitConvCfg, MbConvBlock

    torch.manual_seed(0)
    cfg = MaxxVitConvCfg(act_layer="gelu", norm_eps=1e-5, expand_output=True)
    theirs = MbConvBlock(8, 8, cfg=cfg)
    jitter(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    theirs.eval()
    ours = MBConv(8).eval()
    with torch.no_grad():
        ours.norm.load_state_dict(theirs.pre_norm.state_dict())
        ours.widen[0].load_state_dict(theirs.conv1_1x1.state_dict())
        ours.widen[1].load_state_dict(theirs.norm1.state_dict())
        ours.mix[0].load_state_dict(theirs.conv2_kxk.state_dict())
        ours.mix[1].load_state_dict(theirs.norm2.state_dict())
        ours.narrow.load_state_dict(theirs.conv3_1x1.state_dict())
        for mine, other in ((ours.gate.squeeze, theirs.se.fc1), (ours.gate.excite, theirs.se.fc2)):
            mine.weight.copy_(other.weight.flatten(1))
            mine.bias.copy_(other.bias)
        x = torch.randn(2, 8, 5, 7)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_dual_blocks_are_timms_davit_where_windows_fill_the_map():
    import_timm()
    from timm.models import davit

    torch.manual_seed(0)
    shape, dim, heads = (4, 6), 8, 2
    spatial, channel = davit.SpatialBlock(dim, heads, window_size=2), davit.ChannelBlock(dim, heads, qkv_bias=True)
    ours = DualAttention(dim, heads, shape, window=2)
    for mine, theirs in ((ours.spatial, spatial), (ours.channel, channel)):
        jitter(theirs)
        with torch.no_grad():
            for one, other in (
                (mine.conv1.conv, theirs.cpe1.proj),
                (mine.conv2.conv, theirs.cpe2.proj),
                (mine.norm1, theirs.norm1),
                (mine.norm2, theirs.norm2),
                (mine.mixer.qkv, theirs.attn.qkv),
                (mine.mixer.proj, theirs.attn.proj),
                (mine.mlp[0], theirs.mlp.fc1),
                (mine.mlp[2], theirs.mlp.fc2),
            ):
                one.load_state_dict(other.state_dict())
    x = torch.randn(2, dim, *shape)
    with torch.no_grad():
        torch.testing.assert_close(to_map(ours(to_sequence(x)), shape), channel(spatial(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (6, 8)])
def test_phases_average_over_rolls(shape):
    torch.manual_seed(0)
    module = as_map(windowed(4, 2, shape, 2))
    x = torch.randn(2, 4, *shape)
    one, both = PhaseAverage(module, (0,)), PhaseAverage(module, (0, 1))
    assert torch.equal(one(x), module(x))
    rolled = torch.roll(module(torch.roll(x, (-1, 1), (2, 3))), (1, -1), (2, 3))
    torch.testing.assert_close(both(x), (module(x) + rolled) / 2)
    torch.testing.assert_close(PhaseAverage(module, ((0, 0), (-1, 1)))(x), both(x))
    with pytest.raises(ValueError, match="shifts must hold at least one"):
        PhaseAverage(module, ())


def test_whole_windows_are_a_phase_that_changes_nothing():
    torch.manual_seed(0)
    module = as_map(windowed(4, 2, (8, 8), 4))
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(PhaseAverage(module, (0, 4))(x), module(x))


def test_average_over_every_phase_is_equivariant():
    torch.manual_seed(0)
    layer = PhaseAverage(as_map(windowed(4, 2, (6, 6), 3)), [(a, b) for a in range(3) for b in range(3)])
    x = torch.randn(1, 4, 6, 6)
    rolled = layer(torch.roll(x, (1, 2), (2, 3)))
    torch.testing.assert_close(rolled, torch.roll(layer(x), (1, 2), (2, 3)), atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"window must divide both sides of \(4, 6\), got 4"):
        MultiAxis(8, 2, (4, 6), window=4)
    with pytest.raises(ValueError, match=r"shape must be \(height, width\)"):
        MultiAxis(8, 2, (4, 4, 4), window=2)
    with pytest.raises(ValueError, match=r"shape must be \(height, width\)"):
        DualAttention(8, 2, (4,), window=2)
    with pytest.raises(ValueError, match="kernel must be odd"):
        ConvPosition(8, (4, 4), 2)
    with pytest.raises(ValueError, match=r"window must be in 1\.\.4"):
        DualAttention(8, 2, (4, 6), window=7)
