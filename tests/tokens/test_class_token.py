"""Class-token pruning: the weights of the row, which tokens stay, and sequences that hold them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.fused import column_mass
from regard.studies.text_dominance import by_averaging
from regard.tokens.class_token import class_weights, keep_visual, rank_tokens


@pytest.fixture(scope="module")
def encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**shape, image_size=8, patch_size=2, attn_implementation="sdpa")).eval()


def test_weights_are_those_of_eager_attention(encoder):
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = [class_weights(encoder, pixels, layer=layer) for layer in (0, -1)]
    encoder.set_attn_implementation("eager")
    try:
        dense = encoder(pixel_values=pixels, output_attentions=True).attentions
    finally:
        encoder.set_attn_implementation("sdpa")
    for mine, theirs in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, theirs[:, :, 0, 1:].mean(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(IndexError, match="2 attention calls"):
        class_weights(encoder, pixels, layer=2)


@given(st.integers(1, 9), st.sampled_from(["highest", "lowest", "random"]), st.integers(0, 99))
def test_tokens_that_stay_keep_their_order(keep, how, seed):
    weights = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed))
    kept = rank_tokens(weights, keep, how, generator=torch.Generator().manual_seed(seed))
    assert kept.shape == (4, keep)
    assert (kept.diff(dim=-1) > 0).all()
    stay = weights.gather(1, kept)
    ordered = weights.sort(-1, descending=how != "lowest").values[:, :keep]
    if how != "random":
        assert torch.equal(stay.sort(-1).values, ordered.sort(-1).values)


def test_sequences_of_the_tokens_that_stay():
    ids = torch.tensor([[1, 7, 7, 7, 4, 5], [1, 7, 7, 7, 6, 8]])
    features = torch.arange(12.0).view(2, 3, 2)
    new, some = keep_visual(ids, features, torch.tensor([[0, 2], [1, 2]]), 7)
    assert new.tolist() == [[1, 7, 7, 4, 5], [1, 7, 7, 6, 8]]
    assert some.tolist() == [[[0, 1], [4, 5]], [[8, 9], [10, 11]]]
    twice, doubled = keep_visual(ids, features, torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), 7)
    assert twice.shape == (2, 9)
    assert torch.equal(doubled[:, ::2], doubled[:, 1::2])
    for wrong, kept, told in (
        (ids.roll(1, 0).index_fill(1, torch.tensor([1]), 3), [[0], [0]], "3 image tokens in one stretch"),
        (torch.tensor([[1, 7, 4, 7, 7, 5]] * 2), [[0], [0]], "one stretch"),
        (ids, [[0], [3]], r"got 0\.\.3"),
    ):
        with pytest.raises(ValueError, match=told):
            keep_visual(wrong, features, torch.tensor(kept), 7)


def test_ways_are_checked():
    with pytest.raises(ValueError, match="keep must be between 1 and the 3 tokens"):
        rank_tokens(torch.rand(1, 3), 4)
    with pytest.raises(ValueError, match="how must be"):
        rank_tokens(torch.rand(1, 3), 1, "best")


def test_at_fixed_queries_and_keys_repeated_tokens_leave_the_mdi_of_a_head_as_it_is():
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(1, 2, n, 8, generator=generator) for n in (3, 4))
    q = torch.randn(1, 2, 1, 8, generator=generator)
    found, masses = [], []
    for times in (1, 5):
        k = torch.cat([text, image.repeat_interleave(times, dim=2)], dim=2)
        mass = column_mass(q, k, torch.ones(1, 1, 1), is_causal=False, scale=0.35, q_start=0)[0, :, 0]
        found.append(mass[:, :3].mean(1) / mass[:, 3:].mean(1))
        masses.append(torch.stack([mass[:, :1].sum(1), mass[:, :3].sum(1), mass[:, 1:3].sum(1), mass[:, 3:].sum(1)], 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    assert (found[0] - 1).abs().min() > 1e-3
    # Heads are averaged before dividing, so of several heads it does change; by how much follows from the plain masses.
    mdi = [m[:, 2].sum() / 2 / (m[:, 3].sum() / n) for m, n in zip(masses, (4, 20), strict=True)]
    assert float(mdi[1] / mdi[0]) == pytest.approx(by_averaging(masses[0].numpy(), 5), rel=1e-5)
    assert by_averaging(masses[0][:1].numpy(), 5) == pytest.approx(1, rel=1e-6)
    assert abs(float(mdi[1] / mdi[0]) - 1) > 0.01
