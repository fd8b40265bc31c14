"""Attributions against autograd through a decoder in plain float64, and against the matrices."""

import numpy as np
import pytest
import torch

from regard.steer import attribution, flow
from regard.steer.max_flow import attention_flow
from regard.watch.anatomy import anatomy
from tests.oracles import max_flow, transformer
from tests.watch.zoo import KINDS, Plain, ids


def metric(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


@pytest.fixture(params=KINDS)
def model(request):
    return Plain(**KINDS[request.param]).eval()


@pytest.fixture
def x():
    return ids(2, 7)


def inputs(x, pads=(0, 0)):
    mask = torch.ones_like(x)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    return {"input_ids": x, "attention_mask": mask}


def oracle(model, x, at=lambda layer, part, t: t, pads=(0, 0)):
    return model.oracle(x, inputs(x, pads)["attention_mask"].bool(), at=at)


def at_embedding(model, x, embedding):
    """The metric with these embeddings in place of the tokens' own."""
    return metric(oracle(model, x, lambda layer, part, t: embedding if part == "embed" else t))


def embeddings(model, x):
    return model.embed.weight.double()[x].detach()


def slopes(model, x, embedding):
    leaf = embedding.clone().requires_grad_()
    return torch.autograd.grad(at_embedding(model, x, leaf).sum(), leaf)[0]


def close(a, b, rtol=1e-3):
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=rtol, atol=1e-5)


def test_gradient_times_input(model, x):
    parts = anatomy(model, x)
    e = embeddings(model, x)
    close(attribution.grad_x_input(model, inputs(x), metric, anatomy=parts), (e * slopes(model, x, e)).sum(-1))


def test_integrated_gradients_add_up_to_the_difference(model, x):
    parts = anatomy(model, x)
    e = embeddings(model, x)
    found = attribution.integrated_gradients(model, inputs(x), metric, steps=7, chunk=3, anatomy=parts)
    want = sum(slopes(model, x, (k + 0.5) / 7 * e) for k in range(7)) / 7
    close(found, (e * want).sum(-1))
    fine = attribution.integrated_gradients(
        model, inputs(x), metric, steps=300, chunk=100, baseline=0.5 * e.float(), anatomy=parts
    )
    close(fine.sum(1), at_embedding(model, x, e) - at_embedding(model, x, 0.5 * e), rtol=2e-2)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        attribution.integrated_gradients(model, inputs(x), metric, steps=0, anatomy=parts)


def test_grad_shap_without_noise_tends_to_integrated_gradients(model, x):
    parts = anatomy(model, x)
    one = model.embed.weight[5:6].detach()  # away from 0, where a norm's gradient has no mean
    shap = attribution.grad_shap(model, inputs(x), metric, samples=400, baselines=one, chunk=100, anatomy=parts)
    straight = attribution.integrated_gradients(
        model, inputs(x), metric, steps=100, baseline=one[None], chunk=100, anatomy=parts
    )
    assert np.corrcoef(shap.flatten(), straight.flatten())[0, 1] > 0.98
    own = model.embed.weight[:3].detach()
    drawn = attribution.grad_shap(model, inputs(x), metric, samples=2, baselines=own, noise=0.1, anatomy=parts)
    again = attribution.grad_shap(model, inputs(x), metric, samples=2, baselines=own, noise=0.1, chunk=1, anatomy=parts)
    close(drawn, again)


def test_occlusion_takes_tokens_out_one_by_one(model, x):
    parts = anatomy(model, x)
    e = embeddings(model, x)
    fill = torch.ones(e.shape[-1])
    found = attribution.occlusion(model, inputs(x), metric, fill=fill, chunk=3, anatomy=parts)
    for t in range(7):
        away = e.clone()
        away[:, t] = 1
        close(found[:, t], at_embedding(model, x, e) - at_embedding(model, x, away))


def test_lime_finds_the_weights_of_a_linear_metric(x):
    class Sum(torch.nn.Module):
        """Logits linear in each token's embedding, so that a token's weight is known."""

        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(64, 4)
            self.attend = torch.nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, input_ids, attention_mask=None):
            e = self.embed(input_ids)
            y = self.attend(e, e, e, need_weights=False)[0]
            weight = torch.arange(1.0, 1 + input_ids.shape[1])
            return (e * weight[:, None]).cumsum(1) + 0 * y

    torch.manual_seed(0)
    model = Sum().eval()
    parts = anatomy(model, {"input_ids": x}, blocks=("attend",), embed="embed", attn=("attend",))
    value = lambda logits: logits[:, -1].sum(-1)  # noqa: E731
    pads = (3, 0)
    found = attribution.lime(model, inputs(x, pads), value, samples=200, penalty=1e-9, anatomy=parts)
    want = (model.embed(x).sum(-1) * torch.arange(1.0, 8)).detach()
    close(found[1], want[1])
    assert (found[0, :3] == 0).all()
    close(found[0, 3:], want[0, 3:])
    words = torch.ones_like(x, dtype=torch.bool)
    words[:, -1] = False
    some = attribution.lime(model, inputs(x, pads), value, samples=200, penalty=1e-9, words=words, anatomy=parts)
    assert (some[:, -1] == 0).all()
    close(some[1, :-1], want[1, :-1])


def matrices(model, x, pads=(0, 0)):
    seen = {}

    def at(layer, part, t):
        if part in ("weights", "v", "z"):
            seen[layer, part] = t
            if part == "z":
                t.retain_grad()
        return t

    weights = dict(model.named_parameters(remove_duplicate=False))
    how = {"heads": model.heads, "kv_heads": model.kv_heads, "parallel": model.parallel}
    logits = transformer.forward(weights, x, valid=inputs(x, pads)["attention_mask"].bool(), at=at, **how)
    metric(logits).sum().backward()
    return seen


@pytest.mark.parametrize("pads", [(0, 0), (2, 0)])
@pytest.mark.parametrize("pos", [-1, 4])
def test_rollout_is_a_row_of_the_product_of_matrices(model, x, pads, pos):
    parts = anatomy(model, x)
    seen = matrices(model, x, pads)
    product = torch.eye(7, dtype=torch.float64)
    for layer in range(2):
        product = (0.3 * torch.eye(7) + 0.7 * seen[layer, "weights"].mean(1)) @ product
    found = flow.rollout(model, inputs(x, pads), pos, residual=0.3, anatomy=parts)
    close(found, product[:, pos].float())
    close(found.sum(1), torch.ones(2))
    with pytest.raises(IndexError, match="pos=7"):
        flow.rollout(model, inputs(x), 7, anatomy=parts)


@pytest.mark.parametrize("pads", [(0, 0), (2, 0)])
def test_mean_weight_received(model, x, pads):
    parts = anatomy(model, x)
    seen = matrices(model, x, pads)
    rows = inputs(x, pads)["attention_mask"].double()
    want = sum((seen[i, "weights"].mean(1) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True) for i in range(2)) / 2
    close(flow.attention_mean(model, inputs(x, pads), anatomy=parts), want.float())


@pytest.mark.parametrize("pads", [(0, 0), (2, 0)])
def test_mean_norm_of_weighted_values(model, x, pads):
    parts = anatomy(model, x)
    seen = matrices(model, x, pads)
    rows = inputs(x, pads)["attention_mask"].double()
    layers = []
    for i in range(2):
        weighted = seen[i, "weights"][..., None] * transformer.per_head(seen[i, "v"], 4)[:, :, None]
        layers.append((weighted.norm(dim=-1).mean(1) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True))
    close(flow.attention_norms(model, inputs(x, pads), anatomy=parts), (sum(layers) / 2).float())


@pytest.mark.parametrize("pos", [-1, 2])
def test_attention_flow_is_the_linear_program(model, pos):
    x = ids(2, 4)
    parts = anatomy(model, x)
    seen = matrices(model, x)
    edges = [(0.3 * torch.eye(4) + 0.7 * seen[i, "weights"].mean(1)).detach().numpy() for i in range(2)]
    found = attention_flow(model, inputs(x), pos, residual=0.3, anatomy=parts)
    for sample in range(2):
        own = np.stack([e[sample] for e in edges])
        want = [max_flow.largest(own, token, pos % 4) for token in range(4)]
        np.testing.assert_allclose(found[sample], want, atol=2e-5)
    if pos == 2:
        assert (found[:, 3] == 0).all()  # a later token
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        attention_flow(model, {"input_ids": ids(1, 65)}, anatomy=parts)


@pytest.mark.parametrize("pads", [(0, 0), (2, 0)])
def test_weight_times_gradient_and_head_importance(model, x, pads):
    parts = anatomy(model, x)
    seen = matrices(model, x, pads)
    found = flow.attention_x_grad(model, inputs(x, pads), metric, [-1, 3], anatomy=parts)
    assert found.shape == (2, 2, 4, 2, 7)
    for layer in range(2):
        v = transformer.per_head(seen[layer, "v"], 4)
        slope = torch.einsum("bhid,bhjd->bhij", seen[layer, "z"].grad, v)
        want = (seen[layer, "weights"] * slope).abs()
        close(found[layer], want[:, :, [-1, 3]].float())
        gate = (seen[layer, "z"] * seen[layer, "z"].grad).sum((-2, -1)).abs()
        close(flow.head_importance(model, inputs(x, pads), metric, anatomy=parts)[layer], gate.float())
