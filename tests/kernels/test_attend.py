"""Every backend of `attend` against the float64 oracle: outputs, lse and gradients; and what is refused."""

import inspect

import pytest
import torch
from hypothesis import given

from regard.kernels import attend as attend_module
from regard.kernels.attend import BACKENDS, attend, choose
from regard.kernels.normalize import Elementwise, Normalizer
from regard.kernels.request import make_request
from regard.patterns import Causal, Columns, Neighborhood, Window, per_head, per_sample
from tests.kernels.calls import TOLERANCE, calls, oracle_arguments
from tests.oracles.attention import attended

HERE = [name for name in BACKENDS if name != "flex"]  # flex compiles: tests/kernels/test_flex.py
HALVES = (torch.float16, torch.bfloat16)


def near(got, want, tolerance):
    """Largest error relative to the largest value; -inf where the oracle has it."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    finite = want > -torch.inf
    if bool(finite.any()):
        error = (got[finite] - want[finite]).abs().max() / want[finite].abs().max().clamp(min=1)
        assert error <= tolerance, f"error {error:.1e}"


def judge(drawn, name, gradients):
    """Run a drawn call on a backend and on the oracle, or see it refused."""
    dtype = drawn.q.dtype
    lse_too = not drawn.oracle or drawn.kwargs["normalize"].has_lse()
    mine = {n: x.detach().clone().requires_grad_(gradients) for n, x in drawn.inputs.items()}
    mine["q"] = mine["q"].transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_(gradients)
    kwargs = {n: mine.get(n, x) for n, x in drawn.kwargs.items()}
    request = make_request(mine["q"], mine["k"], mine["v"], drawn.pattern, return_lse=lse_too, **kwargs)
    why = attend_module.backend(name).refuses(request)
    call = {"return_lse": lse_too, "backend": name, **kwargs}
    if why is not None and not request.empty:
        assert name != "reference"
        with pytest.raises(ValueError, match="refuses this call"):
            attend(mine["q"], mine["k"], mine["v"], drawn.pattern, **call)
        return False
    found = attend(mine["q"], mine["k"], mine["v"], drawn.pattern, **call)
    out, lse = found if lse_too else (found, None)
    assert out.dtype == dtype
    its = {n: x.detach().double().requires_grad_(gradients) for n, x in drawn.inputs.items()}
    rest = {n: its.get(n, x) for n, x in oracle_arguments(drawn).items()}
    want, want_lse = attended(its["q"], its["k"], its["v"], drawn.pattern, **rest)
    near(out, want, TOLERANCE[dtype])
    if lse is not None:
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        near(lse, want_lse, TOLERANCE[dtype])
    if gradients and out.numel():
        g = torch.Generator().manual_seed(0)
        weight, extra = torch.randn(out.shape, generator=g), torch.randn(out.shape[:3], generator=g)
        loss, target = (out.double() * weight).sum(), (want * weight).sum()
        if lse is not None:  # the lse has gradients of its own
            loss = loss + (torch.where(lse > -torch.inf, lse, 0).double() * extra).sum()
            target = target + (torch.where(want_lse > -torch.inf, want_lse, 0) * extra).sum()
        loss.backward()
        target.backward()
        for n in mine:
            got = torch.zeros_like(mine[n]) if mine[n].grad is None else mine[n].grad
            expected = torch.zeros_like(its[n]) if its[n].grad is None else its[n].grad
            assert bool(got.isfinite().all()), f"gradient of {n} is not finite"
            near(got, expected, 10 * TOLERANCE[dtype])
    return True


@pytest.mark.parametrize("name", HERE)
@given(drawn=calls())
def test_forward_and_lse(name, drawn):
    judge(drawn, name, gradients=False)


@pytest.mark.parametrize("name", HERE)
@given(drawn=calls())
def test_gradients(name, drawn):
    judge(drawn, name, gradients=True)


@pytest.mark.parametrize("name", HERE)
@given(drawn=calls(dtypes=(*HALVES, torch.float64), dims=(8, 64)))
def test_other_dtypes(name, drawn):
    judge(drawn, name, gradients=True)


@pytest.mark.parametrize("name", HERE)
@given(drawn=calls(dtypes=(torch.float32, torch.float64), normalisers=True, dims=(8, 32)))
def test_normalisers(name, drawn):
    judge(drawn, name, gradients=True)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("needs", ["q", "k", "v"])
def test_one_gradient_alone(name, needs):
    """A frozen input gets none, the others are as with all of them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 4, 70, 16, generator=g), *torch.randn(2, 1, 2, 90, 16, generator=g)
    tensors = {"q": q, "k": k, "v": v}
    tensors[needs].requires_grad_()
    attend(q, k, v, Window(9), backend=name).square().sum().backward()
    mine = {n: x.detach().double().requires_grad_(n == needs) for n, x in tensors.items()}
    attended(*mine.values(), Window(9))[0].square().sum().backward()
    near(tensors[needs].grad, mine[needs].grad, 1e-4)
    assert all(x.grad is None for n, x in tensors.items() if n != needs)


# -- arguments ---------------------------------------------------------------------------------------------------------

CHECKED = inspect.unwrap(make_request)
T = torch.zeros


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"q": T(4, 5, 8)}, r"q must be a tensor \[batch, heads, q_len, head_dim\], got torch.float32 \[4, 5, 8\]"),
        ({"k": T(1, 2, 6, 8, dtype=torch.int64)}, "k must be floating point, got torch.int64"),
        ({"v": T(1, 2, 6, 8, dtype=torch.float64)}, "q, k and v must share dtype and device, got q torch.float32"),
        ({"k": T(1, 2, 6, 7)}, "k must have q's batch 1 and head_dim 8"),
        ({"v": T(1, 2, 7, 8)}, "v must have k's batch, kv_heads and kv_len"),
        ({"k": T(1, 3, 6, 8), "v": T(1, 3, 6, 8)}, "number of heads that divides the 4 of q, got 3"),
        ({"pattern": T(5, 6)}, "pattern must be a regard Pattern or None, got Tensor; an additive mask goes to bias="),
        ({"pattern": per_head([Causal()] * 3)}, "pattern is one of 3 heads, got q with 4"),
        ({"pattern": per_sample([Causal()] * 2)}, "pattern is one of 2 samples, got q with 1"),
        ({"pattern": Neighborhood((2, 3), (1, 1))}, "6"),
        ({"q_start": 1.0}, "q_start must be an integer"),
        ({"bias": T(5, 6, dtype=torch.bool)}, "bias must be a floating tensor"),
        ({"bias": T(3, 6)}, r"bias must broadcast to \[batch, heads, q_len, kv_len\] = \[1, 4, 5, 6\]"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"softcap": -1.0}, "softcap must be a number > 0"),
        ({"sink": T(3)}, r"sink must be a floating tensor \[heads\] = \[4\]"),
        ({"sink": T(4), "normalize": Elementwise("relu")}, "sink is one more logit of the softmax"),
        ({"normalize": "softmax"}, "normalize must be a Normalizer"),
        ({"normalize": Elementwise("identity"), "return_lse": True}, "has no log of a row's sum"),
        ({"layout": Causal().layout(8, 8, 4)}, "layout must be the pattern's BlockLayout with q_len 5, kv_len 6"),
    ],
)
def test_arguments_are_told(given_, message):
    call = {"q": T(1, 4, 5, 8), "k": T(1, 2, 6, 8), "v": T(1, 2, 6, 8), **given_}
    with pytest.raises(ValueError, match=message):
        CHECKED(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_unknown_backend():
    x = T(1, 1, 4, 8)
    with pytest.raises(ValueError, match="backend must be one of auto, reference"):
        attend(x, x, x, backend="fast")
    with pytest.raises(ValueError, match="backend must be one of auto"):
        attend(x[:0], x[:0], x[:0], backend="fast")


@pytest.mark.parametrize(("phi", "shift", "message"), [("gelu", 0.0, "phi must be one of exp"), ("exp", "n", "shift")])
def test_elementwise_is_checked(phi, shift, message):
    with pytest.raises(ValueError, match=message):
        Elementwise(phi, shift)


# -- empty and auto ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", *HERE])
@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_nothing_to_do(name, shape):
    """No sample, no query or no key: zeros and -inf, and gradients that are zeros."""
    batch, heads, q_len, kv_len = shape
    q = T(batch, heads, q_len, 8).requires_grad_()
    k = T(batch, 1, kv_len, 8).requires_grad_()
    out, lse = attend(q, k, k, Window(3), q_start=0, return_lse=True, backend=name)
    assert out.shape == (batch, heads, q_len, 8)
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None
    assert not bool(q.grad.any() or k.grad.any())


class Hardmax(Normalizer):
    """All weight on the largest score: needs whole rows."""

    tier = "rows"

    def weights(self, scores, allow, n=None):
        best = scores.masked_fill(~allow, -torch.inf).argmax(-1, keepdim=True)
        return torch.zeros_like(scores).scatter_(-1, best, 1.0) * allow, None

    def has_lse(self):
        return False


def test_auto_never_takes_the_dense_backend_for_a_large_call():
    """Where nothing else takes the call it says so; a small one is computed."""

    q = T(1, 1, 9000, 8)
    with pytest.raises(ValueError, match='backend="reference" does it all the same, in about'):
        choose(make_request(q, q, q, Causal(), normalize=Hardmax()))
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    name, left = choose(make_request(q, k, v, Causal(), normalize=Hardmax()))
    assert name == "reference"
    assert set(left) == {"blocked", "flex"}
    best = (q @ k.mT).masked_fill(~torch.ones(50, 50).tril().bool(), -torch.inf).argmax(-1)
    near(attend(q, k, v, Causal(), normalize=Hardmax()), v.gather(2, best[..., None].expand(-1, -1, -1, 8)), 0)


def test_autocast_does_not_reach_inside():
    """attend computes in the dtype of q, whatever autocast says."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=g)
    want = attend(q, k, v, Causal(), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        for name in HERE:
            near(attend(q, k, v, Causal(), backend=name), want, 1e-5)


def test_a_sink_takes_its_share():
    """One more logit, no value: out and lse by hand."""
    q, k, v = T(1, 1, 2, 4), T(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    out, lse = attend(q, k, v, Columns(((0, 3),)), sink=torch.tensor([0.0]), return_lse=True, q_start=0)
    near(out, torch.full((1, 1, 2, 4), 3 / 4), 1e-6)
    near(lse, torch.full((1, 1, 2), 4.0).log(), 1e-6)
