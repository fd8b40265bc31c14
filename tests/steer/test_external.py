"""Independent components against planted sources and scikit-learn's; adapters against the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.steer.external import external_axes, fit_adapter, ica


def planted(n=800, sensors=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, generator=g, dtype=torch.float64)
    flag = (torch.rand(n, generator=g) < 0.5).double()
    long = -(1 - torch.rand(n, generator=g, dtype=torch.float64)).log()
    sources = torch.stack([uniform, flag, long], 1)
    return sources, sources @ torch.randn(3, sensors, generator=g, dtype=torch.float64)


def match(found, sources):
    both = np.corrcoef(found.numpy().T, sources.numpy().T)
    return np.abs(both[: found.shape[1], found.shape[1] :]).max(0)


@given(st.integers(0, 20))
def test_planted_sources_are_found_up_to_order_and_sign(seed):
    sources, x = planted(seed=seed)
    found = ica(x, 3, seed)
    assert found.converged
    assert match(found.axes, sources).min() > 0.95
    np.testing.assert_allclose(found.axes.T @ found.axes / len(x), np.eye(3), atol=1e-9)
    np.testing.assert_allclose((x - x.mean(0)) @ found.unmixing.T, found.axes, atol=1e-9)


def test_it_is_the_fixed_point_of_scikit_learn():
    from sklearn.decomposition import FastICA

    _, x = planted()
    theirs = FastICA(3, whiten="unit-variance", tol=1e-10, max_iter=1000, random_state=0).fit_transform(x.numpy())
    assert match(ica(x, 3).axes, torch.from_numpy(theirs)).min() > 1 - 1e-6


def test_the_start_changes_nothing_but_rounding():
    _, x = planted()
    assert match(ica(x, 3, seed=1).axes, ica(x, 3, seed=2).axes).min() > 1 - 1e-6


def test_sensors_of_any_unit_count_alike():
    sources, x = planted()
    axes = external_axes(x * torch.logspace(-6, 6, 12, dtype=torch.float64), 3)
    assert match(axes, sources).min() > 0.95
    np.testing.assert_allclose(match(axes, external_axes(x, 3)), np.ones(3), atol=1e-6)
    with pytest.raises(ValueError, match="sensor 1 is constant"):
        external_axes(torch.stack([x[:, 0], torch.ones(len(x), dtype=x.dtype)], 1), 1)


def test_more_components_than_directions_are_refused():
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        ica(planted()[1], 4)


def test_an_adapter_reads_and_its_direction_raises_what_it_reads():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 10, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, 10, dtype=torch.float64)
    axes = hidden @ torch.randn(10, 2, generator=g, dtype=torch.float64) + 5
    reader = fit_adapter(hidden, axes, 1e-6)
    np.testing.assert_allclose(reader(hidden), axes, atol=1e-5)
    np.testing.assert_allclose(reader.r2(hidden, axes), np.ones(2), atol=1e-9)
    for k in range(2):
        moved = reader(hidden + 0.5 * reader.direction(k)) - reader(hidden)
        np.testing.assert_allclose(moved[:, k], 0.5 * reader.weight[:, k].norm().item(), atol=1e-9)
    shuffled = axes[torch.randperm(300, generator=g)]
    assert fit_adapter(hidden[:150], shuffled[:150], 1.0).r2(hidden[150:], shuffled[150:]).max() < 0.1
    with pytest.raises(ValueError, match="dimension 0 is constant"):
        fit_adapter(torch.ones(4, 1), torch.ones(4, 1), 1)
