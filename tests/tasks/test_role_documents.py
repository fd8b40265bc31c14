"""What the generator of documents says at all, against a sum over everything it may have meant."""

import math

import pytest
import torch

from regard.tasks.role_documents import RoleDocuments


def test_the_marginal_sums_over_roles_and_levels():
    task = RoleDocuments(words=3, registers=2, roles=2, each=4, topic=1)
    ids = task.batch(6, torch.Generator().manual_seed(0)).input_ids
    told = task.log_marginal(ids[:, 2:])
    for row, words in zip(told.tolist(), ids[:, 2:], strict=True):
        total = 0.0
        for role in range(task.n_roles + 1):
            document = torch.cat([torch.tensor([1, task.vocabulary["role0"] + role]), words])
            total += task.log_likelihood(document[None]).exp().item() / (task.n_roles + 1)
        assert row == pytest.approx(math.log(total))


def test_the_judge_is_the_posterior_mean():
    task = RoleDocuments(words=4, registers=3, roles=1, each=2, topic=1, topical=0.0)
    words = task.vocabulary["r1w0"] + torch.tensor([[0, 1, 0, 5]])
    # Without topics a role and `nobody` write alike, and levels are equally likely.
    p = task.of_register[:, 0] ** 3 * task.of_register[:, 2]
    want = (p * torch.arange(1, 4)).sum() / p.sum()
    assert task.judge(words).item() == pytest.approx(want.item())


def test_all_documents_together_are_certain():
    task = RoleDocuments(words=2, registers=2, roles=1, each=2, topic=1)
    words = task.vocabulary["r1w0"] + torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert task.log_marginal(words).exp().sum().item() == pytest.approx(1)


def test_other_tokens_have_no_likelihood():
    with pytest.raises(ValueError, match="ids of the registers' words"):
        RoleDocuments().log_marginal(torch.tensor([[5]]))
