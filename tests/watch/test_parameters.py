"""Composition, components and outlier columns against whole matrices; heads of models against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.models.decoder import Decoder
from regard.watch.parameters import (
    Factored,
    component_scores,
    components,
    composition,
    head_matrices,
    outlier_columns,
)
from tests.oracles import parameters as oracle


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 33), st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_scores_are_those_of_whole_matrices(rows, dim, rank_a, rank_b, seed):
    a = Factored(drawn(seed, rows, rank_a), drawn(seed + 1, rank_a, dim))
    b = Factored(drawn(seed + 2, dim, rank_b), drawn(seed + 3, rank_b, rows))
    whole_a, whole_b = a.left @ a.right, b.left @ b.right
    assert composition(a, b) == pytest.approx(oracle.composition(whole_a, whole_b), rel=1e-9)
    assert composition(b.T, a.T) == pytest.approx(composition(a, b), rel=1e-9)
    parts = components(a)
    torch.testing.assert_close((parts.u.T * parts.sigma) @ parts.v, whole_a)
    known = int(torch.linalg.matrix_rank(whole_a))
    expected = torch.linalg.svdvals(whole_a)[:known]
    torch.testing.assert_close(parts.sigma[:known], expected)
    torch.testing.assert_close(
        component_scores(parts, b)[:known].sort().values,
        oracle.component_scores(whole_a, whole_b, known).sort().values,
    )


def test_random_matrices_score_one_over_the_root_of_dim():
    scores = [
        composition(
            Factored(drawn(i, 256, 16), drawn(i + 100, 16, 256)),
            Factored(drawn(i + 200, 256, 16), drawn(i + 300, 16, 256)),
        )
        for i in range(8)
    ]
    assert sum(scores) / 8 * 16 == pytest.approx(1, abs=0.1)


def test_a_component_that_is_read_scores_one_and_others_nothing():
    axes = torch.eye(12, dtype=torch.float64)
    writer = components(Factored(axes[:3].T * torch.tensor([3.0, 2.0, 1.0]), axes[4:7]))
    reader = Factored(axes[5:6].T, axes[:1])
    torch.testing.assert_close(component_scores(writer, reader), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def test_what_does_not_fit_is_refused():
    a, b = Factored(drawn(0, 6, 2), drawn(1, 2, 6)), Factored(drawn(2, 7, 2), drawn(3, 2, 7))
    with pytest.raises(ValueError, match="b must have 6 rows"):
        composition(a, b)
    with pytest.raises(ValueError, match="a must not be 0"):
        composition(Factored(a.left * 0, a.right), a)
    with pytest.raises(ValueError, match="other than 0"):
        outlier_columns(torch.zeros(3, 2))


def test_outlier_columns_are_those_of_the_definition():
    w = drawn(0, 5, 7)
    w[3, 2] = 90
    scores = outlier_columns(w)
    torch.testing.assert_close(scores, oracle.outlier_columns(w).double(), rtol=1e-6, atol=0)
    assert int(scores.argmax()) == 2


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().double()
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, -0.5, 2)
    return model


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (0, 5), (1, 2), (1, 3)])
def test_a_llama_with_shared_keys_and_gains(llama, layer, head):
    qk, ov = oracle.llama_head(llama, layer, head)
    found = head_matrices(llama, layer, head)
    assert found.qk.left.shape == (24, 6)  # thin, whatever the width of the model
    torch.testing.assert_close(found.qk.left @ found.qk.right, qk, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.ov.left @ found.ov.right, ov, rtol=1e-6, atol=1e-8)
    writer = head_matrices(llama, 0, 1).ov
    assert composition(writer, found.qk) == pytest.approx(oracle.composition(writer.left @ writer.right, qk), rel=1e-6)


def test_the_projects_own_decoder_has_the_same_heads(llama):
    ours = Decoder.from_llama(llama)
    parts = _anatomy(ours)
    for layer, head in ((0, 4), (1, 1)):
        for mine, theirs in zip(
            head_matrices(ours, layer, head, anatomy=parts), head_matrices(llama, layer, head), strict=True
        ):
            torch.testing.assert_close(mine.left @ mine.right, theirs.left @ theirs.right)


def test_the_norm_and_the_head_write_what_the_model_writes():
    """GPT-2: a fused projection, and a norm that removes the mean. One token attends to itself alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=21, n_layer=1, n_head=3)).eval().double()
    block = model.transformer.h[0]
    torch.nn.init.uniform_(block.ln_1.weight, 0.5, 2)
    x = drawn(0, 1, 1, 21)
    with torch.no_grad():
        zero = block.attn(block.ln_1(torch.zeros_like(x)))[0][0, 0]
        written = block.attn(block.ln_1(x))[0][0, 0] - zero
        normal = x / (x - x.mean(-1, keepdim=True)).pow(2).mean().add(1e-5).sqrt()
        found = [head_matrices(model, 0, head).ov for head in range(3)]
        summed = sum(normal[0, 0] @ ov.left @ ov.right for ov in found)
    torch.testing.assert_close(summed, written, rtol=1e-6, atol=1e-9)


def test_refusals_name_what_is_there(llama):
    with pytest.raises(IndexError, match="one of the 6 heads"):
        head_matrices(llama, 0, 6)
    with pytest.raises(LookupError, match=r"no mine; give norm= one of .*input_layernorm"):
        head_matrices(llama, 0, 0, norm="mine")
    normed = Decoder(20, 16, 1, 2)
    normed.blocks[0].attention.q_norm = torch.nn.RMSNorm(8)
    with pytest.raises(ValueError, match="q_norm: queries and keys are normed"):
        head_matrices(normed, 0, 0, anatomy=_anatomy(normed))


def test_a_norm_that_keeps_one_plus_its_gain_is_measured():
    class Shifted(torch.nn.RMSNorm):
        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, 1e-6)

    torch.manual_seed(0)
    plain = Decoder(20, 16, 1, 2).eval()
    shifted = Decoder(20, 16, 1, 2).eval()
    shifted.load_state_dict(plain.state_dict())
    shifted.blocks[0].norm1 = Shifted(16)
    torch.nn.init.zeros_(shifted.blocks[0].norm1.weight)
    for a, b in zip(
        head_matrices(plain, 0, 1, anatomy=_anatomy(plain)),
        head_matrices(shifted, 0, 1, anatomy=_anatomy(shifted)),
        strict=True,
    ):
        torch.testing.assert_close(a.left @ a.right, b.left @ b.right)


def _anatomy(model):
    from regard.watch.anatomy import anatomy

    return anatomy(model, {"ids": torch.arange(8)[None]})
