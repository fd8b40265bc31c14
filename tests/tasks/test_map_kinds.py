"""Maps by kind: blocks of the weights between patches, alike in brightness; codes that training shapes; clusters."""

import pytest
import torch
from torch import nn

from regard.tasks import vision, vit
from regard.tasks.map_kinds import LATENT, SIDE, autoencoder, clustered, codes, patch_maps
from regard.watch.intervene import Site, trace


@pytest.fixture(scope="module")
def made():
    """An untrained ViT, three digits and their maps."""
    with torch.random.fork_rng():
        model = vit.build(vit.SIZES["smoke"], 0).eval()
    inputs = {"pixel_values": vision.normalised(vision.digits("test").x[:3])}
    return model, inputs, patch_maps(model, inputs)


def test_maps_are_blocks_of_the_weights_between_patches(made):
    model, inputs, maps = made
    assert maps.shape == (2 * 2 * 3, 1, SIDE, SIDE)
    torch.testing.assert_close(maps.flatten(1).mean(1), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.flatten(1).std(1), torch.ones(12))
    weights = trace(model, inputs, Site(1, "weights"))[Site(1, "weights")]
    blocks = weights[2, 1, 1:, 1:].view(32, 2, 32, 2).mean((1, 3))
    expected = (blocks - blocks.mean()) / blocks.std()
    torch.testing.assert_close(maps[1 * 6 + 1 * 3 + 2, 0], expected, atol=1e-4, rtol=1e-4)  # layer 1, head 1, image 2


def test_flat_maps_are_refused(made):
    model, inputs, _ = made
    with torch.no_grad(), pytest.raises(ValueError, match="flat maps"):
        patch_maps(_flat(model), inputs)


def _flat(model):
    import copy

    other = copy.deepcopy(model)
    for name, p in other.named_parameters():
        if ".attention." in name and ("query" in name or "q_proj" in name):
            nn.init.zeros_(p)
    return other


def test_codes_come_from_the_seed_and_training_lowers_the_error(made):
    _, _, maps = made
    found = codes(maps, 1, steps=3)
    assert found.shape == (12, LATENT)
    assert torch.equal(found, codes(maps, 1, steps=3))
    assert not torch.equal(found, codes(maps, 2, steps=3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        both = autoencoder()
    assert both(maps).shape == maps.shape


def test_clusters_of_points_that_lie_apart():
    points = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(k)) + 30 * k for k in range(3)])
    found = clustered(points, 0, kinds=3)
    assert [len(set(part.tolist())) for part in found.split(20)] == [1, 1, 1]
    assert len(set(found.tolist())) == 3
