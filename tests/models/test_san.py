"""The self-attention network against the formula, its rollout against explicit products."""

import pytest
import torch

from regard.layers.alibi import Alibi
from regard.layers.position import Rope
from regard.models.san import SAN
from regard.patterns import Causal, Full, Window
from tests.oracles import san as oracle


def made(depth=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SAN(8, 5, depth, **options).double()
        with torch.no_grad():
            for layer in model.layers:  # sharper than at birth, so that weights differ
                layer.q_proj.weight *= 4
        x = torch.randn(2, 7, 8, dtype=torch.float64)
    return model, x


def parts(model):
    layers = [(y.q_proj.weight.detach(), y.k_proj.weight.detach(), y.v_proj.weight.detach()) for y in model.layers]
    head = [(y.weight.detach(), y.bias.detach()) for y in model.head if isinstance(y, torch.nn.Linear)]
    return layers, head


@pytest.mark.parametrize("pattern", [Causal(), Window(2), Full(), None])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("slope", [None, 0.3])
def test_logits_and_rollout_are_the_formula(pattern, residual, slope):
    model, x = made(pattern=pattern, residual=residual, position=None if slope is None else lambda: Alibi(slope))
    rules = {None: lambda i, j: True, Full(): lambda i, j: True, Causal(): lambda i, j: j <= i}
    allows = rules.get(pattern, lambda i, j: i - 2 <= j <= i)
    logits, shares = model(x), model.rollout(x)
    assert shares.shape == (3, 2, 7, 7)
    for b in range(2):
        bias = (lambda i, j: 0.0) if slope is None else (lambda i, j: -slope * abs(i - j))
        want, products = oracle.run(x[b], *parts(model), allows, bias, residual)
        torch.testing.assert_close(logits[b], want)
        torch.testing.assert_close(shares[:, b], torch.stack(products))


def test_rollout_with_a_residual_mixes_the_identity_in():
    model, x = made()
    plain, mixed = model.rollout(x), model.rollout(x, residual=0.5)
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(mixed[0], 0.5 * eye + 0.5 * plain[0])
    torch.testing.assert_close(mixed.sum(-1), torch.ones(3, 2, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="residual must be in"):
        model.rollout(x, residual=1.5)


def test_positions_by_rotation_reach_the_weights():
    plain, x = made()
    turned, _ = made(position=lambda: Rope(8))
    turned.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(x), turned(x))
    # distances alone count: without a mask, and on equal vectors, every row is the same up to its place
    same = torch.ones(1, 5, 8, dtype=torch.float64)
    model, _ = made(depth=1, position=lambda: Rope(8), pattern=Window(1))
    share = model.rollout(same)[0, 0]
    torch.testing.assert_close(share[1, 0], share[4, 3])


def test_without_mask_and_positions_order_is_unknown():
    model, x = made(pattern=None)
    order = [3, 0, 5, 1, 4, 2, 6]
    torch.testing.assert_close(model(x[:, order]), model(x))


def test_every_weight_is_trained():
    model, x = made()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"outputs": 0}, {"mlp": -1}])
def test_errors_name_the_argument(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        SAN(**{"dim": 4, "outputs": 2, "depth": 1, **wrong})
