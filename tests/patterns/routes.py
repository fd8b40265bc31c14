"""Routed patterns beside their plain definition: sets of pairs, one decision after the other.

`routed()` draws a `Case`: a `Routed`, and for each sample and head the pairs that it lists, by hand.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from regard.patterns import Causal, Columns, Full, Routed, Sinks, Window, per_head, per_sample

WITHIN = (None, Causal(), Window(5, 2), Causal() & ~Columns(((2, 4),)), Columns(()))
KEEP = (None, Sinks(1), Window(1, 1))


@dataclass
class Case:
    """A routed pattern, and `listed[b][h]`: for each group that a query is in, {query: set of keys}."""

    routed: Routed
    listed: list
    kv_heads: int
    heads: int
    batch: int

    def pairs(self, joined=True):
        """Bool [batch, heads, q_len, kv_len], from the definition: (listed or keep) and within."""
        r = self.routed
        out = torch.zeros(self.batch, self.heads, r.q_len, r.kv_len, dtype=torch.bool)
        for b in range(self.batch):
            for h in range(self.heads):
                for group in self.listed[b % len(self.listed)][h]:
                    for i, keys in group.items():
                        out[b, h, i, sorted(keys)] = True
        if not joined:
            return out
        if r.keep is not None:
            out |= self.static(r.keep)
        return out if r.within is None else out & self.static(r.within)

    def static(self, pattern):
        r = self.routed
        i, j = torch.arange(r.q_len)[:, None] + r.q_start, torch.arange(r.kv_len)
        head, sample = torch.arange(self.heads)[:, None, None], torch.arange(self.batch)[:, None, None, None]
        return pattern.allows(i, j, head, sample).expand(self.batch, self.heads, r.q_len, r.kv_len)


def table(rows):
    """Lists of lists as a padded tensor [..., width]."""
    width = max((len(row) for row in rows), default=0)
    return [list(row) + [-1] * (width - len(row)) for row in rows], width


@st.composite
def sizes(draw):
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    q_len, kv_len = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    start = draw(st.one_of(st.none(), st.integers(-2, 6)))
    return draw(st.integers(1, 2)), kv_heads, heads, q_len, kv_len, start


def orders(draw, length, extra):
    slots = draw(st.permutations(range(length)))
    for _ in range(draw(st.integers(0, extra))):
        slots.insert(draw(st.integers(0, len(slots))), -1)
    return slots


@st.composite
def routed(draw, kinds=("blocks", "tokens", "spans", "ordered", "groups", "merge", "choose")):
    batch, kv_heads, heads, q_len, kv_len, start = draw(sizes())
    kind = draw(st.sampled_from(kinds))
    own = draw(st.sampled_from(sorted({1, kv_heads, heads})))
    many = draw(st.sampled_from([1, batch]))
    made, listed = [], []
    block = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    block = (1, 1) if kind == "tokens" else (block[0], 1) if kind == "spans" else block
    q_order, kv_order = list(range(q_len)), list(range(kv_len))
    if kind == "ordered":
        q_order, kv_order = orders(draw, q_len, 3), orders(draw, kv_len, 3)
    rows, columns = -(-len(q_order) // block[0]), -(-len(kv_order) // block[1])
    groups = draw(st.integers(1, 3))
    for _ in range(many):
        decisions, meets = [], []
        for _ in range(own):
            pairs: list = [{}]
            if kind in ("groups", "merge"):
                q_groups = [
                    draw(st.lists(st.sampled_from(range(q_len)), unique=True, max_size=4)) for _ in range(groups)
                ]
                k_groups = [
                    draw(st.lists(st.sampled_from(range(kv_len)), unique=True, max_size=4)) for _ in range(groups)
                ]
                if kind == "merge":  # no key twice
                    k_groups = [[k for k in g if all(k not in o for o in k_groups[:n])] for n, g in enumerate(k_groups)]
                decisions.append((q_groups, k_groups))
                pairs = [{i: set(ks) for i in qs} for qs, ks in zip(q_groups, k_groups, strict=True)]
            elif kind == "spans":
                spans = [
                    [sorted(draw(st.tuples(st.integers(0, kv_len), st.integers(0, kv_len)))) for _ in range(2)]
                    for _ in range(rows)
                ]
                decisions.append(spans)
                for i in range(q_len):
                    pairs[0][i] = {k for a, b in spans[i // block[0]] for k in range(a, b)}
            elif kind == "choose":
                decisions.append(draw(st.integers(0, 2)))
            else:
                some = st.lists(st.integers(0, columns - 1), unique=True, max_size=4).map(sorted)
                chosen = [draw(some) for _ in range(rows)]
                decisions.append(chosen)
                for slot, i in enumerate(q_order):
                    if i >= 0:
                        at = [j * block[1] + n for j in chosen[slot // block[0]] for n in range(block[1])]
                        pairs[0][i] = {kv_order[s] for s in at if s < len(kv_order) and kv_order[s] >= 0}
            meets.append(pairs)
        made.append(decisions)
        listed.append([meets[h // (heads // own)] for h in range(heads)])
    within, keep = draw(st.sampled_from(WITHIN)), draw(st.sampled_from(KEEP))
    if draw(st.booleans()):
        within = per_head([Causal(), *[within or Full()] * (heads - 1)])
    if batch > 1 and draw(st.booleans()):
        within = per_sample([within or Full(), Window(4, 1)])
    how = {"q_len": q_len, "kv_len": kv_len, "q_start": start, "within": within, "heads": heads if own > 1 else None}
    static = (Window(2), Columns(((1, 3),)), Columns(()))
    if kind == "choose":
        made_of = Routed.choose(static, torch.tensor(made), keep=keep, **how)
        case = Case(made_of, [], kv_heads, heads, batch)
        masks = [case.static(p)[0, 0] for p in static]
        for b in range(many):
            chosen = [masks[made[b][h // (heads // own)]] for h in range(heads)]
            case.listed.append([[{i: set(m[i].nonzero()[:, 0].tolist()) for i in range(q_len)}] for m in chosen])
        return case
    if kind == "spans":
        start_stop = torch.tensor(made).view(many, own, rows, 2, 2)
        return Case(
            Routed.spans(start_stop[..., 0], start_stop[..., 1], block=block[0], keep=keep, **how),
            listed, kv_heads, heads, batch,
        )  # fmt: skip
    if kind in ("groups", "merge"):
        sides = []
        for side in range(2):
            flat, width = table([g for d in made for pair in d for g in pair[side]])
            sides.append(torch.tensor(flat, dtype=torch.long).view(many, own, groups, width))
        repeats = "merge" if kind == "merge" else "mean"
        return Case(Routed.groups(*sides, repeats, **how), listed, kv_heads, heads, batch)
    flat, width = table([row for d in made for rows_ in d for row in rows_])
    index = torch.tensor(flat, dtype=torch.long).view(many, own, rows, width)
    if kind == "ordered":
        how |= {"q_order": torch.tensor([[q_order]]), "kv_order": torch.tensor([[kv_order]])}
    return Case(Routed.blocks(index, block=block, keep=keep, **how), listed, kv_heads, heads, batch)
