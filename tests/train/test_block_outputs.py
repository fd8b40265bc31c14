"""What blocks gave, gradients included; and eight bits, which are put back."""

import pytest
import torch
from torch import nn

from regard.kernels.quantized import quantize
from regard.tasks import decoder
from regard.train.auxiliary import block_outputs
from regard.train.diagnostics import eight_bits


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        return decoder.build(decoder.SIZES["smoke"], 0).eval()


def test_block_outputs_are_the_hidden_states_and_carry_gradients(model):
    ids = torch.arange(12).view(2, 6)
    with block_outputs(list(model.model.layers)) as given:
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(given[0], hidden[1])
        given[1].square().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.zero_grad()
    held = list(given)
    model(input_ids=ids + 1, use_cache=False)
    assert all(a is b for a, b in zip(given, held, strict=True))  # outside nothing is kept


def test_block_outputs_of_a_tuple():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x

    block = Pair()
    with block_outputs([block]) as given:
        assert given[0].numel() == 0
        block(torch.zeros(1, 2, 3))
    assert torch.equal(given[0], torch.ones(1, 2, 3))


def test_eight_bits_rounds_weights_and_what_they_read():
    linear = nn.Linear(3, 2)
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    before = linear.weight.detach().clone()
    with torch.no_grad():
        plain = linear(x)
        with eight_bits(nn.Sequential(linear)):
            rounded = linear(x)
            scale = before.abs().max() / 127
            torch.testing.assert_close(linear.weight, (before / scale).round() * scale)
        steps = x.abs().amax((1, 2), keepdim=True) / 127
        expected = nn.functional.linear((x / steps).round() * steps, (before / scale).round() * scale, linear.bias)
    torch.testing.assert_close(rounded, expected)
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear(x), plain)
    assert not torch.equal(rounded, plain)
    assert torch.equal(quantize(x[0], rows=5).dequantize(), (x[0] / steps[0]).round() * steps[0])


def test_eight_bits_costs_more_beside_an_outlier():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(16, 16)
    x = torch.randn(1, 32, 16, generator=generator)
    loud = x.clone()
    loud[0, 0, 0] = 500.0

    def error(given):
        with torch.no_grad():
            plain = linear(given)
            with eight_bits(linear):
                return float((linear(given) - plain)[0, 1:].abs().mean())

    assert error(loud) > 10 * error(x)
