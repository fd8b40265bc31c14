"""Attention slot by slot against dense attention over each slot's keys; gathered and by calls of attend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.kernels.attend import attend
from regard.kernels.combine import merge
from regard.kernels.slots import attend_slots, slot
from regard.patterns import Causal, Routed, Window


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routes(kind, q_len, kv_len, decisions, rows_of, seed, within=None):
    """A random decision of at most 3 blocks of 3, or spans."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = -(-q_len // rows_of), -(-kv_len // 3)
    how = {"q_len": q_len, "kv_len": kv_len, "within": within, "heads": 4 if decisions > 1 else None}
    if kind == "blocks":
        picked = torch.rand(2, decisions, rows, columns, generator=g).argsort(-1)[..., :3].sort(-1).values
        count = torch.randint(picked.shape[-1] + 1, picked.shape[:3], generator=g)
        return Routed.blocks(picked, count, block=(rows_of, 3), **how)
    ends = torch.randint(kv_len + 1, (2, 2, decisions, rows, 3), generator=g).sort(0).values
    return Routed.spans(ends[0], ends[1], block=rows_of, **how)


@given(
    st.sampled_from(["blocks", "spans"]),
    st.integers(1, 7),
    st.integers(7, 13),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, Causal(), Window(4, 1)]),
    st.integers(0, 30),
)
def test_each_slot_is_attention_over_its_keys(kind, q_len, kv_len, decisions, rows_of, within, seed):
    routed = routes(kind, q_len, kv_len, decisions, rows_of, seed, within)
    q, k, v = drawn(2, 4, q_len, 4, seed=seed), drawn(2, 2, kv_len, 4, seed=1), drawn(2, 2, kv_len, 3, seed=2)
    width = (routed.index if kind == "blocks" else routed.start).shape[3]
    moved = [q * (n + 1) for n in range(width)]
    outs, lses = attend_slots(moved, k, v, routed, backend="reference")
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        want, told = attend(moved[n], k, v, slot(routed, n), return_lse=True, backend="reference")
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, told, rtol=0, atol=1e-12)


def test_blocks_merge_to_attention_over_all_of_them_and_tiles_change_nothing(monkeypatch):
    routed = routes("blocks", 9, 20, 4, 1, 3, Causal())
    q, k, v = drawn(2, 4, 9, 4), drawn(2, 2, 20, 4, seed=1), drawn(2, 2, 20, 4, seed=2)
    want, told = attend(q, k, v, routed, return_lse=True, backend="reference")
    for tile in (1 << 22, 1):
        monkeypatch.setattr("regard.kernels.slots.TILE", tile)
        out, lse = merge(*attend_slots(q, k, v, routed))
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, told, rtol=0, atol=1e-12)


def test_gradients():
    routed = routes("spans", 4, 9, 2, 1, 3)
    q, k, v = (drawn(2, n, m, 2, seed=n).requires_grad_() for n, m in ((4, 4), (2, 9), (2, 9)))

    def both(q, k, v):
        outs, lses = attend_slots(q, k, v, routed)
        return torch.stack(outs), torch.stack(lses).clamp(min=-50)

    torch.autograd.gradcheck(both, (q, k, v))


def test_half_precision_is_carried_in_float32():
    routed = routes("blocks", 4, 9, 4, 1, 3)
    q, k, v = (drawn(2, n, m, 4, seed=n).bfloat16() for n, m in ((4, 4), (2, 9), (2, 9)))
    outs, lses = attend_slots(q, k, v, routed)
    assert outs[0].dtype == torch.bfloat16
    assert lses[0].dtype == torch.float32
    want = attend_slots(q.float(), k.float(), v.float(), routed)
    torch.testing.assert_close(lses, want[1], rtol=0, atol=1e-5)


def test_what_does_not_fit():
    q, k = drawn(2, 4, 4, 4), drawn(2, 2, 9, 4)
    routed = routes("blocks", 4, 9, 4, 1, 3)
    with pytest.raises(ValueError, match="q must be one tensor, or one for each of the 3 slots, got 2"):
        attend_slots([q, q], k, k, routed)
    with pytest.raises(ValueError, match="decided for q_len=4, kv_len=9"):
        attend_slots(q, drawn(2, 2, 8, 4), drawn(2, 2, 8, 4), routed)
    with pytest.raises(ValueError, match="routed is of 4 heads, got q with 2"):
        attend_slots(q[:, :2], k, k, routed)
    with pytest.raises(ValueError, match=r"n must be in 0\.\.2"):
        slot(routed, 3)
    chosen = Routed.choose([Causal()], torch.zeros(1, 1, dtype=torch.long), q_len=4, kv_len=9)
    with pytest.raises(ValueError, match="slots are of blocks or spans"):
        attend_slots(q, k, k, chosen)
