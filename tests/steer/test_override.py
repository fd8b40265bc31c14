import pytest
import torch

from regard.models.dit import DiTConfig, VideoDiT
from regard.steer.override import override
from regard.watch.seam import Seam

CONFIG = DiTConfig(words=6, dim=24, layers=2, heads=2, pairs=(2, 2, 2), mlp_ratio=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = VideoDiT(CONFIG)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return made.eval()


def inputs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 6, (n, 3), generator=generator)
    return torch.randn(n, 1, 2, 4, 4, generator=generator), torch.rand(n, generator=generator), words


def outputs(model, args):
    """What each attention gave to its output projection, by layer."""
    found = {}
    hooks = [
        module.out.register_forward_pre_hook(lambda _, x, name=name: found.__setitem__(name, x[0].clone()))
        for name, module in model.named_modules()
        if name.endswith("attention")
    ]
    try:
        model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def test_targets_get_what_the_sources_gave_and_only_in_cross_attention(model):
    args = inputs(4)
    plain = outputs(model, args)
    with override(model, [2, 3], [0, 1]):
        changed = outputs(model, args)
    for name, out in changed.items():
        if "cross" in name:
            assert torch.equal(out[:2], out[2:])
        else:
            assert not torch.equal(out[:2], out[2:])
    first = "blocks.0.cross_attention"
    assert torch.equal(changed[first][2:], plain[first][2:])
    assert not torch.equal(changed[first][:2], plain[first][:2])
    assert torch.equal(changed["blocks.1.cross_attention"][2:], plain["blocks.1.cross_attention"][2:])


@torch.no_grad()
def test_a_row_like_its_source_is_left_as_it_is(model):
    x, t, words = inputs(1)
    both = (x.repeat(2, 1, 1, 1, 1), t.repeat(2), words.repeat(2, 1))
    with override(model, 1, 0):
        assert torch.equal(model(*both), model(*both))
        torch.testing.assert_close(model(*both)[0], model(*both)[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kept_outputs_are_given_between(model):
    args = inputs(3)
    alone = tuple(a[:2] for a in args)
    later = tuple(a[:2] for a in inputs(2, seed=5))
    with override(model, 2, 0, every=2) as passing:
        assert passing.due
        first = outputs(model, args)
        assert not passing.due
        second = outputs(model, later)
        assert passing.due
        third = outputs(model, inputs(3, seed=7))
    name = "blocks.1.cross_attention"
    assert torch.equal(second[name][0], first[name][2])
    assert torch.equal(third[name][0], third[name][2])
    assert not torch.equal(third[name][0], first[name][2])
    plain = outputs(model, later)
    assert torch.equal(second["blocks.0.cross_attention"][1], plain["blocks.0.cross_attention"][1])
    assert not torch.equal(outputs(model, alone)[name][0], first[name][0])


@torch.no_grad()
def test_layers_by_name(model):
    args = inputs(2)
    plain = outputs(model, args)
    with override(model, 1, 0, layers=["blocks.1.self*"]):
        changed = outputs(model, args)
    assert torch.equal(changed["blocks.1.self_attention"][0], changed["blocks.1.self_attention"][1])
    assert torch.equal(changed["blocks.0.cross_attention"], plain["blocks.0.cross_attention"])


@torch.no_grad()
def test_an_outer_seam_sees_the_model_s_own_call(model):
    seen = []
    with Seam(model, lambda call: seen.append((call.layer, call.q.shape[0])) or None):
        with override(model, 1, 0):
            model(*inputs(2))
    assert ("blocks.0.cross_attention", 2) in seen


def test_refusals(model):
    with pytest.raises(ValueError, match="as many rows, got 1 and 2"):
        override(model, 1, [0, 2])
    with pytest.raises(ValueError, match="none of source_row and none twice"):
        override(model, [1, 0], [0, 2])
    with pytest.raises(ValueError, match="source_row must be rows of the batch from 0, got -1"):
        override(model, -1, 0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        override(model, 1, 0, every=0)
    with pytest.raises(ValueError, match="sequence of names, got the string"):
        override(model, 1, 0, layers="*")
    with torch.no_grad(), override(model, 2, 0), pytest.raises(ValueError, match="batch of 2, which has no row 2"):
        model(*inputs(2))
    with torch.no_grad(), override(model, 1, 0, every=2):
        model(*inputs(2))
        x, t, words = inputs(1)
        with pytest.raises(ValueError, match="kept is"):
            model(x[..., :2], t, words)
    with pytest.raises(RuntimeError, match="ran 1 times with no attention layer like horse"):
        with torch.no_grad(), override(model, 1, 0, layers=["horse"]):
            model(*inputs(2))
