import itertools
import json

import pytest
import torch

from regard import watch
from regard.models.dit import DiTConfig, VideoDiT, flow_loss, sample, timesteps
from regard.models.saved import is_saved, load_saved, save_model
from regard.patterns import Full, Window, per_head
from regard.watch.attend_with import attend_with

TINY = DiTConfig(words=6, dim=24, layers=2, heads=2, pairs=(2, 2, 2), mlp_ratio=2)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def stirred(config=TINY, seed=0):
    """A model whose gates are open: at its start a DiT is zero."""
    torch.manual_seed(seed)
    model = VideoDiT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def video(*shape, n=2, seed=0):
    return torch.randn(n, 1, *shape, generator=gen(seed))


WORDS = torch.tensor([[3, 2, 0], [1, 0, 0]])


def test_patches_and_back_are_the_identity():
    model = VideoDiT(DiTConfig(channels=3, patch=(2, 1, 3), dim=24, heads=2, pairs=(2, 2, 2)))
    x = torch.randn(2, 3, 4, 5, 9)
    grid = model.config.grid((4, 5, 9))
    tokens = model._patches(x, grid)
    assert tokens.shape == (2, 2 * 5 * 3, 18)
    assert torch.equal(model._video(tokens, grid), x)
    assert torch.equal(tokens[1, 1 * 15 + 2 * 3 + 1].reshape(3, 2, 1, 3), x[1, :, 2:4, 2:3, 3:6])


def test_it_starts_at_zero_and_its_first_loss_is_the_variance_of_the_flow():
    torch.manual_seed(0)
    model = VideoDiT(TINY)
    x, noise = video(2, 4, 4), video(2, 4, 4, seed=1)
    t = torch.tensor([0.3, 0.8])
    assert model(x, t, WORDS).abs().max() == 0
    assert flow_loss(model, x, noise, t, WORDS).item() == pytest.approx((noise - x).square().mean().item())


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 8), (8, 6, 2)])
def test_any_grid(shape):
    model = stirred()
    out = model(video(*shape), torch.tensor([0.2, 0.9]), WORDS)
    assert out.shape == (2, 1, *shape)
    assert torch.isfinite(out).all()


def test_samples_are_independent_and_prompts_have_no_order():
    model = stirred()
    x, t = video(2, 4, 4), torch.tensor([0.2, 0.9])
    out = model(x, t, WORDS)
    torch.testing.assert_close(out[1:], model(x[1:], t[1:], WORDS[1:]))
    torch.testing.assert_close(out, model(x, t, WORDS.flip(1)))
    assert (out - model(x, t, WORDS.flip(0))).abs().max() > 1e-4
    assert (out - model(x, t.flip(0), WORDS)).abs().max() > 1e-4


@torch.no_grad()
def test_prompts_act_through_cross_attention_and_beside_the_timestep():
    x, t = video(2, 4, 4), torch.tensor([0.2, 0.9])
    for closed in ("cross_attention.out", "modulation"):
        model = stirred()
        for name, module in model.named_modules():
            if (name.startswith("blocks") and name.endswith(closed)) or name == closed:
                module.weight.zero_()
        assert (model(x, t, WORDS) - model(x, t, WORDS.flip(0))).abs().max() > 1e-4, closed


def test_a_step_of_the_flow_is_exact_when_the_model_knows_it():
    """With the true flow of one video, Euler arrives at it whatever the steps and the shift."""
    x, noise = video(2, 4, 4), video(2, 4, 4, seed=1)

    class True_(VideoDiT):
        def forward(self, at, t, words):
            return (noise - x).repeat(len(at) // 2, 1, 1, 1, 1)

    for steps, guidance, shift in ((1, 1.0, 1.0), (7, 3.0, 3.0)):
        made = sample(True_(TINY), noise, WORDS, steps=steps, guidance=guidance, shift=shift)
        torch.testing.assert_close(made, x, atol=1e-5, rtol=0)


def test_sampling_is_the_same_each_time_and_guidance_is_what_it_says():
    model = stirred()
    noise = video(2, 4, 4)
    a = sample(model, noise, WORDS, steps=3, guidance=2.0)
    assert torch.equal(a, sample(model, noise, WORDS, steps=3, guidance=2.0))
    null = torch.full_like(WORDS, model.config.null)
    x = noise
    times = timesteps(3, 3.0)
    for now, after in itertools.pairwise(times):
        t = torch.full((2,), now)
        told, plain = model(x, t, WORDS), model(x, t, null)
        x = x + (after - now) * (plain + 2 * (told - plain))
    torch.testing.assert_close(a, x.detach())
    assert (a - sample(model, noise, WORDS, steps=3, guidance=1)).abs().max() > 1e-3


def test_starting_from_a_video():
    model = stirred()
    init, noise = video(2, 4, 4), video(2, 4, 4, seed=1)
    near = sample(model, noise, WORDS, steps=4, init=init, strength=0.05)
    far = sample(model, noise, WORDS, steps=4, init=init, strength=0.9)
    assert (near - init).square().mean() < (far - init).square().mean()
    with pytest.raises(ValueError, match="strength goes with an init"):
        sample(model, noise, WORDS, strength=0.5)


def test_times():
    assert timesteps(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert timesteps(2, shift=3)[1] == pytest.approx(0.75)
    assert timesteps(3, start=0.6)[0] == 0.6
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        timesteps(0)
    with pytest.raises(ValueError, match=r"start must be in \(0, 1\], got 0"):
        timesteps(3, start=0)


def test_the_seam_sees_self_and_cross_attention():
    model = stirred()
    with watch(model, statistics="light") as watched:
        model(video(2, 4, 4), torch.tensor([0.2, 0.9]), WORDS)
    atlas = watched.atlas
    kinds = dict(zip(atlas["layer"].values.tolist(), atlas["kind"].values.tolist(), strict=True))
    assert kinds == {f"blocks.{i}.{part}_attention": part for i in range(2) for part in ("self", "cross")}


def test_it_attends_with_a_pattern():
    model = stirred()
    args = video(2, 4, 4), torch.tensor([0.2, 0.9]), WORDS
    dense = model(*args)
    with attend_with(model, Full()):
        torch.testing.assert_close(model(*args), dense, atol=1e-5, rtol=1e-4)
    with attend_with(model, {0: per_head([Window(1, 1), Full()])}) as changed:
        assert (model(*args) - dense).abs().max() > 1e-4
        assert changed.used == {"blocks.0.self_attention": 1}


def test_saved_and_loaded(tmp_path):
    model = stirred()
    save_model(model, tmp_path)
    assert is_saved(tmp_path)
    again = load_saved(tmp_path)
    assert again.config == TINY
    assert not again.training
    args = video(2, 4, 4), torch.tensor([0.2, 0.9]), WORDS
    assert torch.equal(again(*args), model(*args))
    assert load_saved(tmp_path, dtype=torch.float64).head.weight.dtype == torch.float64
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"architectures": ["Horse"]}))
    with pytest.raises(ValueError, match="holds a Horse; this regard knows VideoDiT"):
        load_saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_saved(tmp_path)
    assert not is_saved(tmp_path / "nothing")


def test_refusals():
    with pytest.raises(ValueError, match=r"divisible by the patch \(1, 2, 2\), got \(2, 3, 4\)"):
        stirred()(video(2, 3, 4), torch.tensor([0.2, 0.9]), WORDS)
    with pytest.raises(ValueError, match="dim must be even and divisible by heads = 5"):
        VideoDiT(DiTConfig(dim=24, heads=5))
