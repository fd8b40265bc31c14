import pytest
import torch

from regard.models.axial import AxialDecoder


def decoder(shape=(4, 5), values=3, channels=1, **sizes):
    torch.manual_seed(0)
    model = AxialDecoder(shape, values, dim=8, heads=2, channels=channels, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.double()


def dependence(model, x):
    """Whether each pixel's logits change with each pixel, both [channel * place]: exact, by trying every level."""
    base = model(x).flatten(1, 3)
    n = x[0].numel()
    out = torch.zeros(n, n, dtype=torch.bool)
    for k in range(n):
        for value in range(model.values):
            moved = x.clone()
            moved.view(1, -1)[0, k] = value
            out[:, k] |= (model(moved).flatten(1, 3) != base).any(-1)[0]
    return out


@pytest.mark.parametrize("shape", [(4, 5), (1, 3), (3, 1), (5, 2)])
def test_logits_depend_on_exactly_the_pixels_before(shape):
    model = decoder(shape, upper=2, inner=1)
    x = torch.randint(3, (1, 1, *shape), generator=torch.Generator().manual_seed(1))
    n = shape[0] * shape[1]
    assert torch.equal(dependence(model, x), torch.ones(n, n, dtype=torch.bool).tril(-1))


def test_channels_follow_one_another():
    model = decoder((2, 3), channels=2, upper=2, inner=1)
    x = torch.randint(3, (1, 2, 2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(dependence(model, x), torch.ones(12, 12, dtype=torch.bool).tril(-1))


def test_without_the_upper_stack_a_pixel_sees_its_row_alone():
    model = decoder((3, 4), upper=0, inner=2)
    x = torch.zeros(1, 1, 3, 4, dtype=torch.long)
    row = torch.arange(12) // 4
    expected = (row[:, None] == row[None]) & torch.ones(12, 12, dtype=torch.bool).tril(-1)
    assert torch.equal(dependence(model, x), expected)


@pytest.mark.parametrize(("upper", "channels"), [(0, 1), (2, 1), (4, 1), (2, 3)])
def test_steps_give_the_logits_of_the_whole_image(upper, channels):
    model = decoder((4, 3), upper=upper, channels=channels)
    x = torch.randint(3, (2, channels, 4, 3), generator=torch.Generator().manual_seed(2))
    whole = model(x)
    for c in range(channels):
        state, last = model.new_state(2, model.earlier(x, c)), None
        for i in range(12):
            logits = model.step(last, state, c)
            torch.testing.assert_close(logits, whole[:, c].flatten(1, 2)[:, i], atol=1e-12, rtol=1e-10)
            last = x[:, c].flatten(1)[:, i]
        assert state.upper_calls == 4
        with pytest.raises(ValueError, match="state is at the end of its 4 x 3 image"):
            model.step(last, state, c)


@torch.no_grad()
def test_samples_follow_the_model():
    """Frequencies of whole 1 x 2 images against their probabilities."""
    model = decoder((1, 2), values=2, upper=0, inner=1)
    drawn = model.sample(4000, torch.Generator().manual_seed(0)).flatten(1)
    for a in (0, 1):
        for b in (0, 1):
            x = torch.tensor([a, b]).view(1, 1, 1, 2)
            p = model(x).log_softmax(-1)[0, 0, 0].gather(1, x.view(2, 1)).sum().exp()
            found = (drawn == torch.tensor([a, b])).all(1).double().mean()
            assert abs(float(found - p)) < 4 * float((p * (1 - p) / 4000).sqrt()) + 1e-9
    again = model.sample(4000, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(drawn, again)


def test_every_parameter_learns():
    model = decoder((3, 4), channels=2, upper=2)
    x = torch.randint(3, (2, 2, 3, 4))
    model(x).log_softmax(-1)[..., 0].sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_refusals():
    with pytest.raises(ValueError, match="upper must be an even number of blocks >= 0, got 3"):
        AxialDecoder((4, 4), 2, upper=3)
    with pytest.raises(ValueError, match="inner must be at least 1, got 0"):
        AxialDecoder((4, 4), 2, inner=0)
    model = decoder((2, 2))
    with pytest.raises(ValueError, match=r"x must be \[batch, 1, 2, 2\]"):
        model(torch.zeros(1, 1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x must hold levels 0\.\.2"):
        model(torch.full((1, 1, 2, 2), 3))
    state = model.new_state(1)
    with pytest.raises(ValueError, match="pixels must be None at the first pixel"):
        model.step(torch.zeros(1, dtype=torch.long), state)
