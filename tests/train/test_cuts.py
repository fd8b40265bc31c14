"""Cut matrices: the library's own edit, controls of the same size, a copy of the model and not the model."""

import pytest
import torch
from torch import nn

from regard.train.curvature import Factors, curvature_edit
from regard.train.cuts import Spectrum, at_random, edited, truncated


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


@pytest.fixture
def spectrum():
    x, g = normal(50, 6, seed=1), normal(50, 4, seed=2)
    return Spectrum.of(normal(4, 6), Factors(x.T @ x / 50, g.T @ g / 50, 50))


@pytest.mark.parametrize("rho", [0.3, 0.7, 1])
def test_the_cut_is_the_curvature_edit(spectrum, rho):
    A = spectrum.turn_in * spectrum.mu @ spectrum.turn_in.T
    G = spectrum.turn_out * spectrum.lam @ spectrum.turn_out.T
    torch.testing.assert_close(spectrum.cut(spectrum.top(rho)), curvature_edit(spectrum.weight, A, G, rho))


def test_everything_kept_is_the_weight_and_the_rest_is_the_rest(spectrum):
    whole = torch.ones(4, 6, dtype=torch.bool)
    torch.testing.assert_close(spectrum.cut(whole), spectrum.weight)
    mask = spectrum.top(0.6)
    torch.testing.assert_close(spectrum.cut(mask) + spectrum.cut(~mask), spectrum.weight)
    # Components are orthogonal: squares add up.
    squares = [float(spectrum.cut(m).square().sum()) for m in (mask, ~mask, whole)]
    assert squares[0] + squares[1] == pytest.approx(squares[2])


def test_random_components_are_as_many_and_others():
    mask = torch.zeros(40, 50, dtype=torch.bool)
    mask[:10] = True
    drawn = [at_random(mask, seeded(s)) for s in range(3)]
    assert all(int(d.sum()) == 500 for d in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], at_random(mask, seeded(0)))
    assert 80 < int((drawn[0] & mask).sum()) < 170  # a quarter of 500 by chance


@pytest.mark.parametrize(("share", "rank"), [(0, 1), (0.5, 3), (0.76, 5), (1, 6)])
def test_the_svd_is_the_best_of_its_rank(share, rank):
    weight = normal(9, 6, seed=3)
    found = truncated(weight, share)
    assert int(torch.linalg.matrix_rank(found)) == rank
    missed = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - found).square().sum(), missed)
    assert truncated(weight.float(), share).dtype == torch.float32
    with pytest.raises(ValueError, match="share must be in"):
        truncated(weight, 1.5)


def test_the_copy_is_edited_and_the_model_is_not():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = model[1].weight.detach().clone()
    other = edited(model, {"1": torch.zeros(2, 2)})
    assert torch.equal(model[1].weight, before)
    assert not other[1].weight.any()
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="weight of 1 must be"):
        edited(model, {"1": torch.zeros(3, 2)})
