import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from regard.layers.biformer import BiLevelAttention
from tests.layers.contract import check_gradients, check_refusals, jitter, reached, tokens
from tests.oracles.biformer import bi_level

DIM, HEADS = 8, 2


def layer_of(shape, regions, topk, **how):
    return jitter(BiLevelAttention(DIM, HEADS, shape, regions, topk, **how))


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    regions=st.integers(1, 4),
    topk=st.integers(1, 5),
    lce=st.sampled_from([None, 3]),
    scale=st.sampled_from(["head", "dim"]),
    seed=st.integers(0, 99),
)
def test_equals_the_formula_region_by_region(shape, regions, topk, lce, scale, seed):
    layer = layer_of(shape, regions, topk, lce=lce, scale=scale).double()
    x = tokens(2, shape[0] * shape[1], DIM, seed, torch.float64)
    expected, choices = bi_level(layer, x, regions, topk, (DIM // HEADS if scale == "head" else DIM) ** -0.5)
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=1e-8)
    routed = layer.routed(x)
    assert routed.decisions == 1
    listed = [[[n for n in row if n >= 0] for row in sample[0]] for sample in routed.index.tolist()]
    assert listed == choices


def test_all_regions_are_dense_attention():
    x = tokens(2, 35, DIM)
    dense, some = layer_of((5, 7), 3, None), layer_of((5, 7), 3, 9)
    assert dense.routed(x) is None
    torch.testing.assert_close(dense(x), some(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer_of((5, 7), 3, 2)(x), dense(x), atol=1e-3)


def test_tokens_of_regions_that_were_not_picked_are_not_seen():
    layer = layer_of((6, 6), 3, 2, lce=None)
    routed = layer.double().routed(tokens(1, 36, DIM, dtype=torch.float64))
    index = torch.arange(36)
    assert torch.equal(
        reached(layer, 36, DIM), routed.allows(index[:, None], index[None]) | torch.eye(36, dtype=torch.bool)
    )


def test_the_choice_has_no_gradient_and_q_and_k_learn_all_the_same():
    layer = layer_of((4, 4), 2, 1)
    routed = layer.routed(tokens(1, 16, DIM).requires_grad_())
    assert not routed.score.requires_grad
    check_gradients(layer, tokens(2, 16, DIM))


def test_contract():
    for layer, length in ((layer_of((5, 7), 3, 2), 35), (layer_of((4, 4), 2, None), 16)):
        check_gradients(layer, tokens(2, length, DIM))
        check_refusals(layer, length, DIM)
    assert layer_of((1, 1), 7, 4)(tokens(2, 1, DIM)).isfinite().all()
    assert layer_of((4, 4), 2, 2).bfloat16()(tokens(1, 16, DIM).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("heads must be at least 1 and divide dim", {"heads": 3}),
        ("regions must be at least 1", {"regions": 0}),
        ("k must be an integer >= 1", {"topk": 0}),
        ("lce must be odd", {"lce": 4}),
        (r"shape must be \(height, width\)", {"shape": (4, 4, 4)}),
        ("scale", {"scale": "length"}),
    ],
)
def test_refusals(match, how):
    with pytest.raises((ValueError, TypeCheckError), match=match):
        BiLevelAttention(**{"dim": DIM, "heads": HEADS, "shape": (4, 6)} | how)
