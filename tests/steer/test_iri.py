"""Injection against its formula: which layers, what is added, norms kept, the last token alone."""

import pytest
import torch
from torch import nn

from regard.steer.iri import Injection
from regard.watch.intervene import Site, trace
from tests.oracles.injection import inject


class Fixed(nn.Module):
    """Attention that writes what it was made with, whatever it reads, beside a call that the seam sees."""

    def __init__(self, dim, seed):
        super().__init__()
        self.written = nn.Parameter(torch.randn(5, dim, generator=torch.Generator().manual_seed(seed)).double())

    def forward(self, x):
        q = x[:, None, :, :]
        z = torch.nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return 0 * z + self.written


class Block(nn.Module):
    def __init__(self, dim, seed):
        super().__init__()
        self.attn, self.mlp = Fixed(dim, seed), nn.Linear(dim, dim).double()
        nn.init.zeros_(self.mlp.weight)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, dim=6, layers=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, s) for s in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack()


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize(("sources", "targets"), [(1, 1), (1, 3), (2, 3), (3, 4), (4, 4)])
def test_what_is_written_is_the_formula(stack, sources, targets):
    rates = torch.tensor([0.3, 0.9, 0.1, 0.6])
    sites = [Site(i, "attn_out", pos=-1) for i in range(4)]
    plain = trace(stack, X, [*sites, Site(3, "attn_out")])
    with Injection(stack, {"attn_out": rates}, sources=sources, targets=targets, lam=0.4, inputs=X):
        held = trace(stack, X, [*sites, Site(3, "attn_out")])
    wanted = inject([plain[s] for s in sites], rates, sources, targets, 0.4)
    for site, value in zip(sites, wanted, strict=True):
        torch.testing.assert_close(held[site], value)
    assert torch.equal(held[Site(3, "attn_out")][:, :-1], plain[Site(3, "attn_out")][:, :-1])
    assert torch.equal(stack(X), stack(X))


def test_nothing_changes_without_strength_or_after_closing(stack):
    plain = stack(X)
    rates = {"attn_out": torch.tensor([0.3, 0.9, 0.1, 0.6])}
    with Injection(stack, rates, sources=2, targets=4, lam=0, inputs=X):
        assert torch.equal(stack(X), plain)
    with Injection(stack, rates, sources=2, targets=4, lam={"attn_out": 0.5}, inputs=X):
        assert not torch.equal(stack(X)[:, -1], plain[:, -1])
    assert torch.equal(stack(X), plain)


def test_what_cannot_be_meant_is_refused(stack):
    good = torch.ones(4)
    for rates, how, told in (
        ({"resid_post": good}, {}, "rates must be given for parts"),
        ({}, {}, "got none"),
        ({"attn_out": torch.ones(3)}, {}, "one number a layer, 4"),
        ({"attn_out": good}, {"targets": 10}, "targets must be between 1 and the 4 layers, got 10"),
        ({"attn_out": good}, {"sources": 0}, "sources must be between"),
        ({"attn_out": good}, {"lam": {"mlp_out": 1.0}}, "lam must be given for attn_out"),
    ):
        with pytest.raises(ValueError, match=told):
            Injection(stack, rates, **{"sources": 1, "targets": 2, "inputs": X} | how)
