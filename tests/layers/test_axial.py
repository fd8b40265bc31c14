import itertools

import pytest
import torch

from regard.layers.axial import AxialAttention
from tests.layers.contract import check_gradients, check_refusals, jitter, reached, tokens
from tests.oracles import layers as oracle

CASES = [
    *(((3, 5), axis, causal) for axis in (0, 1) for causal in (False, True)),
    ((2, 3, 4), 1, True),
    ((7,), 0, True),
]


def along(axis, causal):
    def allows(q, k):
        others = all(a == b for d, (a, b) in enumerate(zip(q, k, strict=True)) if d != axis)
        return others and (not causal or k[axis] <= q[axis])

    return allows


@pytest.mark.parametrize(("shape", "axis", "causal"), CASES)
def test_equals_the_loop_over_queries(shape, axis, causal):
    layer = jitter(AxialAttention(8, 2, shape, axis, causal, rel_bias=not causal)).double()
    length = torch.Size(shape).numel()
    x = tokens(2, length, 8, dtype=torch.float64)
    expected = oracle.grid_attention(
        layer, x, along(axis, causal), shape, lambda c: tuple(v if d == axis else 0 for d, v in enumerate(c))
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-9)
    check_gradients(layer, x)
    check_refusals(layer.float(), length, 8, arguments=("context", "pattern"))


@pytest.mark.parametrize(("shape", "axis", "causal"), CASES)
def test_obeys_its_pattern_exactly(shape, axis, causal):
    places = list(itertools.product(*map(range, shape)))
    expected = torch.tensor([[along(axis, causal)(q, k) for k in places] for q in places])
    assert torch.equal(reached(jitter(AxialAttention(4, 2, shape, axis, causal)), len(places), 4), expected)


@pytest.mark.parametrize(("shape", "axis"), [((4, 5), 0), ((4, 5), 1), ((2, 3, 4), 1), ((6,), 0)])
def test_stepping_along_the_axis_gives_the_numbers_of_the_whole(shape, axis):
    layer = jitter(AxialAttention(8, 2, shape, axis, causal=True))
    x = tokens(2, torch.Size(shape).numel(), 8)
    whole = layer(x).unflatten(1, shape)
    steps = x.unflatten(1, shape).movedim(1 + axis, 0)
    state = layer.new_state()
    for i, step in enumerate(steps):
        assert state.length == i
        y = layer(step.reshape(2, -1, 8), state=state)
        torch.testing.assert_close(y.view_as(step), whole.select(1 + axis, i), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=f"state has taken all {shape[axis]} steps"):
        layer(steps[0].reshape(2, -1, 8), state=state)


def test_refusals():
    with pytest.raises(ValueError, match=r"axis must be in 0\.\.1 for the shape \(3, 5\), got 2"):
        AxialAttention(8, 2, (3, 5), 2)
    free = AxialAttention(8, 2, (3, 5), 0)
    with pytest.raises(ValueError, match="state needs causal=True"):
        free.new_state()
    causal = AxialAttention(8, 2, (3, 5), 0, causal=True)
    with pytest.raises(ValueError, match="state must be None"):
        free(tokens(1, 5, 8), state=causal.new_state())
    with pytest.raises(TypeError, match="state must come from new_state"):
        causal(tokens(1, 5, 8), state=object())
    state = causal.new_state()
    causal(tokens(1, 5, 8), state=state)
    with pytest.raises(ValueError, match="x must go on with the state's batch, heads and lines"):
        causal(tokens(1, 4, 8), state=state)
