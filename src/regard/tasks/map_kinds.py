"""Weight maps of image models by kind: the patches' own weights, coded by a small autoencoder, clustered."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.train.simple import fit
from regard.watch.anatomy import anatomy
from regard.watch.site import Site
from regard.watch.trace import trace

__all__ = ["LATENT", "SIDE", "clustered", "codes", "patch_maps"]

#: Blocks along a side of a map, and numbers in its code.
SIDE, LATENT = 32, 16


def patch_maps(model: nn.Module, inputs: Any, prefix: int = 1) -> Float[Tensor, "maps 1 32 32"]:
    """Maps between patches of every layer, head and image (layer-major) as 32 x 32 blocks of mean weight.

    Each is brought to mean 0 and deviation 1: how peaked a map is would else outweigh where its peaks lie. All weights
    are held at once, so this is for images of a few hundred patches. After arXiv 2303.13731.

    Args:
        model: an image model.
        inputs: as for `trace`.
        prefix: tokens before the first patch.

    Raises:
        ValueError: a map that is flat, which cannot be brought to deviation 1.
    """
    parts = anatomy(model, inputs)
    weights = torch.stack(list(trace(model, inputs, [Site(n, "weights") for n in range(len(parts))]).values()))
    between = weights[..., prefix:, prefix:].transpose(1, 2).flatten(0, 2)[:, None]
    flat = nn.functional.adaptive_avg_pool2d(between, SIDE).flatten(1).double()
    mean, deviation = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
    level = deviation < 1e-9 * mean
    if bool(level.any()):
        raise ValueError(f"model has {int(level.sum())} flat maps, which have no kind")
    return ((flat - mean) / deviation).float().view(-1, 1, SIDE, SIDE)


def autoencoder() -> nn.Sequential:
    """Three convolutions of stride 2 to a code of 16 numbers, and three transposed ones back; global generator."""
    down = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((1, 8), (8, 16), (16, 32))]
    up = [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1) for a, b in ((32, 16), (16, 8), (8, 1))]
    encoder = nn.Sequential(down[0], nn.ReLU(), down[1], nn.ReLU(), down[2], nn.ReLU(), nn.Flatten())
    encoder.append(nn.Linear(512, LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4)))
    return nn.Sequential(encoder, decoder.extend([up[0], nn.ReLU(), up[1], nn.ReLU(), up[2]]))


def codes(
    maps: Float[Tensor, "maps 1 32 32"], seed: int, *, steps: int = 800, batch: int = 64, lr: float = 1e-3
) -> Float[Tensor, "maps 16"]:
    """Codes of the maps by an `autoencoder` trained on them: squared error, Adam, from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        both = autoencoder().to(maps.device)

    def loss(module: nn.Module, some: Tensor) -> Tensor:
        return nn.functional.mse_loss(module(some), some)

    fit(both, loss, lambda g: maps[torch.randint(len(maps), (batch,), generator=g)], steps, lr, seed)
    with torch.no_grad():
        return torch.cat([both[0](part) for part in maps.split(512)])


def clustered(points: Float[Tensor, "points d"], seed: int, kinds: int = 8) -> Int[Tensor, "points"]:
    """The cluster of every point by k-means, best of four starts.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as missing:
        raise ImportError("k-means is scikit-learn's: pip install 'regard[vision]'") from missing
    found: NDArray[Any] = KMeans(kinds, n_init=4, random_state=seed).fit_predict(points.cpu().numpy())
    return torch.from_numpy(found).long()
