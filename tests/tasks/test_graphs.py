"""Graph prompts: real links, the tree's hops, a vote and a posterior that follow from the prompt, and nothing to learn
where the links are shuffled."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.tasks.batch import IGNORED
from regard.tasks.graphs import ASK, CENTRE, CHILDREN, FIRST_GROUP, NEIGHBOUR, Community


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def tasks(draw):
    branch = draw(st.integers(1, 5))
    return Community(60, draw(st.sampled_from([2, 3, 4])), 0.6, 0.3, draw(st.floats(0, 1)), branch, draw(st.booleans()))


@given(tasks(), st.integers(0, 2**31))
def test_every_part_is_where_it_says(task, seed):
    batch = task.batch(4, generator(seed))
    assert batch.input_ids.shape == (4, task.length)
    ids = batch.input_ids
    assert (batch.groups["node"].nonzero()[:, 1].view(4, -1) == task.positions).all()
    assert (batch.groups["node"] ^ batch.groups["text"])[:, : task.prompt].all()
    assert not (batch.groups["node"] | batch.groups["text"])[:, task.prompt :].any()
    nodes = ids[:, task.positions]
    assert ((nodes >= FIRST_GROUP) & (nodes <= task.hidden)).all()
    text = ids[batch.groups["text"]].view(4, -1)
    expected = [0, CENTRE, *[NEIGHBOUR, CHILDREN] * task.branch, ASK, task.hidden]
    assert text.tolist() == [expected] * 4
    assert (nodes[:, 0] == task.hidden).all()
    assert ((batch.labels != IGNORED).nonzero()[:, 1] == task.prompt).all()


@given(st.integers(1, 6))
def test_hops_are_distances_on_the_tree(branch):
    task = Community(branch=branch)
    count = len(task.positions)
    assert count == 1 + branch * (1 + branch)
    links = set()
    for i in range(branch):
        neighbour = 1 + i * (1 + branch)
        links.add((0, neighbour))
        links |= {(neighbour, neighbour + 1 + j) for j in range(branch)}
    distance = torch.full((count, count), 99)
    distance.fill_diagonal_(0)
    for a, b in links:
        distance[a, b] = distance[b, a] = 1
    for k in range(count):  # Floyd and Warshall
        distance = torch.minimum(distance, distance[:, k : k + 1] + distance[k])
    assert torch.equal(task.hops, distance)


def test_the_graph_has_the_links_it_should():
    task = Community()
    links, group = task.graph(generator(0))
    assert torch.equal(links, links.T)
    assert not links.diagonal().any()
    same = group[:, None] == group
    upper = torch.ones_like(links).triu(1)
    for which, p in ((same, task.p_in), (~same, task.p_out)):
        pairs = (which & upper).sum()
        rate = float((links & which & upper).sum() / pairs)
        assert abs(rate - p) < 4 * (p * (1 - p) / float(pairs)) ** 0.5


def brute_posterior(task, prompt):
    """Sum over the groups of every node of the tree, one assignment at a time."""
    size = task.nodes // task.groups
    inside, outside = (size - 1) * task.p_in, size * task.p_out
    same = inside / (inside + (task.groups - 1) * outside)
    other = (1 - same) / (task.groups - 1)
    tokens = prompt[task.positions].tolist()
    family, total = 1 + task.branch, [0.0] * task.groups
    for groups in itertools.product(range(task.groups), repeat=len(tokens)):
        if any(t not in (task.hidden, FIRST_GROUP + g) for t, g in zip(tokens, groups, strict=True)):
            continue
        p = 1.0
        for i in range(1, len(tokens)):
            parent = 0 if (i - 1) % family == 0 else 1 + (i - 1) // family * family
            p *= same if groups[i] == groups[parent] else other
        total[groups[0]] += p
    return torch.tensor(total, dtype=torch.float64) / sum(total)


@pytest.mark.parametrize(("groups", "branch"), [(2, 2), (3, 2), (4, 1), (2, 3)])
def test_the_posterior_is_the_sum_over_all_assignments(groups, branch):
    task = Community(60, groups, 0.5, 0.2, 0.6, branch)
    batch = task.batch(6, generator(groups))
    found = task.posterior(batch.input_ids[:, : task.prompt])
    for row, ids in zip(found, batch.input_ids, strict=True):
        torch.testing.assert_close(row, brute_posterior(task, ids), rtol=1e-10, atol=1e-12)


def test_the_vote_counts_neighbours_and_breaks_ties_by_children():
    task = Community(60, 3, 0.6, 0.3, branch=2)
    g, h = FIRST_GROUP, task.hidden

    def prompt(*mentions):
        ids = torch.zeros(1, task.prompt, dtype=torch.long)
        ids[0, task.positions] = torch.tensor([h, *mentions])
        return ids

    assert task.solve(prompt(g + 1, g, g, h, g, g)).tolist() == [g + 1]  # one neighbour beats four children
    assert task.solve(prompt(g, h, h, g + 2, g + 2, h)).tolist() == [g + 2]  # a tie, broken by a child
    assert task.solve(prompt(h, h, h, h, h, h)).tolist() == [g]


def accuracy(task, guess, n=400, seeds=range(4)):
    right = []
    for seed in seeds:
        batch = task.batch(n, generator(seed))
        right.append((guess(batch.input_ids[:, : task.prompt]) == batch.labels[:, -1]).double().mean())
    return float(torch.stack(right).mean())


def test_the_vote_is_far_above_chance_and_the_posterior_above_the_vote():
    task = Community()
    vote = accuracy(task, task.solve)
    best = accuracy(task, lambda p: FIRST_GROUP + task.posterior(p).argmax(-1))
    assert task.chance + 0.3 < vote < best - 0.02


def test_shuffled_links_and_hidden_groups_leave_chance():
    for task in (Community(shuffled=True), Community(shown=0.0)):
        assert abs(accuracy(task, task.solve) - task.chance) < 4 * (0.1875 / 1600) ** 0.5 + 0.01
        assert abs(accuracy(task, lambda p, t=task: FIRST_GROUP + t.posterior(p).argmax(-1)) - 0.25) < 0.06


def test_answers_are_balanced_and_no_mention_alone_tells_more_than_its_link():
    task = Community(shown=1.0)
    batch = torch.cat([task.batch(500, generator(s)).input_ids for s in range(4)])
    counts = (batch[:, -1] - FIRST_GROUP).bincount(minlength=4) / len(batch)
    assert (counts - 0.25).abs().max() < 0.04
    same = 149 * 0.06 / (149 * 0.06 + 450 * 0.01)
    agree = (batch[:, task.positions[1:]] == batch[:, -1:]).double().mean(0).view(8, 9)
    assert (agree[:, 0] - same).abs().max() < 0.06  # neighbours
    two = same**2 + (1 - same) ** 2 / 3
    assert abs(float(agree[:, 1:].mean()) - two) < 0.03  # children


def test_a_node_mentioned_twice_is_two_tokens_of_one_kind():
    """In a graph of 8 nodes that are all linked every node is mentioned again and again."""
    task = Community(8, 2, 1.0, 1.0, 0.5, branch=6)
    for ids in task.batch(20, generator(0)).input_ids:
        mentions = ids[task.positions[1:]].view(6, 7)
        # the children of a neighbour are all others but the centre: the same tokens as the other neighbours', as a set
        whole = torch.cat([mentions[0, :1], mentions[0, 1:]]).sort().values
        for row in mentions[1:]:
            assert torch.equal(row.sort().values, whole)


def test_the_same_seed_gives_the_same_batch():
    one, two = (Community().batch(4, generator(7)).input_ids for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, Community().batch(4, generator(8)).input_ids)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"groups": 7}, "groups must be at least 2 and divide"),
        ({"p_in": 1.2}, "p_in must be in"),
        ({"shown": -0.1}, "shown must be in"),
        ({"branch": 0}, "branch must be in"),
    ],
)
def test_errors_name_the_argument(wrong, said):
    with pytest.raises(ValueError, match=said):
        Community(**wrong)


def test_a_graph_without_enough_links_is_refused():
    with pytest.raises(ValueError, match="branch = 8 is too many"):
        Community(p_in=0.001, p_out=0.001).batch(1, generator(0))
