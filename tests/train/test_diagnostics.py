"""Trajectories and commutators with known answers, their nulls, and the two numbers of a model's heads."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from regard.models.decoder import Decoder
from regard.train.diagnostics import (
    commutator,
    curve_like,
    flat,
    head_numbers,
    parameters_of,
    trajectory_pca,
    walk_like,
    weights,
)
from regard.watch.intervene import Site, trace


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_a_path_in_a_plane_has_two_axes_and_the_svd_agrees():
    t = torch.linspace(0, 6, 50, dtype=torch.float64)
    plane = torch.linalg.qr(normal(30, 2)).Q
    points = torch.stack([3 * t.cos(), t.sin()], 1) @ plane.T + 5
    found = trajectory_pca(points)
    assert len(found.shares) == 2
    assert found.dimension(0.999) == 2
    values = torch.linalg.svdvals(points - points.mean(0))[:2].square()
    torch.testing.assert_close(found.shares, values / values.sum())
    torch.testing.assert_close(found.axes @ found.axes.T, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found.coordinates @ found.axes + points.mean(0), points)
    assert found.basis(0.5).shape == (1, 30)


def test_a_random_walk_has_61_percent_on_its_first_axis():
    walk = walk_like(normal(400, 20_000, seed=1), seeded(2))
    shares = trajectory_pca(walk).shares
    for k in (1, 2, 3):
        assert float(shares[k - 1]) == pytest.approx(6 / (math.pi * k) ** 2, abs=0.01)


def test_the_nulls_are_like_the_trajectory_in_what_they_keep():
    points = normal(40, 300, seed=3).cumsum(0) * torch.linspace(0.1, 1, 300, dtype=torch.float64)
    steps = points.diff(dim=0).norm(dim=1)
    walk, curve = walk_like(points, seeded(1)), curve_like(points, seeded(1))
    torch.testing.assert_close(walk.diff(dim=0).norm(dim=1), steps)
    assert float(curve.diff(dim=0).norm(dim=1).sum()) == pytest.approx(float(steps.sum()))
    assert trajectory_pca(curve).dimension(1.0) == 3
    assert curve.shape == walk.shape == points.shape
    assert not torch.equal(walk, walk_like(points, seeded(2)))


def test_parts_are_named_shell_style():
    with torch.random.fork_rng():
        model = Decoder(7, 8, 2, 2)
    part = "blocks.1.attention.*_proj.weight"
    assert [n.split(".")[-2] for n in parameters_of(model, part)] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert flat(model, [part, "head.*"]).shape == (4 * 64 + 56,)
    start = weights(model)
    with torch.no_grad():
        model.blocks[1].attention.q_proj.weight += 1
        model.embed.weight.normal_()
    found = trajectory_pca([start, weights(model)], part)
    assert len(found.shares) == 1
    torch.testing.assert_close(found.axes[0].abs(), torch.cat([torch.ones(64), torch.zeros(192)]).double() / 8)


class Point(nn.Module):
    """A vector; the loss of a batch (H, c) is the quadratic ``(x - c)^T H (x - c) / 2``."""

    def __init__(self, x):
        super().__init__()
        self.near = nn.Parameter(x[:3].clone())
        self.far = nn.Parameter(x[3:].clone())

    @property
    def x(self):
        return torch.cat([self.near, self.far])


def quadratic(model, batch):
    hessian, centre = batch
    return (model.x - centre) @ hessian @ (model.x - centre) / 2


def bowl(seed):
    root = normal(6, 6, seed=seed)
    return root @ root.T, normal(6, seed=seed + 50)


@pytest.mark.parametrize(("part", "kept"), [("*", slice(0, 6)), ("far", slice(3, 6))])
def test_the_commutator_of_two_quadratics(part, kept):
    model, (a, b) = Point(normal(6, seed=9)), (bowl(1), bowl(2))
    before = model.x.detach().clone()
    g_a, g_b = a[0] @ (before - a[1]), b[0] @ (before - b[1])
    want = (0.01**2 * (b[0] @ g_a - a[0] @ g_b))[kept]
    found = commutator(model, quadratic, a, b, 0.01, part)
    torch.testing.assert_close(found.delta, want, rtol=1e-8, atol=1e-14)
    assert found.defect == pytest.approx(float(want.norm() / (1e-4 * g_a[kept].norm() * g_b[kept].norm())))
    assert torch.equal(model.x, before)
    assert all(p.grad is None for p in model.parameters())
    other = commutator(model, quadratic, b, a, 0.01, part)
    torch.testing.assert_close(other.delta, -found.delta)


def test_equal_batches_commute_and_hessians_that_share_axes_with_aligned_gradients_do():
    model, a = Point(normal(6, seed=9)), bowl(1)
    same = commutator(model, quadratic, a, a, 0.01)
    assert same.defect == 0
    assert math.isnan(same.inside(torch.eye(6)[:2]))
    diagonal = torch.diag(torch.arange(1.0, 7, dtype=torch.float64))
    twice = commutator(model, quadratic, (diagonal, a[1]), (2 * diagonal, a[1]), 0.01)
    assert twice.defect < 1e-9


def test_the_share_inside_a_span_and_that_of_a_random_one():
    found = commutator(Point(normal(6, seed=9)), quadratic, bowl(1), bowl(2), 0.01)
    one = found.delta / found.delta.norm()
    assert found.inside(one[None]) == pytest.approx(1)
    rest = torch.linalg.qr(torch.cat([one[:, None], normal(6, 5)], 1)).Q[:, 1:].T
    assert found.inside(rest) == pytest.approx(0, abs=1e-12)
    drawn = [found.inside(torch.linalg.qr(normal(6, 2, seed=s)).Q.T) for s in range(400)]
    assert np.mean(drawn) == pytest.approx(2 / 6, abs=0.03)


def test_the_numbers_of_heads_equal_the_dense_ones():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(9, 16, 2, 4)
    ids = torch.randint(9, (5, 6), generator=seeded())
    sites = [Site(layer, "weights") for layer in (0, 1)]
    found = head_numbers(model, ids)
    assert model.training
    similar, spread = [], []
    for p in (trace(model.eval(), {"ids": ids}, sites)[s].double() for s in sites):
        maps = p.transpose(0, 1).flatten(1)
        cosine = nn.functional.cosine_similarity(maps[:, None], maps[None], dim=-1)
        similar.append(float((cosine.sum() - 4) / 12))
        spread.append(float(torch.special.entr(p).sum(-1).mean((0, 2)).std(correction=0)))
    assert found["head_similarity"] == pytest.approx(np.mean(similar), rel=1e-5)
    assert found["entropy_spread"] == pytest.approx(np.mean(spread), rel=1e-4)


def test_uniform_heads_are_alike():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(9, 16, 1, 4)
    nn.init.zeros_(model.blocks[0].attention.q_proj.weight)
    found = head_numbers(model, torch.arange(8)[None])
    assert found["head_similarity"] == pytest.approx(1, abs=1e-6)
    assert found["entropy_spread"] == pytest.approx(0, abs=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="checkpoints must hold at least 2 points, got 1"):
        trajectory_pca(torch.ones(1, 3))
    with pytest.raises(ValueError, match="checkpoints must differ"):
        trajectory_pca(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        trajectory_pca(normal(4, 3)).dimension(0)
    model = Point(normal(6))
    with pytest.raises(ValueError, match=r"part must match a parameter, \['head'\] match none of near, far"):
        commutator(model, quadratic, bowl(1), bowl(2), 0.1, "head")
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        commutator(model, quadratic, bowl(1), bowl(2), 0)
    with pytest.raises(ValueError, match="got a gradient of 0"):
        commutator(model, quadratic, (torch.zeros(6, 6).double(), normal(6)), bowl(2), 0.1)
    model.drop = nn.Dropout(0.1)
    with pytest.raises(ValueError, match="model must be in eval mode, its Dropout"):
        commutator(model, quadratic, bowl(1), bowl(2), 0.1)
