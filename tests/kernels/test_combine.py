"""Merging attentions over disjoint keys is attention over all of them, in gradients too."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.combine import complete, gate, merge
from regard.kernels.normalize import Elementwise
from regard.patterns import Causal, Columns, Full, Window
from tests.oracles.attention import attended

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def finite(lse):
    return torch.where(lse > -torch.inf, lse, 0)


@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([Full(), Causal(), Window(4), Window(3) & ~Columns(((0, 9),))]),
    st.sampled_from([None, Elementwise("softplus"), Elementwise("relu")]),
)
def test_merged_parts_are_the_whole(seed, length, parts, dtype, pattern, normalize):
    """Keys dealt to some parts at random; rows that see no key of a part, or none at all, are among them."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, length, 8, generator=g)
    k, v = torch.randn(2, 2, 1, length, 8, generator=g)
    if normalize is not None:
        dtype = torch.float64
    mine = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    its = [x.detach().double().requires_grad_() for x in mine]
    home = torch.randint(0, parts, (length,), generator=g)
    done = []
    for n in range(parts):
        keys = Columns(tuple((int(j), int(j) + 1) for j in (home == n).nonzero().flatten()))
        kwargs = {} if normalize is None else {"normalize": normalize}
        done.append(attend(*mine, pattern & keys, return_lse=True, backend="reference", **kwargs))
    out, lse = merge([o for o, _ in done], [x for _, x in done])
    want, want_lse = attended(*its, pattern, phi=None if normalize is None else normalize.phi)
    assert out.dtype == dtype
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert (finite(lse) - finite(want_lse)).abs().max() <= DTYPES[dtype] * 10
    assert (out.double() - want).abs().max() <= DTYPES[dtype] * 2
    weights = torch.randn(out.shape, generator=g)
    ((out.double() * weights).sum() + finite(lse).double().sin().sum()).backward()
    ((want * weights).sum() + finite(want_lse).sin().sum()).backward()
    for a, b in zip(mine, its, strict=True):
        assert bool(a.grad.isfinite().all())
        assert (a.grad.double() - b.grad).abs().max() <= DTYPES[dtype] * 20 * max(1, float(b.grad.abs().max()))


def test_a_part_without_any_key_changes_nothing():
    """Not a bit, whatever lies in its output."""
    g = torch.Generator().manual_seed(0)
    out, lse = torch.randn(1, 2, 5, 4, generator=g), torch.randn(1, 2, 5, generator=g)
    lse[0, 0, 2] = -torch.inf
    out[0, 0, 2] = 0
    nothing = torch.full_like(lse, -torch.inf)
    got, got_lse = merge([torch.randn(out.shape, generator=g), out], [nothing, lse])
    assert torch.equal(got, out)
    assert torch.equal(got_lse, lse)


def test_gate_and_complete():
    """Sums by hand; gradients reach weights and parts."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.rand(1, 2, 3, generator=g, dtype=torch.float64, requires_grad=True)
    heads = torch.rand(2, 1, generator=g, dtype=torch.float64)
    expected = torch.stack([w[0, h, i] * a[0, h, i] + heads[h, 0] * b[0, h, i] for h in range(2) for i in range(3)])
    assert torch.allclose(gate([a, b], [w, heads]), expected.view(1, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda a, b, w: gate([a, b], [w, heads]), (a, b, w))
    assert torch.allclose(complete(a, w, b), w[..., None] * a + b)
    assert torch.autograd.gradcheck(complete, (a, w, b))


def test_completed_sparse_attention_is_dense_attention():
    """With the true mass of the pattern and what the other keys add, nothing is missing."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 8, generator=g, dtype=torch.float64)
    some, lse = attend(q, k, v, Window(3, 3), return_lse=True)
    other, other_lse = attend(q, k, v, ~Window(3, 3), return_lse=True)
    dense, total = attend(q, k, v, return_lse=True)
    rest = gate([other], [(other_lse - total).exp()])
    assert torch.allclose(complete(some, (lse - total).exp(), rest), dense)


X = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(merge)([], []), "outs and lses must be as many, at least one, got 0 and 0"),
        (lambda f: f(merge)([X, X], [X[..., 0]]), "got 2 and 1"),
        (lambda f: f(merge)([X, X[:, :1]], [X[..., 0]] * 2), r"outs must be torch.float32 of shape \[1, 2, 3, 4\]"),
        (lambda f: f(merge)([X], [X]), r"lses must be torch.float32 of shape \[1, 2, 3\]"),
        (lambda f: f(merge)([X, X.double()], [X[..., 0]] * 2), "got torch.float64"),
        (lambda f: f(gate)([X], []), "outs and weights must be as many"),
        (lambda f: f(gate)([X], [X]), r"weights\[0\] must broadcast to the rows \[1, 2, 3\], got \[1, 2, 3, 4\]"),
        (lambda f: f(complete)(X, X[..., 0], X[:, :1]), "rest must be"),
        (lambda f: f(complete)(X, torch.zeros(2), X), "kept must broadcast"),
    ],
)
def test_what_cannot_be_combined_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(inspect.unwrap)
