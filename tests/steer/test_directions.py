"""Directions against the formulas, and the lenses against the model's own logits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regard
from regard.steer import directions as d
from regard.steer.lens import TunedLens, logit_lens


def rows(n, dim, seed=0, dtype=torch.float64):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_package_is_the_function():
    assert regard.steer.__name__ == "regard.steer"
    model = torch.nn.Linear(2, 2)
    with regard.steer(model, []) as session:
        model(torch.zeros(1, 2))
    assert type(session) is type(regard.intervene(model, []))


def test_mean_difference():
    a, b = rows(5, 3), rows(7, 3, 1)
    np.testing.assert_allclose(d.mean_difference(a, b), a.numpy().mean(0) - b.numpy().mean(0), atol=1e-14)
    with pytest.raises(ValueError, match=r"b must have at least one row, got shape \(0, 3\)"):
        d.mean_difference(a, b[:0])


@given(st.integers(2, 9), st.integers(1, 7), st.integers(0, 99))
def test_principal_components_are_those_of_the_covariance(n, dim, seed):
    x = rows(n, dim, seed)
    k = min(n - 1, dim)
    found = d.principal(x, k)
    assert torch.allclose(found.directions @ found.directions.T, torch.eye(k, dtype=x.dtype), atol=1e-10)
    values = np.linalg.eigvalsh(np.cov(x.numpy().reshape(n, dim), rowvar=False, ddof=0).reshape(dim, dim))[::-1]
    np.testing.assert_allclose(found.share, values[:k] / values.sum(), atol=1e-9)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_principal_refuses_more_than_there_are():
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        d.principal(rows(4, 8), 4)


@given(st.integers(2, 12), st.integers(1, 12), st.sampled_from([0.1, 1, 200]), st.integers(0, 99))
def test_ridge_solves_its_normal_equations(n, dim, alpha, seed):
    x, y = rows(n, dim, seed), rows(n, 2, seed + 1)
    fit = d.ridge(x, y, alpha)
    cx, cy = x - x.mean(0), y - y.mean(0)
    gradient = cx.T @ (cx @ fit.weight - cy) + alpha * fit.weight
    assert gradient.abs().max() < 1e-9
    assert torch.allclose(fit(x).mean(0), y.mean(0), atol=1e-10)  # the offset carries the means


def test_ridge_without_penalty_is_least_squares_of_least_norm():
    x, y = rows(4, 9), rows(4, 1, 1)
    fit = d.ridge(x, y, 0)
    assert torch.allclose(fit(x), y, atol=1e-9)
    np.testing.assert_allclose(fit.weight, np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0], atol=1e-9)
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        d.ridge(x, y, -1)


def test_gram_schmidt_keeps_the_first_direction_and_refuses_dependent_rows():
    v = rows(4, 6)
    e = d.gram_schmidt(v)
    assert torch.allclose(e @ e.T, torch.eye(4, dtype=v.dtype), atol=1e-12)
    assert torch.allclose(e[0], v[0] / v[0].norm())
    assert torch.allclose(v - d.project(v, e) @ e, torch.zeros_like(v), atol=1e-12)  # same span
    with pytest.raises(ValueError, match="row 2"):
        d.gram_schmidt(torch.stack([v[0], v[1], v[0] - 2 * v[1]]))


def test_removing_and_splitting():
    x, e = rows(5, 6), d.gram_schmidt(rows(2, 6, 1))
    out = d.remove(x, e)
    assert d.project(out, e).abs().max() < 1e-12
    around = d.remove(x, e, x.mean(0))
    assert torch.allclose(around.mean(0), x.mean(0))
    assert d.project(around - x.mean(0), e).abs().max() < 1e-12
    along, rest = d.axis_split(x, 3 * e[0])
    assert torch.allclose(along + rest, x)
    assert (rest @ e[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="axis has length 0"):
        d.axis_split(x, torch.zeros(6, dtype=x.dtype))


def test_distortion_is_zero_for_a_scaled_rotation_only():
    x = rows(6, 4)
    turn = torch.linalg.qr(rows(4, 4, 1))[0]
    assert d.distortion(x, 3 * x @ turn) < 1e-12
    assert d.distortion(x, x * torch.tensor([1.0, 5, 1, 1], dtype=x.dtype)) > 0.1
    with pytest.raises(ValueError, match="coincide"):
        d.distortion(x, x * 0)


def test_the_logit_lens_at_the_last_layer_is_the_model():
    loaded = regard.load("testbed:decoder")
    ids = torch.arange(1, 40)[None]
    last = len(regard.anatomy(loaded.model)) - 1
    site = regard.Site(last, "resid_post")
    with torch.no_grad():
        states = regard.trace(loaded.model, {"input_ids": ids}, site)[site]
        assert torch.allclose(logit_lens(loaded.model, states), loaded.model(input_ids=ids).logits, atol=1e-4)


def test_a_tuned_lens_starts_as_the_identity_and_learns_a_gain_and_a_shift():
    h = rows(400, 5, dtype=torch.float32)
    last = 1.05 * h + 0.1
    lens = TunedLens(2, 5)
    hidden = torch.stack([h, last])
    assert torch.equal(lens(hidden), hidden)
    losses = lens.fit(hidden, last, epochs=200, patience=200)
    assert losses[-1] < 0.2 * losses[0]
    assert (lens(hidden)[1] - last).abs().max() < 0.02  # the last layer keeps what it had
    with pytest.raises(ValueError, match="leaves 0 to test on"):
        TunedLens(1, 5).fit(h[None, :2], last[:2])


def test_class_directions_are_the_means_orthogonalised():
    x, labels = rows(12, 6), torch.arange(12) % 3
    common, others = d.class_directions(x, labels)
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    e1 = means.mean(0) / means.mean(0).norm()
    np.testing.assert_allclose(common[0], e1, atol=1e-12)
    first = means[1] - means[0] - ((means[1] - means[0]) @ e1) * e1
    np.testing.assert_allclose(others[0], first / first.norm(), atol=1e-12)
    assert others.shape == (2, 6)
    both = torch.cat([common, others])
    np.testing.assert_allclose(both @ both.T, np.eye(3), atol=1e-12)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        d.class_directions(x, torch.zeros(12, dtype=torch.long))


@given(st.integers(1, 6), st.integers(0, 99))
def test_the_shares_within_a_basis_and_its_complement_add_up(k, seed):
    whole = d.gram_schmidt(rows(7, 7, seed))
    x = rows(5, 7, seed + 1)
    inside, outside = d.share_within(x, whole[:k]), d.share_within(x, whole[k:])
    np.testing.assert_allclose(inside + outside, np.ones(5), atol=1e-12)
    np.testing.assert_allclose(d.share_within(whole[:1], whole[:k]), [1.0], atol=1e-12)
