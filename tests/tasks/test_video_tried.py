import torch

from regard.models.dit import DiTConfig, VideoDiT
from regard.patterns import Full, Neighborhood, Window
from regard.tasks.fidelity import noise_for
from regard.tasks.moving_digits import MovingDigits
from regard.tasks.video_tried import tried


def test_mass_and_error_of_every_head_are_those_of_explicit_weights():
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(words=16, patch=(1, 4, 4), dim=24, layers=2, heads=2, pairs=(2, 2, 2))).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    videos = MovingDigits((2, 8, 8)).batch(2, torch.Generator().manual_seed(0))
    x, times = videos.x.double(), (0.7, 0.3)
    patterns = {"all": Full(), "near": Window(1, 1), "block": Neighborhood((2, 2, 2), (1, 2, 2), (1, 2, 2))}
    found = tried(model, x, videos.words, patterns, times=times, seed=4)
    seen = []

    def keep(module, inputs):
        y, angles = inputs
        q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in module.qkv(y).chunk(3, -1))
        seen.append((module.rope(module.norm_q(q), angles), module.rope(module.norm_k(k), angles), v))

    hooks = [block.self_attention.register_forward_pre_hook(keep) for block in model.blocks]
    noise = noise_for(2, (2, 8, 8), 4).double()
    with torch.no_grad():
        for t in times:
            model((1 - t) * x + t * noise, torch.full((2,), t, dtype=torch.float64), videos.words)
    for hook in hooks:
        hook.remove()
    i = torch.arange(8)
    for name, pattern in patterns.items():
        for layer in range(2):
            mass, lost, size = 0.0, 0.0, 0.0
            for q, k, v in seen[layer::2]:
                weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
                kept = weights * pattern.allows(i[:, None], i[None])
                less = (kept / kept.sum(-1, keepdim=True)) @ v
                mass = mass + kept.sum(-1).mean((0, 2)) / len(times)
                lost = lost + (weights @ v - less).square().sum((0, 2, 3))
                size = size + (weights @ v).square().sum((0, 2, 3))
            assert torch.allclose(found[name].mass[layer], mass, atol=1e-6)
            assert torch.allclose(found[name].error[layer], lost / size, atol=1e-6)
    assert torch.allclose(found["all"].mass, torch.ones(2, 2, dtype=torch.float64))
    assert found["all"].error.max() < 1e-12
