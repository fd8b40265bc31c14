"""Routed patterns on FlexAttention: two compiled shapes, and the refusals."""

import pytest
import torch

from regard.kernels import flex
from regard.kernels.attend import attend, choose
from regard.kernels.request import make_request
from regard.patterns import AxisOrder, BlockTopK, Causal, Routed, Sinks, topk
from tests.kernels.test_flex import compiled, judge, problem


@compiled
def test_blocks_with_heads_samples_and_orders():
    q, k, v = (x.contiguous() for x in problem(600, 600))
    route = BlockTopK((128, 256), select=topk(1), keep=Sinks(5), heads="kv")
    judge(q, k, v, route(q, k, within=Causal()))
    ordered = BlockTopK(128, select=topk(2), order=AxisOrder((40, 15), (1, 0)))
    judge(q, k, v, ordered(q, k))  # 600 slots too: nothing more is compiled
    told = flex.describe(make_request(q, k, v, ordered(q, k)))
    assert told["order"] == "slots of the route"
    assert told["blocks"] == 2 * 5 * 8


def test_refusals():
    q, k, v = problem(20, 20)
    small = BlockTopK(4, select=topk(2))(q, k)
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) are no multiples of FlexAttention's tile of 128"):
        attend(q, k, v, small, backend="flex")
    assert choose(make_request(q, k, v, small))[0] == "blocked"
    wide = torch.full((1, 1, 2, 128), -1)  # two groups of all tokens
    wide[..., :20] = torch.arange(20)
    groups = Routed.groups(wide, wide, "mean", q_len=20, kv_len=20)
    with pytest.raises(ValueError, match="averages those of several groups"):
        attend(q, k, v, groups, backend="flex")
    with pytest.raises(ValueError, match='return_lse: groups with repeats="mean"'):
        attend(q, k, v, groups, return_lse=True)
    ordered = BlockTopK(128, select=topk(1), order=AxisOrder((4, 5), (1, 0), block=128))(q, k)
    with pytest.raises(ValueError, match="a bias is of tokens, and this route runs in slots"):
        attend(q, k, v, ordered, bias=torch.zeros(1, 1, 20, 20), backend="flex")
