"""Attention inside clusters of queries and keys, found by k-means while the model trains (arXiv 2003.05997)."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.kernels.attend import attend
from regard.layers.position import Position
from regard.layers.refuse import need_heads, refuse
from regard.patterns import Causal, Pattern, Route, Routed, Summary, Window, candidates, topk
from regard.patterns.decided import both
from regard.patterns.pattern import resolve_q_start
from regard.patterns.select import pieces

__all__ = ["KMeansRoute", "Members", "RoutingAttention"]

Members = Literal["balanced", "nearest"]
RUNS = 4  # runs of a cluster's keys that a query meets at most


class KMeansRoute(nn.Module, Route):
    """Queries and keys near the same centroid meet; ``x = LayerNorm(q)``, ``LayerNorm(k)`` without affine parameters.

    ``members="balanced"``, the paper's rule: each of the c centroids of a head takes its w nearest queries and its w
    nearest keys (ties to the earlier token), sorted by position; a query in several groups gets the mean of its
    outputs, one in none zeros. Which tokens fill a group depends on **all** tokens, later ones too: under a causal
    ``within`` no query reads a later value, but whether it is in a group at all, and with which earlier keys, does hang
    on later tokens. So this rule is for whole sequences, and what it scores on next-token prediction is optimistic.

    ``members="nearest"``, for causal models: the keys with the same nearest centroid, by position, are cut into runs of
    ``r = ceil(w / 4)``, and a query meets those up to its own place in the last ``floor(w / r)`` runs with any: at most
    w keys, and at least ``floor(w / r) r - r + 1`` where there are so many. Nothing of it depends on a later token, and
    steps give the numbers of the whole sequence.

    Centroids are buffers: `update` moves them while training, and nothing else does.

    Args:
        heads, head_dim: of queries and keys. Under GQA a key counts for each query head of its group.
        centroids: c, of each head; about ``sqrt(length)``.
        width: w; None: ``ceil(length / c)`` of the keys, and of the queries.
        members: see above.
        decay: lambda of `update`.
        beta: factor of `aux_loss`.
        within: what may meet at all.
        generator: draws the first centroids, normalised as x is; None: the global one.

    Raises:
        ValueError: a number or name out of its range.
    """

    centroids: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        centroids: int,
        *,
        width: int | None = None,
        members: Members = "balanced",
        decay: float | int = 0.999,
        beta: float | int = 1e-4,
        within: Pattern | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        given = {"heads": heads, "head_dim": head_dim, "centroids": centroids, "width": width}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if members not in get_args(Members):
            raise ValueError(f"members must be one of {', '.join(map(repr, get_args(Members)))}, got {members!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.block, self.heads, self.within = (1, 1), "each", within
        self.width, self.members, self.decay, self.beta = width, members, float(decay), float(beta)
        start = F.layer_norm(torch.randn(heads, centroids, head_dim, generator=generator), (head_dim,))
        self.register_buffer("centroids", start)

    # -- deciding

    def summarize(self, k: Float[Tensor, "batch kv_heads length head_dim"], *, past: Summary | None = None) -> Summary:
        """``x``: the normalised keys."""
        x = self._normed("k", k)
        if past is not None:
            x = torch.cat([past["x"], x], 2)
        return Summary(x.shape[2], {"x": x})

    @torch.no_grad()
    def select(
        self,
        q: Float[Tensor, "batch heads q_len head_dim"],
        summary: Summary,
        *,
        within: Pattern | None = None,
        q_start: int | None = None,
    ) -> Routed:
        """Groups ("balanced"), or runs of a cluster's keys for single queries ("nearest").

        Raises:
            ValueError: other heads or another head_dim than its own; "balanced" for queries that are not the whole
                sequence, whose groups cannot be known.
        """
        x_q, x_k, n = self._normed("q", q), summary["x"], summary.length
        start, within = resolve_q_start(q.shape[2], n, q_start), both(self.within, within)
        heads = self.centroids.shape[0]
        if x_q.shape[1] != heads or heads % x_k.shape[1]:
            raise ValueError(
                f"q must have the {heads} heads of the centroids and k a divisor of them, got "
                f"{x_q.shape[1]} and {x_k.shape[1]}"
            )
        x_k = x_k.repeat_interleave(heads // x_k.shape[1], 1)
        seen = candidates(within, q.shape[2], n, (max(q.shape[2], 1), 1), q_start=start, decisions=heads)
        seen = seen.any(2).to(x_k.device)  # [samples, decisions, keys]: keys that some query may see
        choose = self._balanced if self.members == "balanced" else self._nearest
        return choose(x_q, x_k, seen, start, within)

    def _balanced(self, x_q: Tensor, x_k: Tensor, seen: Tensor, start: int, within: Pattern | None) -> Routed:
        queries, keys = x_q.shape[2], x_k.shape[2]
        if start != 0 or queries != keys:
            raise ValueError(
                f"members='balanced' fills groups from the whole sequence, got {queries} queries from {start} on and "
                f"{keys} keys; steps take members='nearest'"
            )
        c = self.centroids.shape[1]
        width = min(-(-keys // c) if self.width is None else self.width, keys)
        near = self._near(x_k)
        if not bool(seen.all()):
            near.masked_fill_(~seen[:, :, None], -torch.inf)
        return Routed.groups(
            _highest(self._near(x_q), width), _highest(near, width), "mean", q_len=queries, kv_len=keys,
            q_start=0, within=within, check=False, cost=self.cost(queries, keys, x_q.shape[3]),
        )  # fmt: skip

    def _nearest(self, x_q: Tensor, x_k: Tensor, seen: Tensor, start: int, within: Pattern | None) -> Routed:
        queries, keys, c = x_q.shape[2], x_k.shape[2], self.centroids.shape[1]
        width = max(1, min(-(-keys // c) if self.width is None else self.width, keys))
        run = -(-width // RUNS)
        at = torch.arange(width // run, device=x_q.device)
        # keys in the order of their clusters, by position inside one; what no query may see stands behind all
        cluster = self.assign(x_k).masked_fill(~seen, c)
        codes, order = (cluster * keys + torch.arange(keys, device=x_k.device)).sort(-1)
        edges = torch.arange(c + 1, device=x_k.device).mul(keys).expand(*codes.shape[:2], -1).contiguous()
        begin = torch.searchsorted(codes, edges)
        first, slots = _in_runs(cluster.gather(2, order), order, begin, run)
        mine = self.assign(x_q)
        place = (torch.arange(queries, device=x_q.device) + start + 1).clamp(max=keys)
        met = torch.searchsorted(codes, mine * keys + place) - begin.gather(2, mine)  # of its cluster, up to its place
        begun = (met + run - 1) // run
        count = begun.clamp(max=len(at))
        index = (first.gather(2, mine) + begun - count)[..., None] + at
        return Routed.blocks(
            torch.where(at < count[..., None], index, -1).int(), count.int(), block=(1, run), q_len=queries,
            kv_len=keys, q_start=start, check=False, kv_order=slots, within=both(within, Causal()),
            cost=self.cost(queries, keys, x_q.shape[3]),
        )  # fmt: skip

    def cost(self, q_len: int, kv_len: int, head_dim: int) -> int:
        """Products with the centroids: ``(q_len + kv_len) c head_dim``."""
        return (q_len + kv_len) * self.centroids.shape[1] * head_dim

    def forward(self, q: Tensor, k: Tensor, *, within: Pattern | None = None, q_start: int | None = None) -> Routed:
        """``select(q, summarize(k))``."""
        return self.select(q, self.summarize(k), within=within, q_start=q_start)

    # -- learning

    def assign(self, x: Float[Tensor, "batch heads length head_dim"]) -> Int[Tensor, "batch heads length"]:
        """The centroid at the least distance of each normalised token; ties to the lower number."""
        per_row = x.shape[0] * x.shape[1] * self.centroids.shape[1]
        parts = [self._near(x[:, :, rows], by_token=True).argmax(3) for rows in pieces(x.shape[2], per_row)]
        return torch.cat(parts, 2) if parts else x.new_zeros(x.shape[:3], dtype=torch.long)

    @torch.no_grad()
    def update(
        self, q: Float[Tensor, "batch heads q_len head_dim"], k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    ) -> None:
        """``mu <- l mu + (1 - l) / 2 mean(x_q in its cluster) + (1 - l) / 2 mean(x_k in its cluster)``.

        Clusters are by nearest centroid; where one has no query (no key), mu stands in for that mean. Under
        `torch.distributed` the means are over all processes, so that centroids stay equal.

        Raises:
            ValueError: in evaluation mode, in which centroids do not move.
        """
        if not self.training:
            raise ValueError("update moves the centroids, which evaluation leaves alone; call train() before")
        new = self.decay * self.centroids
        for name, x in (("q", q), ("k", k)):
            normed = self._normed(name, x)
            normed = normed.repeat_interleave(self.centroids.shape[0] // normed.shape[1], 1)
            member = F.one_hot(self.assign(normed), self.centroids.shape[1]).to(normed)  # [batch, heads, length, c]
            sums = torch.einsum("bhnc,bhnd->hcd", member, normed)
            counts = member.sum((0, 2))[..., None]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
                torch.distributed.all_reduce(counts)
            mean = torch.where(counts > 0, sums / counts.clamp(min=1), self.centroids)
            new = new + (1 - self.decay) / 2 * mean.to(self.centroids.dtype)
        self.centroids.copy_(new)

    def aux_loss(
        self, q: Float[Tensor, "batch heads q_len head_dim"], k: Float[Tensor, "batch kv_heads kv_len head_dim"]
    ) -> Float[Tensor, ""]:
        """``beta mean |x - mu(x)|^2`` over the queries and the keys; x learns, the centroid gets no gradient."""
        total = torch.zeros((), device=q.device)
        for name, x in (("q", q), ("k", k)):
            normed = self._normed(name, x)
            normed = normed.repeat_interleave(self.centroids.shape[0] // normed.shape[1], 1)
            head = torch.arange(normed.shape[1], device=q.device)[None, :, None]
            mine = self.centroids[head, self.assign(normed.detach())]
            total = total + (normed - mine).square().sum(-1).mean() / 2
        return self.beta * total

    # -- parts

    def _near(self, x: Tensor, by_token: bool = False) -> Tensor:
        """``|x|^2 - |x - mu|^2``, highest where nearest: [batch, heads, centroids, length], or the other way round."""
        batch, heads = x.shape[:2]
        mu = self.centroids.to(x.dtype).repeat(batch, 1, 1)
        size, x = mu.square().sum(-1, keepdim=True), x.flatten(0, 1)
        found = (
            torch.baddbmm(size.mT, x, mu.mT, beta=-1, alpha=2)
            if by_token
            else torch.baddbmm(size, mu, x.mT, beta=-1, alpha=2)
        )
        return found.unflatten(0, (batch, heads))

    def _normed(self, name: str, x: Tensor) -> Tensor:
        heads, _, head_dim = self.centroids.shape
        if x.shape[-1] != head_dim or heads % x.shape[1]:
            raise ValueError(
                f"{name} must have a divisor of {heads} heads and head_dim {head_dim}, got {list(x.shape)}"
            )
        return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (head_dim,))

    def extra_repr(self) -> str:
        """Sizes and rules."""
        heads, c, head_dim = self.centroids.shape
        return f"heads={heads}, head_dim={head_dim}, centroids={c}, width={self.width}, members={self.members!r}"


class RoutingAttention(nn.Module):
    """Self-attention of a Routing Transformer: some heads local, the others inside k-means clusters.

    In a causal layer queries are keys (``k = q``, the paper's decoder): the vectors that meet are clustered as one set.
    In training each call moves the centroids and leaves ``aux["routing"]``, the `KMeansRoute.aux_loss` of the call.

    Args:
        dim, heads: width and heads; heads must divide dim.
        centroids: of each routed head.
        window: keys before the query (and after it, where not causal) that local heads see.
        local: how many heads are local; None: half of them.
        causal: whether queries see no later key.
        members: see `KMeansRoute`; None: "nearest" where causal, "balanced" elsewhere. A causal layer with "balanced"
            is the paper's own, and leaks membership.
        width, decay, beta: of the route.
        position: rotates what meets, after clustering.
        generator: draws the first centroids.

    Raises:
        ValueError: as `KMeansRoute`, or local not in 0..heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        centroids: int,
        *,
        window: int = 256,
        local: int | None = None,
        causal: bool = True,
        members: Members | None = None,
        width: int | None = None,
        decay: float | int = 0.999,
        beta: float | int = 1e-4,
        position: Position | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        need_heads(dim, heads)
        local = heads // 2 if local is None else local
        if not 0 <= local <= heads:
            raise ValueError(f"local must be in 0..{heads}, got {local}")
        if window < 0:
            raise ValueError(f"window must be at least 0, got {window}")
        self.dim, self.heads, self.local, self.causal = dim, heads, local, causal
        self.window = Window(window, 0 if causal else window)
        self.qk_proj = nn.Linear(dim, dim if causal else 2 * dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.position = position
        members = ("nearest" if causal else "balanced") if members is None else members
        self.route = (
            KMeansRoute(
                heads - local, dim // heads, centroids, width=width, members=members, decay=decay, beta=beta,
                within=Causal() if causal else None, generator=generator,
            )
            if local < heads
            else None
        )  # fmt: skip
        self.aux: dict[str, Tensor] = {}

    def forward(
        self,
        x: Float[Tensor, "batch length {self.dim}"],
        *,
        context: Any = None,
        pattern: Pattern | None = None,
        state: Any = None,
    ) -> Float[Tensor, "batch length {self.dim}"]:
        """Attend. ``pattern``, alike for all heads, is met with the layer's own; context and state are refused."""
        refuse(self, context=context, state=state)
        if pattern is not None and pattern.heads is not None:
            raise ValueError(f"pattern must be alike for all heads here, got one that tells {pattern.heads} apart")
        own = both(pattern, Causal() if self.causal else None)
        met = self.qk_proj(x)
        q, v = self._split(met[..., : self.dim]), self._split(self.v_proj(x))
        k = self._split(met[..., self.dim :]) if met.shape[-1] > self.dim else q
        decided = None
        if self.route is not None:
            free_q, free_k = q[:, self.local :], k[:, self.local :]
            decided = self.route(free_q, free_k, within=own, q_start=0)
            if self.training:
                self.aux["routing"] = self.route.aux_loss(free_q, free_k)
                self.route.update(free_q, free_k)
        if self.position is not None:
            at = torch.arange(x.shape[1], device=x.device)
            q, k = self.position.rotate(q, k, at, at)
        shares = ((slice(0, self.local), both(own, self.window)), (slice(self.local, None), decided))
        parts = [
            cast(Tensor, attend(q[:, heads], k[:, heads], v[:, heads], under, q_start=0))
            for heads, under in shares
            if q[:, heads].shape[1]
        ]
        return self.o_proj(torch.cat(parts, 1).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _highest(near: Tensor, width: int) -> Tensor:
    """The tokens of the ``width`` highest of each row, ascending, -1 behind; of equal ones the earlier."""
    most = near.topk(min(width + 1, near.shape[-1]), -1)
    if near.shape[-1] > width and bool((most.values[..., width - 1] == most.values[..., width]).any()):
        return topk(width)(near)[0].long()  # which of the equal ones matters, and torch.topk takes any
    token = most.indices[..., :width].masked_fill(most.values[..., :width] == -torch.inf, near.shape[-1])
    token = token.sort(-1).values
    return token.masked_fill(token == near.shape[-1], -1)


def _in_runs(cluster: Tensor, order: Tensor, begin: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """The first run of each cluster ``[batch, heads, c]`` and the keys in runs ``[batch, heads, runs * run]``, -1 for
    padding; keys of cluster c are left out. ``order``: the keys by their ``cluster``, which begin at ``begin``."""
    c, keys = begin.shape[2] - 1, order.shape[2]
    runs = (begin.diff(dim=-1) + run - 1) // run
    last = runs.cumsum(-1)
    first = last - runs
    n = (int(last[..., -1].amax()) if last.numel() else 0) * run
    shift = (first * run - begin[..., :c]).gather(2, cluster.clamp(max=c - 1))
    slot = torch.where(cluster < c, torch.arange(keys, device=order.device) + shift, n)
    return first, order.new_full((*order.shape[:2], n + 1), -1).scatter_(2, slot, order)[..., :n]
