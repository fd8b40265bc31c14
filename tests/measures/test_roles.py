"""Roles: each is given to weights made to have it, and withheld where it could not be judged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from regard.measures.roles import DEFAULT, ROLES, name_heads, roles
from regard.measures.scores import lag, role_scores
from regard.patterns import Segments
from regard.watch.recorder import watch

LENGTH = 128


class Drawn(nn.Module):
    """A layer whose weights are what is drawn: scores are a bias, queries and keys are zero."""

    def __init__(self, scores: torch.Tensor):
        super().__init__()
        self.inner = Inner(scores)

    def forward(self, input_ids):
        return self.inner(input_ids)


class Inner(nn.Module):
    def __init__(self, scores: torch.Tensor):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, input_ids):
        batch, heads, length = len(input_ids), self.scores.shape[0], input_ids.shape[1]
        zero = torch.zeros(batch, heads, length, 8)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = self.scores[None, :, :length, :length].masked_fill(~causal, -torch.inf)
        return nn.functional.scaled_dot_product_attention(zero, zero, zero, attn_mask=mask)


def drawn(**heads: torch.Tensor):
    """Roles of heads with these scores, by name; choices of the watch under `_`."""
    choices = heads.pop("_", {})
    model = Drawn(torch.stack([h.float() for h in heads.values()]))
    ids = torch.arange(LENGTH)[None] % 50 + torch.arange(LENGTH)[None] // 100  # mostly no repetition
    with torch.no_grad(), watch(model, **choices) as w:
        model(ids)
    table = roles(w.atlas)
    return {name: table.head(0, h) for h, name in enumerate(heads)}, table, w.atlas


i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
STRONG = 30.0


def hot(mask: torch.Tensor) -> torch.Tensor:
    return mask.float() * STRONG


def test_each_drawn_head_has_its_name():
    stripes = ((j == 17) | (j == 40) | (j == 3)) & (i > 45) | (i == j) & (i <= 45)
    found, table, _ = drawn(
        previous=hot(i - j == 1),
        sink=hot((j == 0) | (i < 0)),
        diagonal=hot(i == j),
        comb=hot((i - j) % 16 == 0),
        stripe=hot(stripes),
        local=hot(i - j < LENGTH // 16),
        uniform=torch.zeros(LENGTH, LENGTH),
        far=hot((j > 0) & (j <= i // 4)),
    )
    names = {name: found[name]["role"] for name in found}
    assert names == {
        "previous": "previous-token",
        "sink": "sink",
        "diagonal": "diagonal",
        "comb": "multi-diagonal",
        "stripe": "vertical stripe",
        "local": "local",
        "uniform": "uniform",
        "far": "global",
    }
    assert "local" in found["previous"]["also"]
    assert table.counts()["uniform"] == 1
    assert set(table.not_measured()) >= {"retrieval", "block"}
    assert "per_sample=('copy_hits',)" in table.not_measured()["retrieval"]


def test_blocks_when_their_segments_are_given():
    ids = tuple(p // 32 for p in range(LENGTH))
    inside = i // 32 == j // 32
    found, _, _ = drawn(_={"templates": {"block": Segments(ids)}}, block=hot(inside), other=hot(~inside | (i < 32)))
    assert found["block"]["roles"]["block"]["holds"] is True
    assert found["other"]["roles"]["block"]["holds"] is False


def test_induction_on_a_repeated_text():
    length = 64
    ids = (torch.randperm(32, generator=torch.Generator().manual_seed(0)) + 3).repeat(2)[None]
    match = torch.zeros(LENGTH, LENGTH)
    match[32:64, :32] = hot(torch.arange(32)[:, None] + 1 == torch.arange(32))
    match[:32, 0] = STRONG
    model = Drawn(torch.stack([match, torch.zeros_like(match)]))
    with torch.no_grad(), watch(model) as w:
        model(ids[:, :length])
    table = roles(w.atlas)
    assert table.head(0, 0)["role"] == "induction"
    assert not table.head(0, 1)["roles"]["induction"]["holds"]


def test_a_wide_template_names_nothing():
    found, _, _ = drawn(_={"templates": {"block": Segments((0,) * LENGTH)}}, head=torch.zeros(LENGTH, LENGTH))
    block = found["head"]["roles"]["block"]
    assert next(s for s in block["scores"] if s["score"] == "block")["value"] == pytest.approx(1)
    assert block["holds"] is False


def test_what_was_not_watched_is_neither_yes_nor_no():
    found, table, atlas = drawn(_={"statistics": "light"}, sink=hot(j == 0) + 0 * i, flat=torch.zeros(LENGTH, LENGTH))
    sink, flat = found["sink"], found["flat"]
    assert sink["role"] == "sink"
    for role in ("induction", "previous-token", "diagonal", "local", "vertical stripe"):
        assert sink["roles"][role]["holds"] is None
    assert flat["roles"]["uniform"]["holds"] is None  # entropy passes, the largest weight is unknown
    assert sink["roles"]["uniform"]["holds"] is False  # entropy alone denies it
    assert sink["roles"]["global"]["holds"] is None  # far, but it might be local
    assert "statistics='default'" in table.not_measured()["diagonal"]
    scores = role_scores(atlas)
    assert scores.dims == ("layer", "head", "role")
    assert "induction" in scores.attrs["missing"]


def test_retrieval_strength_and_order():
    _, _, atlas = drawn(head=hot(i - j == 1))
    scores = role_scores(atlas)
    scores.loc[{"role": "retrieval"}] = 0.6
    head = name_heads(scores).head(0, 0)
    assert head["role"] == "retrieval"
    assert head["also"][0] == "previous-token"
    assert head["roles"]["retrieval"]["strong"]
    weaker = name_heads(scores, {"retrieval": 0.7}).head(0, 0)
    assert weaker["role"] == "previous-token"


def test_thresholds_and_labels_are_checked():
    _, table, atlas = drawn(head=hot(j == 0) + 0 * i)
    assert roles(atlas, DEFAULT | {"sink": 2.0}).head(0, 0)["role"] != "sink"
    with pytest.raises(ValueError, match="thresholds: no score is named nonsense"):
        name_heads(role_scores(atlas), {"nonsense": 1.0})
    with pytest.raises(KeyError, match="no head 7"):
        table.head(0, 7)


def test_the_table_as_json_holds_every_score_with_its_origin():
    _, table, _ = drawn(head=hot(j == 0) + 0 * i)
    facts = json.loads(table.to_json())
    head = facts["heads"][0]
    assert set(head["roles"]) == set(ROLES)
    for role in head["roles"].values():
        for score in role["scores"]:
            assert set(score) == {"score", "value", "op", "threshold", "passes", "where_from"}
    assert "sink: 1" in repr(table)


def test_cross_attention_is_not_judged_by_position():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attention(x, memory, memory)[0]

    torch.manual_seed(0)
    model = Cross().eval()
    with torch.no_grad(), watch(model) as w:
        model(torch.randn(1, 7, 16), torch.randn(1, 9, 16))
    head = roles(w.atlas).head(0, 0)
    assert head["kind"] == "cross"
    assert head["roles"]["diagonal"]["holds"] is None
    assert head["roles"]["sink"]["holds"] is not None


def test_lag_of_a_profile():
    comb = np.zeros(256)
    comb[::14] = 1 / (1 + np.arange(19))
    assert lag(comb) == 14
    assert lag(np.exp(-np.arange(256) / 20)) is None
    assert lag(np.zeros(256)) is None
