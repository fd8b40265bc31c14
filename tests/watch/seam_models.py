"""Small models of many makers for the seam's tests, and the plain formula to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.watch.seam import Call, Seam


class Spy:
    """A handler that keeps what each call said, and leaves it (`rerun=False`) or runs it itself."""

    def __init__(self, rerun: bool = False):
        self.rerun, self.calls, self.outputs = rerun, [], []

    def __call__(self, call: Call) -> Tensor | None:
        # ask for everything derived while the call is live
        _ = call.positions, call.valid, call.kv_valid, call.kind, call.causal, call.step, call.folded
        out = call.run()
        check_formula(call, out)  # now: static caches overwrite their keys later
        self.calls.append(call)
        self.outputs.append(out)
        return out if self.rerun else None

    @property
    def layers(self) -> list[str]:
        return [call.layer for call in self.calls]


def flat(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict) or hasattr(output, "to_tuple"):
        output = tuple(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in flat(part)]
    return []


def same(a: object, b: object) -> bool:
    left, right = flat(a), flat(b)
    return bool(left) and len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def watched(model: nn.Module, run) -> Spy:
    """Run under every kind of handler; outputs must not differ by one bit. Returns what a rerunning spy saw."""
    torch.manual_seed(0)
    plain = run()
    torch.manual_seed(0)
    with Seam(model):
        assert same(run(), plain)
    looked = []
    with Seam(model, lambda call: looked.append(call.layer)):
        torch.manual_seed(0)
        assert same(run(), plain)
    spy = Spy(rerun=True)
    torch.manual_seed(0)
    with Seam(model, spy):
        assert same(run(), plain)
    assert spy.layers == looked
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return spy


def check_formula(call: Call, out: Tensor) -> None:
    """The call's own fields, put into the formula in float64, give its output."""
    if call.dropout:
        return
    q, k, v = (x.detach().double() for x in (call.q, call.k, call.v))
    assert call.q.shape[1] == k.shape[1] * call.groups
    k, v = (x.repeat_interleave(call.groups, dim=1) for x in (k, v))
    scores = q @ k.mT * call.scale
    if call.is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if call.mask is not None:
        mask = call.mask.detach()
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    some = torch.isfinite(scores).any(-1, keepdim=True)
    weights = torch.where(some, scores, 0.0).softmax(-1) * some
    tolerance = 1e-5 if out.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.detach().double(), weights @ v, rtol=tolerance, atol=tolerance)
    if call.causal and call.kind == "self":
        later = call.kv_pos[None, :] > call.q_pos[:, None]
        # (a row whose every key is at the dtype's lowest value is spread evenly: not valid, not looked at)
        assert float((weights * later * call.valid[:, None, :, None]).amax()) < 1e-12
    rows = call.valid[:, None, :, None]
    assert torch.equal(rows & some, rows & torch.ones_like(some))  # a valid row sees something


class OwnAttention(nn.Module):
    """A hand-written layer: fused qkv, causal flag, optional cache by concatenation."""

    def __init__(self, dim: int = 32, heads: int = 4, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and q.shape[2] == k.shape[2])
        return self.out(z.transpose(1, 2).flatten(2))


class OwnCross(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(context).chunk(2, -1))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnModel(nn.Module):
    def __init__(self, dim: int = 32):
        super().__init__()
        self.blocks = nn.ModuleList([OwnAttention(dim), OwnAttention(dim)])
        self.cross = OwnCross(dim)

    def forward(self, x: Tensor, context: Tensor | None = None, past: list[list[Tensor]] | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = x + block(x, None if past is None else past[i])
        return x if context is None else x + self.cross(x, context)
