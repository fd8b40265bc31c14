import pytest
import torch

from regard.layers.channel import ChannelAttention
from regard.layers.ensemble import PhaseAverage
from regard.models.vit import ViT, mixers


@pytest.mark.parametrize("mixer", sorted(mixers(4)))
def test_every_named_mixer_trains(mixer):
    torch.manual_seed(0)
    model = ViT((8, 8), [mixer], 3, channels=2, dim=8, heads=2)
    model(torch.randn(2, 2, 8, 8)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_read_outs():
    x = torch.randn(2, 3, 8, 12)
    assert ViT((8, 12), ["full"], 5, channels=3, patch=2)(x).shape == (2, 5)
    token = ViT((8, 12), ["full"], 5, channels=3, patch=2, read_out="token")
    assert token(x).shape == (2, 5, 4, 6)
    features = ViT((8, 12), ["full"], None, channels=3, patch=2, dim=16, read_out="features")
    assert features(x).shape == (2, 16, 4, 6)
    assert torch.equal(features(x), features.features(x))


def test_a_pooled_model_is_the_mean_of_its_tokens():
    torch.manual_seed(0)
    pooled = ViT((4, 4), ["full"], 3, dim=8)
    token = ViT((4, 4), ["full"], 3, dim=8, read_out="token")
    token.load_state_dict(pooled.state_dict())
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(pooled(x), token(x).mean((2, 3)))


def test_positions_move_with_the_windows():
    """A phase is the body on the rolled patches, rolled back: positions are added after the roll."""
    torch.manual_seed(0)
    model = ViT((8, 8), ["window", "window"], None, dim=8, read_out="features", phases=(2,))
    assert isinstance(model.body, PhaseAverage)
    plain = ViT((8, 8), ["window", "window"], None, dim=8, read_out="features")
    plain.load_state_dict({k.replace("body.module.", "body."): v for k, v in model.state_dict().items()})
    x = torch.randn(1, 1, 8, 8)
    rolled = torch.roll(plain(torch.roll(x, (-2, 2), (2, 3))), (2, -2), (2, 3))
    torch.testing.assert_close(model(x), rolled)


def test_any_layer_plugs_in():
    model = ViT((4, 4), ["window", lambda dim, heads, shape: ChannelAttention(dim, 4)], 2, dim=8, window=2, conv=True)
    assert isinstance(model.body.blocks[1].layer.mixer, ChannelAttention)
    assert model(torch.randn(1, 1, 4, 4)).shape == (1, 2)


def test_windows_are_watched_with_their_table():
    """The layer's own table tells the watch where its tokens stand; without it offsets are refused."""
    import regard
    from regard.watch.fold import Fold, Listed
    from regard.watch.settings import Watch

    torch.manual_seed(0)
    model = ViT((8, 8), ["grid"], 2, dim=8).eval()
    (name, layer) = next((n, m) for n, m in model.named_modules() if hasattr(m, "table"))
    x = torch.randn(2, 1, 8, 8)
    folds = {name: Fold(layer.grid, Listed(layer.table.flatten()))}
    with torch.no_grad(), regard.watch(model, statistics=Watch(("distance",), tokens=False, folds=folds)) as watched:
        model(x)
        tokens = model.body.blocks[0].layer.norm1(x_of(model, x))
        q, k, _ = layer.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    place = torch.arange(64)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~layer.grid.allows(place[:, None], place[None]), -torch.inf)
    expected = (scores.softmax(-1) * (place[:, None] - place[None]).abs()).sum((0, 2, 3))
    found = torch.from_numpy(watched.atlas["distance"].values[0]).to(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(Exception, match="folds windows or axes into the batch"):
        with torch.no_grad(), regard.watch(model, statistics=Watch(("distance",), tokens=False)):
            model(x)


def x_of(model, x):
    return (model.embed(x) + model.body.positions).flatten(2).transpose(1, 2)


def test_refusals():
    with pytest.raises(ValueError, match=r"mixers must be functions or names among .*window.*, got 'swin'"):
        ViT((8, 8), ["swin"], 2)
    with pytest.raises(ValueError, match="mixers must name at least one"):
        ViT((8, 8), [], 2)
    with pytest.raises(ValueError, match=r"patch must divide both sides of the image \(8, 8\), got 3"):
        ViT((8, 8), ["full"], 2, patch=3)
    with pytest.raises(ValueError, match="classes must be None with read_out='features'"):
        ViT((8, 8), ["full"], 2, read_out="features")
    with pytest.raises(ValueError, match=r"x must be images of \(8, 8\), got \(8, 4\)"):
        ViT((8, 8), ["full"], 2)(torch.randn(1, 1, 8, 4))
