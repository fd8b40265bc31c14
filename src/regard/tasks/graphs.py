"""Graphs told in text: a node, its neighbours and theirs, and the community the node belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.tasks.batch import IGNORED, Batch

# Text tokens; the group tokens follow, then the token of a node that does not show its group.
BOS, CENTRE, NEIGHBOUR, CHILDREN, ASK = range(5)
FIRST_GROUP = 5


@dataclass(frozen=True)
class Community:
    """Whose community is it? Prompts about nodes of a stochastic block model, whose groups show with a probability.

    The graph has ``nodes`` in ``groups`` of equal size; two nodes of one group are linked with probability ``p_in``, of
    two groups with ``p_out``. Every batch draws a graph of its own and asks for n of its nodes. A prompt lists the
    centre, ``branch`` of its neighbours and ``branch`` further neighbours (children) of each::

        BOS  CENTRE x  NEIGHBOUR y CHILDREN z z z ..  NEIGHBOUR y CHILDREN ..   ASK x  -> group of x

    A mention is one token: the node's group, shown with probability ``shown``, or "hidden"; the centre never shows it.
    A node mentioned twice is two tokens of the same kind. Mentions stand at ``positions``, the same ones in every
    prompt; the tree of the prompt links the centre to its neighbours and each of these to its children, and ``hops``
    are distances on that tree. The mention in the question is text. Groups of keys: ``node``, ``text``.

    After Attention Mechanisms Perspective, arXiv 2505.02130; the block model and what a mention shows are our reading.

    Args:
        nodes, groups: of the graph; groups divides nodes.
        p_in, p_out: link probabilities.
        shown: probability that a mention shows its group.
        branch: neighbours listed, and children of each.
        shuffled: list nodes drawn from the whole graph in place of neighbours and children: nothing to be learned.
    """

    nodes: int = 600
    groups: int = 4
    p_in: float = 0.06
    p_out: float = 0.01
    shown: float = 0.5
    branch: int = 8
    shuffled: bool = False

    def __post_init__(self) -> None:
        if self.groups < 2 or self.nodes % self.groups:
            raise ValueError(f"groups must be at least 2 and divide nodes = {self.nodes}, got {self.groups}")
        for name, value in (("p_in", self.p_in), ("p_out", self.p_out), ("shown", self.shown)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if self.branch < 1 or self.branch >= self.nodes:
            raise ValueError(f"branch must be in 1..nodes - 1 = {self.nodes - 1}, got {self.branch}")

    # -- the shape of every prompt ---------------------------------------------------------------------------

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return FIRST_GROUP + self.groups + 1

    @property
    def hidden(self) -> int:
        """Token of a node that does not show its group."""
        return FIRST_GROUP + self.groups

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return 5 + self.branch * (3 + self.branch)

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + 1

    @cached_property
    def positions(self) -> Int[Tensor, "mentions"]:
        """Where the mentions stand: the centre, then each neighbour before its children."""
        block = torch.tensor([1, *range(3, 3 + self.branch)])
        starts = 3 + torch.arange(self.branch) * (3 + self.branch)
        return torch.cat([torch.tensor([2]), (starts[:, None] + block).flatten()])

    @cached_property
    def hops(self) -> Int[Tensor, "mentions mentions"]:
        """Links between two mentions on the prompt's tree, 0 to 4."""
        family = 1 + self.branch
        index = torch.arange(len(self.positions)) - 1
        parent, depth = index // family, torch.where(index < 0, 0, torch.where(index % family == 0, 1, 2))
        same = (parent[:, None] == parent) & (index[:, None] >= 0) & (index >= 0)
        through_centre = depth[:, None] + depth
        return torch.where(
            torch.eye(len(index), dtype=torch.bool), 0, torch.where(same, through_centre - 2, through_centre)
        )

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.groups

    # -- drawing ---------------------------------------------------------------------------------------------

    def graph(self, generator: torch.Generator) -> tuple[Bool[Tensor, "nodes nodes"], Int[Tensor, "nodes"]]:
        """A graph: symmetric adjacency without loops, and the group of every node."""
        group = torch.arange(self.nodes) % self.groups
        chance = torch.where(group[:, None] == group, self.p_in, self.p_out)
        upper = (torch.rand(self.nodes, self.nodes, generator=generator) < chance).triu(1)
        return upper | upper.T, group

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """n prompts about n nodes (drawn with repetition) of one new graph.

        Neighbours that lack ``branch`` further neighbours are not listed and centres that lack ``branch`` neighbours to
        list are not asked for.

        Raises:
            ValueError: the graph has no node that can be asked for.
        """
        links, group = self.graph(generator)
        parents = links & (links.sum(1) > self.branch)  # [node, neighbour]: the neighbour has children beside the node
        able = (parents.sum(1) >= self.branch).nonzero().flatten()
        if not len(able):
            raise ValueError(
                f"branch = {self.branch} is too many: no node of the graph has so many neighbours that have as many; "
                f"accepted are fewer, or more links (p_in = {self.p_in}, p_out = {self.p_out})"
            )
        centre = able[torch.randint(len(able), (n,), generator=generator)]
        if self.shuffled:
            listed = torch.randint(self.nodes, (n, self.branch, 1 + self.branch), generator=generator)
        else:
            parent = _pick(parents[centre], self.branch, generator)
            around = links[parent].clone()  # [n, branch, nodes]
            around.scatter_(2, centre[:, None, None].expand(-1, self.branch, 1), False)
            listed = torch.cat([parent[..., None], _pick(around, self.branch, generator)], dim=2)
        shows = torch.rand(n, self.nodes, generator=generator) < self.shown
        shows.scatter_(1, centre[:, None], False)
        # Names of groups change from prompt to prompt, so that no group stands for a place in the graph.
        names = torch.rand(n, self.groups, generator=generator).argsort(1)
        named = names.gather(1, group.expand(n, -1))
        token = torch.where(shows, FIRST_GROUP + named, self.hidden)
        answer = FIRST_GROUP + named.gather(1, centre[:, None])
        return self._compose(token.gather(1, listed.flatten(1)).view(listed.shape), answer)

    def _compose(self, tokens: Int[Tensor, "n branch family"], answer: Int[Tensor, "n 1"]) -> Batch:
        n = len(tokens)

        def column(token: int, *lead: int) -> Tensor:
            return torch.full((n, *lead, 1), token)

        blocks = torch.cat(
            [column(NEIGHBOUR, self.branch), tokens[..., :1], column(CHILDREN, self.branch), tokens[..., 1:]], dim=2
        )
        centre = column(self.hidden)
        ids = torch.cat([column(BOS), column(CENTRE), centre, blocks.flatten(1), column(ASK), centre, answer], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = answer[:, 0]
        node = torch.zeros_like(ids, dtype=torch.bool)
        node[:, self.positions] = True
        at = torch.arange(self.length).expand(n, -1)
        spans = {"answer": torch.tensor([self.prompt, self.length]).expand(n, 2)}
        return Batch(ids, labels, spans, {"node": node, "text": ~node & (at < self.prompt)})

    # -- solving ---------------------------------------------------------------------------------------------

    def _seen(self, prompts: Int[Tensor, "n prompt"]) -> Float[Tensor, "n branch family groups"]:
        """One-hot groups that neighbours and their children show; zeros where hidden."""
        tokens = prompts[:, self.positions[1:]].view(len(prompts), self.branch, 1 + self.branch)
        return (tokens[..., None] == FIRST_GROUP + torch.arange(self.groups)).double()

    def solve(self, prompts: Int[Tensor, "n prompt"]) -> Int[Tensor, "n"]:
        """The majority vote of the neighbours, from the prompts alone: the baseline.

        Ties go to the group that more children show, then to the first.
        """
        seen = self._seen(prompts[:, : self.prompt])
        votes = seen[:, :, 0].sum(1) + seen[:, :, 1:].sum((1, 2)) / (1 + self.branch * self.branch)
        return FIRST_GROUP + votes.argmax(-1)

    def posterior(self, prompts: Int[Tensor, "n prompt"]) -> Float[Tensor, "n groups"]:
        """``P(group of the centre | what the prompt shows)`` on a tree: sum-product with the model's own odds.

        A link joins nodes of one group with probability ``same = a / (a + (groups - 1) b)``, a and b the expected links
        inside and to one other group. A ceiling up to nodes mentioned twice and the degrees that prompts need.
        """
        size = self.nodes // self.groups
        inside, outside = (size - 1) * self.p_in, size * self.p_out
        same = inside / (inside + (self.groups - 1) * outside)
        other = (1 - same) / (self.groups - 1)
        link = torch.full((self.groups, self.groups), other, dtype=torch.float64).fill_diagonal_(same)
        seen = self._seen(prompts[:, : self.prompt])
        told = torch.where(seen.sum(-1, keepdim=True) > 0, seen, 1.0)  # what a mention says of its own group
        child = (told[:, :, 1:] @ link).prod(2)  # [n, branch, groups], of the parent's group
        belief = ((told[:, :, 0] * child) @ link).log().sum(1)
        return belief.softmax(-1)


def _pick(allowed: Bool[Tensor, "... nodes"], count: int, generator: torch.Generator) -> Int[Tensor, "... count"]:
    """``count`` of the allowed nodes of every row, in random order."""
    return torch.where(allowed, torch.rand(allowed.shape, generator=generator), -1.0).topk(count, dim=-1).indices
