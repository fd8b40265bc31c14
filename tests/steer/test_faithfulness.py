"""Rank agreement against scipy and the definition; soft scores and ReAGent on models whose answer is known."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from regard.steer.faithfulness import hellinger, rank_agreement, soft_faithfulness
from regard.steer.ranks import kendall, kendall_topk, spearman
from regard.steer.reagent import bigrams, reagent
from regard.watch.anatomy import anatomy

values = st.lists(st.integers(0, 5), min_size=2, max_size=9)


@given(values, st.integers(0, 99))
def test_kendall_is_scipys_with_ties(a, seed):
    b = np.random.default_rng(seed).integers(0, 5, len(a))
    np.testing.assert_allclose(kendall(a, b), kendalltau(a, b).statistic, atol=1e-12)


@given(st.permutations(range(7)), st.permutations(range(7)), st.integers(1, 7), st.sampled_from([0.0, 0.5]))
def test_top_lists_pair_by_pair(a, b, k, penalty):
    first, second = sorted(range(7), key=lambda i: -a[i])[:k], sorted(range(7), key=lambda i: -b[i])[:k]
    total = 0.0
    for i, j in itertools.combinations(sorted({*first, *second}), 2):
        one, two = {i, j} & set(first), {i, j} & set(second)
        if len(one) == len(two) == 2:
            total += (first.index(i) < first.index(j)) != (second.index(i) < second.index(j))
        elif len(one) == 2 and len(two) == 1:
            (here,) = two
            (other,) = {i, j} - two
            total += first.index(here) > first.index(other)
        elif len(two) == 2 and len(one) == 1:
            (here,) = one
            (other,) = {i, j} - one
            total += second.index(here) > second.index(other)
        elif len(one) == len(two) == 1:
            total += one != two
        else:
            total += penalty
    assert kendall_topk(a, b, k, penalty=penalty) == pytest.approx(1 - 2 * total / (k * k + penalty * k * (k - 1)))
    assert kendall_topk(a, a, k) == 1
    with pytest.raises(ValueError, match=r"k must be in 1\.\.7"):
        kendall_topk(a, b, 8)


@given(st.integers(0, 99), st.sampled_from(["kendall", "spearman", "kendall_topk"]))
def test_agreement_of_a_batch_is_that_of_its_samples(seed, kind):
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 6, (4, 9), generator=rng).float() for _ in range(2))
    counted = torch.rand(4, 9, generator=rng) < 0.7
    counted[0] = False
    counted[0, 3] = True  # one token has no order
    k = {"kendall_topk": 0.4}.get(kind)
    found = rank_agreement(a, b, kind, k=k, counted=counted)
    assert found[0].isnan()
    for row in range(1, 4):
        x, y = a[row][counted[row]].numpy(), b[row][counted[row]].numpy()
        if len(x) < 2:
            assert found[row].isnan()
        elif kind == "kendall_topk":
            assert float(found[row]) == kendall_topk(x, y, max(1, round(0.4 * len(x))))
        else:
            want = {"kendall": kendall, "spearman": spearman}[kind](x, y)
            np.testing.assert_equal(float(found[row]), want)


def test_agreement_asks_for_what_it_needs():
    a = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="kind must be one of kendall, kendall_topk, spearman, got 'tau'"):
        rank_agreement(a, a, "tau")
    for kind, k in (("kendall_topk", None), ("kendall", 2), ("kendall_topk", 0)):
        with pytest.raises(ValueError, match="k must be a number of tokens"):
            rank_agreement(a, a, kind, k=k)


def test_bigrams_propose_what_followed():
    ids = torch.tensor([[1, 2, 3, 2], [1, 2, 4, 4], [1, 5, 3, 6]])
    sample = bigrams(ids, 8)
    drawn = torch.stack([sample(torch.tensor([[1, 2, 6]]), torch.Generator().manual_seed(i))[0] for i in range(300)])
    assert (drawn[:, 0] == 1).all()
    for place, allowed in ((1, {2: 2 / 3, 5: 1 / 3}), (2, {3: 1 / 2, 4: 1 / 2})):
        values, counts = drawn[:, place].unique(return_counts=True)
        assert set(values.tolist()) == set(allowed)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            assert count / 300 == pytest.approx(allowed[value], abs=0.1)
    # Nothing ever followed 6: any token there is.
    after = [int(sample(torch.tensor([[6, 0]]), torch.Generator().manual_seed(i))[0, 1]) for i in range(200)]
    assert set(after) == {1, 2, 3, 4, 5, 6}


def test_hellinger_runs_from_0_to_1():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert hellinger(p, q).tolist() == [0, 1]


class Reader(torch.nn.Module):
    """The answer is the token in one column: a one-hot embedding read by position, with an attention call beside it."""

    def __init__(self, vocab=6, column=2, sharp=8.0):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, vocab)
        self.embed.weight = torch.nn.Parameter(torch.eye(vocab) * sharp)
        self.attend = torch.nn.MultiheadAttention(vocab, 1, batch_first=True)
        self.column = column

    def forward(self, input_ids, attention_mask=None):
        e = self.embed(input_ids)
        y = self.attend(e, e, e, need_weights=False)[0]
        return e[:, self.column : self.column + 1].expand_as(e) + 0 * y


@pytest.fixture
def reader():
    torch.manual_seed(0)
    model = Reader().eval()
    ids = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])
    return model, ids, anatomy(model, {"input_ids": ids}, blocks=("attend",), embed="embed", attn=("attend",))


def test_the_right_token_is_faithful_and_the_wrong_one_is_not(reader):
    model, ids, parts = reader
    right, wrong = torch.zeros(2, 5), torch.zeros(2, 5)
    right[:, 2], wrong[:, 0] = 1, 1
    good = soft_faithfulness(model, {"input_ids": ids}, right, anatomy=parts)
    bad = soft_faithfulness(model, {"input_ids": ids}, wrong, anatomy=parts)
    torch.testing.assert_close(good.sufficiency, torch.ones(2))
    torch.testing.assert_close(good.comprehensiveness, torch.ones(2))
    torch.testing.assert_close(bad.sufficiency, torch.zeros(2))
    torch.testing.assert_close(bad.comprehensiveness, torch.zeros(2))
    with pytest.raises(ValueError, match=r"scores must be \[batch, length\] = \[2, 5\], got \[2, 4\]"):
        soft_faithfulness(model, {"input_ids": ids}, right[:, :4], anatomy=parts)


def test_half_a_score_drops_half_of_the_elements(reader):
    model, ids, parts = reader
    scores = torch.tensor([[0.0, 0, 0.5, 0, 1], [0, 0, 0.5, 0, 1]])
    found = soft_faithfulness(model, {"input_ids": ids}, scores, masks=400, chunk=100, anatomy=parts)
    # The one element that matters is dropped in half of the draws, and the distance is then that of the empty input.
    torch.testing.assert_close(found.sufficiency, torch.full((2,), 0.5), atol=0.1, rtol=0)
    torch.testing.assert_close(found.comprehensiveness, torch.full((2,), 0.5), atol=0.1, rtol=0)


def test_padding_is_left_alone(reader):
    model, ids, parts = reader
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    scores = torch.zeros(2, 5)
    scores[:, 2] = 1
    scores[0, 0] = 99
    found = soft_faithfulness(model, {"input_ids": ids, "attention_mask": mask}, scores, anatomy=parts)
    torch.testing.assert_close(found.sufficiency, torch.ones(2))


def test_reagent_finds_the_token_that_is_read(reader):
    model, ids, _ = reader
    target = ids[:, 2]

    def sampler(tokens, generator):
        return torch.randint(0, 6, tokens.shape, generator=generator)

    found = reagent(model, {"input_ids": ids}, target, sampler, k=1, keep=1, steps=40, runs=3)
    assert found.argmax(1).tolist() == [2, 2]
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    again = reagent(model, {"input_ids": ids}, target, sampler, k=1, keep=1, steps=40, runs=3)
    assert torch.equal(found, again)
    blind = reagent(model, {"input_ids": ids}, target, lambda t, g: t, k=1, keep=1, steps=3, runs=2)
    assert blind.max() < 0.5  # nothing is ever replaced: a stays near its start
    with pytest.raises(ValueError, match="no padding"):
        reagent(model, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, target, sampler)
    with pytest.raises(ValueError, match="sampler must give ids of shape"):
        reagent(model, {"input_ids": ids}, target, lambda t, g: t[:, :2])
