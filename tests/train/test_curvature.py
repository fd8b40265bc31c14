"""Curvature: factors against sums token by token, labels the model's own, the mask against a sort, the edit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regard.models.decoder import Decoder
from regard.train.curvature import components, curvature_edit, kfac, top_products
from tests.oracles import curvature as oracle

NAMES = ["blocks.0.mlp.down_proj", "blocks.1.mlp.gate_proj"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(11, 8, 2, 2, hidden=12).double().eval()


IDS = torch.randint(11, (3, 7), generator=seeded())
VALID = torch.ones(3, 7, dtype=torch.bool)
VALID[0, :2] = VALID[1, 5:] = False


def counted(valid):
    return [(r, p) for r in range(3) for p in range(6) if valid[r, p] and valid[r, p + 1]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_factors_are_the_sums_over_tokens(model, masked, frozen):
    valid = VALID if masked else torch.ones_like(VALID)
    model.requires_grad_(not frozen)
    batches = [(IDS[:1], valid[:1]), (IDS[1:], valid[1:])] if masked else [IDS[:2], IDS[2:]]
    found = kfac(model, NAMES, batches, sample_labels=False)
    assert all(p.grad is None for p in model.parameters())
    labels = torch.cat([IDS[:, 1:], IDS[:, :1]], 1)
    for name in NAMES:
        A, G = oracle.factors(model, model.get_submodule(name), IDS, labels, counted(valid))
        assert found[name].rows == len(counted(valid))
        torch.testing.assert_close(found[name].A, A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[name].G, G, rtol=1e-9, atol=1e-12)


def test_labels_are_drawn_from_the_model(model):
    """The head's g is p - onehot(y): with y ~ p its second moment is diag(p) - p p^T, with gold labels it is not."""
    ids = IDS[:1, :2]  # one token that predicts, again and again
    with torch.no_grad():
        p = model(ids)[0, 0].softmax(-1)
    many = kfac(model, ["head"], [ids.expand(4000, 2)], generator=seeded(1))["head"]
    fisher = torch.diag(p) - torch.outer(p, p)
    assert float((many.G - fisher).norm() / fisher.norm()) < 0.05
    gold = kfac(model, ["head"], [ids.expand(4000, 2)], sample_labels=False)["head"]
    assert float((gold.G - fisher).norm() / fisher.norm()) > 0.5
    again = kfac(model, ["head"], [ids.expand(4000, 2)], generator=seeded(1))["head"]
    assert torch.equal(many.G, again.G)


def test_the_quadratic_form_is_the_loss_s_curvature():
    """A linear model has one layer: A (x) G of one input is the Hessian of its loss, exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = nn.Linear(5, 3, bias=False).double()
    x = torch.randn(5, generator=seeded(2), dtype=torch.float64)

    def loss(weight):
        return -(weight.view(3, 5) @ x).log_softmax(-1)[1]

    hessian = torch.autograd.functional.hessian(loss, head.weight.detach().flatten())
    p = (head.weight.detach() @ x).softmax(-1)
    G = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(torch.kron(G, torch.outer(x, x)), hessian)
    model = nn.Sequential(nn.Embedding.from_pretrained(x[None].expand(3, 5)), head).eval()
    ids = torch.zeros(3000, 2, dtype=torch.long)
    found = kfac(model, ["1"], [ids], generator=seeded(3))["1"]
    torch.testing.assert_close(found.A, torch.outer(x, x))
    assert float((found.G - G).norm() / G.norm()) < 0.06


@given(
    out=st.lists(st.floats(0, 10).map(lambda x: round(x, 3)), min_size=1, max_size=9),
    into=st.lists(st.floats(0, 10).map(lambda x: round(x, 3)), min_size=1, max_size=9),
    rho=st.floats(0.01, 0.99),
)
def test_the_mask_holds_the_largest_products_that_reach_the_share(out, into, rho):
    out, into = (torch.tensor(x, dtype=torch.float64) for x in (out, into))
    if not out.any() or not into.any():
        return
    mask, products = top_products(out, into, rho), torch.outer(out, into)
    total = products.sum()
    assert products[mask].sum() >= rho * total * (1 - 1e-12)
    least = products[mask].min()
    assert not mask.all() or products.max() <= least or (products > 0).all()
    assert (products[~mask] <= least * (1 + 1e-12)).all()
    without = products[products > least * (1 + 1e-12)].sum()
    assert without <= rho * total * (1 + 1e-12)  # the smallest products kept are needed


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_the_mask_equals_a_sort_of_every_product(rho):
    out, into = (torch.rand(n, generator=seeded(n), dtype=torch.float64).pow(3) for n in (13, 17))
    out[3] = into[5] = 0
    assert torch.equal(top_products(out, into, rho), oracle.mask(out, into, rho))


def test_equal_products_go_together():
    assert top_products(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), 0.3).all()
    assert top_products(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), 0.5).tolist() == [[True] * 2, [False] * 2]


def test_the_edit_keeps_everything_at_one_and_the_largest_below():
    generator = seeded(5)
    weight = torch.randn(6, 9, generator=generator)
    x, g = torch.randn(40, 9, generator=generator), torch.randn(4, 6, generator=generator)  # G has rank 4
    A, G = (x.T @ x / 40).double(), (g.T @ g / 4).double()
    assert torch.equal(curvature_edit(weight, A, G, 1), weight)
    turned, turn_out, turn_in, lam, mu = components(weight, A, G)
    torch.testing.assert_close(turn_out @ turned @ turn_in.T, weight.double())
    for rho in (0.3, 0.7, 0.9):
        kept = oracle.mask(lam, mu, rho)
        assert not kept.all()
        again = components(curvature_edit(weight.double(), A, G, rho), A, G)[0]
        torch.testing.assert_close(again, turned * kept)
    assert curvature_edit(weight, A, G, 0.7).dtype == weight.dtype
    # What leaves does least to the outputs, weighted by curvature: less than as many random components.
    kept = top_products(lam, mu, 0.9)
    drawn = torch.rand(kept.shape, generator=generator, dtype=torch.float64).flatten().argsort()
    other = torch.zeros(kept.numel(), dtype=torch.bool).index_fill_(0, drawn[: int(kept.sum())], True).view_as(kept)
    products = torch.outer(lam, mu)
    assert (products * turned.square())[~kept].sum() < (products * turned.square())[~other].sum()


def test_refusals(model):
    with pytest.raises(ValueError, match=r"modules must name nn.Linear modules of the model, 'blocks.0.mlp' is SwiGlu"):
        kfac(model, ["blocks.0.mlp"], [IDS], generator=seeded())
    with pytest.raises(ValueError, match="'nowhere' is no such module"):
        kfac(model, ["nowhere"], [IDS], generator=seeded())
    with pytest.raises(ValueError, match="generator must be given"):
        kfac(model, NAMES, [IDS])
    with pytest.raises(ValueError, match="model must be in eval mode"):
        kfac(model.train(), NAMES, [IDS], generator=seeded())
    model.eval()
    with pytest.raises(ValueError, match="batches must hold a token to predict"):
        kfac(model, NAMES, [(IDS, torch.zeros_like(VALID))], generator=seeded())
    model.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'idle' does not run"):
        kfac(model, ["idle"], [IDS], generator=seeded())
    with pytest.raises(ValueError, match="'head' runs again"):
        kfac(model, ["head"], [IDS], generator=seeded(), logits=lambda m, ids: m(ids) + m(ids))
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\], got 0"):
        top_products(one, one, 0)
    with pytest.raises(ValueError, match="into must be non-negative and not all 0"):
        top_products(one, -one, 0.5)
    with pytest.raises(ValueError, match=r"A must be \[3, 3\] for \(2, 3\), got \(2, 2\)"):
        components(torch.ones(2, 3), torch.eye(2), torch.eye(2))
