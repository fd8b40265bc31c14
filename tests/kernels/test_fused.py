"""Statistics by fused kernels against dense float64 attention, and their memory."""

from inspect import unwrap  # the shape checks of the tests would answer first

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from regard.kernels import stats
from regard.patterns import Window
from tests.kernels.problems import assert_close, problems
from tests.oracles import attention as oracle


@given(problems(normaliser=False), st.integers(1, 21), st.booleans())
def test_row_expectation(problem, count, per_head):
    q, k, kwargs, _, g = problem
    shape = (k.shape[0], k.shape[1], k.shape[2], count) if per_head else (k.shape[2], count)
    features = torch.randn(shape, generator=g)
    weights, lse, _ = oracle.attention(q, k, **kwargs)
    got, got_lse = stats.row_expectation(q, k, features, **kwargs)
    wide = features.double()
    wide = wide.repeat_interleave(q.shape[1] // k.shape[1], 1) if per_head else wide
    assert_close(got, weights @ wide)
    assert_close(got_lse, lse)


@given(problems())
def test_row_entropy(problem):
    q, k, kwargs, _, _ = problem
    weights, lse, _ = oracle.attention(q, k, **kwargs)
    mass = None
    if "sink" in kwargs:
        mass = torch.where(lse == -torch.inf, 0.0, (kwargs["sink"].double()[None, :, None] - lse).exp())
    assert_close(stats.row_entropy(q, k, **kwargs), oracle.entropy(weights, mass), 2e-5)


@given(problems(normaliser=False, lengths=st.integers(1, 80)), st.booleans(), st.integers(1, 5))
def test_column_mass(problem, backward, columns):
    q, k, kwargs, _, g = problem
    w = torch.randn(q.shape[0], q.shape[2], columns, generator=g)
    weights, _, _ = oracle.attention(q, k, **kwargs)
    got = stats.column_mass(q, k, w, backward=backward, **kwargs)
    assert_close(got, torch.einsum("bqc,bhqk->bhck", w.double(), weights))


def test_backward_keeps_the_heads_of_a_group_apart():
    """The gradient for v adds the heads of a group; column g of the value must belong to head g alone."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 9, 8, generator=g), torch.randn(1, 2, 9, 8, generator=g)
    got = stats.column_mass(q, k, torch.ones(1, 9, 1), backward=True, is_causal=True)
    assert_close(got.sum(-1), torch.full((1, 4, 1), 9.0))
    assert (got[:, 0] - got[:, 1]).abs().max() > 0.1


class Largest(TorchDispatchMode):
    """The largest tensor made while it is on."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("name", ["expectation", "entropy", "column", "tiles"])
def test_memory_grows_with_the_length(name):
    """No tensor of L x L numbers, and twice the length makes nothing more than twice as large."""
    largest = {}
    for length in (2048, 4096):
        g = torch.Generator().manual_seed(0)
        q, k = torch.randn(1, 2, length, 16, generator=g), torch.randn(1, 1, length, 16, generator=g)
        ones = torch.ones(1, length, 1)
        with Largest() as seen:
            if name == "expectation":
                stats.row_expectation(q, k, torch.arange(length)[:, None].float(), is_causal=True)
            elif name == "entropy":
                stats.row_entropy(q, k, is_causal=True)
            elif name == "column":
                stats.column_mass(q, k, ones, is_causal=True, backward=True)
            else:
                stats.tile_pass(q, k, [stats.Entropy(), stats.Columns(ones), stats.Offsets(0, length)], is_causal=True)
        largest[length] = seen.numel
    assert largest[4096] < 4096 * 4096 / 8
    assert largest[4096] <= 2 * largest[2048]


def test_pattern_and_mask_stay_small_too():
    length = 4096
    q = torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        stats.row_expectation(q, q, torch.ones(length, 1), pattern=Window(64), is_causal=True)
    assert seen.numel <= 1 << 22


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: unwrap(stats.row_expectation)(q, k, torch.zeros(5, 1)), "features must have kv_len = 6"),
        (lambda q, k: unwrap(stats.row_expectation)(q, k, torch.full((6, 1), torch.nan)), "features holds NaN"),
        (lambda q, k: unwrap(stats.row_entropy)(q * torch.nan, k), "q holds NaN"),
        (lambda q, k: unwrap(stats.column_mass)(q, k, torch.zeros(1, 4, 2)), "row_weights must be"),
        (
            lambda q, k: unwrap(stats.column_mass)(q[..., :1], k[..., :1], torch.zeros(1, 5, 2), backward=True),
            "head_dim >= heads",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 4, 5, 8, generator=g), torch.randn(1, 2, 6, 8, generator=g))


def test_inputs_whose_rows_do_not_lie_together_in_memory():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 16, 8, generator=g)
    features = torch.randn(16, 3, generator=g)
    turned = [x.mT.contiguous().mT for x in (q, k)]
    for mine, its in zip(stats.row_expectation(*turned, features), stats.row_expectation(q, k, features), strict=True):
        assert torch.equal(mine, its)
    torch.testing.assert_close(stats.row_entropy(*turned), stats.row_entropy(q, k))
