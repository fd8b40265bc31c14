"""Windows folded into the batch, unfolded: the same weights at the tokens' true places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard.patterns import Blocks, Full, Grid, TileOrder
from regard.watch.call import Call
from regard.watch.fold import Fold, Listed, known_fold, strided, windows
from regard.watch.recorder import WatchError
from regard.watch.seam import Seam
from tests.vision import import_timm

SIDE = 8


def swin(img: int = 4 * SIDE) -> torch.nn.Module:
    torch.manual_seed(0)
    model = import_timm().models.swin_transformer.SwinTransformer(
        img_size=img, patch_size=4, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,), num_classes=3
    )
    return _fused(model)


def maxvit() -> torch.nn.Module:
    torch.manual_seed(0)
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    import_timm()
    attention = MaxxVitTransformerCfg(window_size=(4, 4), grid_size=(4, 4), dim_head=8)
    sizes = MaxxVitCfg(embed_dim=(16,), depths=(1,), block_type=("M",), stem_width=8, transformer_cfg=attention)
    return _fused(MaxxVit(sizes, img_size=4 * SIDE, num_classes=3))


def _fused(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "relative_position" in name or "rel_pos" in name:
                p.normal_()
    return model.eval()


def place(window: int, slot: int, kind: str, batch: int) -> tuple[int, int]:
    """(sample, token) of a place in a window, step by step."""
    sample, window = divmod(window, 4)
    a, b = divmod(window, 2)
    i, j = divmod(slot, 4)
    if kind == "strided":
        row, column = i * 2 + a, j * 2 + b
    else:
        row, column = a * 4 + i, b * 4 + j
    if kind == "shifted":
        row, column = (row + 2) % SIDE, (column + 2) % SIDE
    assert sample < batch
    return sample, row * SIDE + column


def folded_weights(call: Call) -> Tensor:
    s = call.q.double() @ call.k.double().mT * call.scale
    return (s if call.mask is None else s + call.mask.double()).softmax(-1)


@pytest.mark.parametrize(("made", "kinds"), [(swin, ("plain", "shifted")), (maxvit, ("plain", "strided"))])
def test_unfolded_weights_stand_at_their_tokens(made, kinds):
    """Scattered by hand, window by window; and every statistic of the recorder follows from them."""
    model, image = made(), torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(0))
    want: dict[str, Tensor] = {}

    def look(call: Call) -> None:
        fold = known_fold(call)
        assert fold is not None
        weights = folded_weights(call)
        p = torch.zeros(2, call.q.shape[1], fold.order.n, fold.order.n, dtype=torch.float64)
        for w, s in torch.cartesian_prod(torch.arange(len(weights)), torch.arange(16)).tolist():
            sample, query = place(w, s, kinds[len(want)], 2)
            keys = [place(w, t, kinds[len(want)], 2)[1] for t in range(16)]
            p[sample, :, query, keys] = weights[w, :, s]
        want[call.layer] = p
        whole = fold.unfold(call)
        assert not whole.folded
        assert whole.positions.known
        assert torch.allclose(folded_weights(whole), p, atol=1e-6)
        meets = fold.grid.allows(torch.arange(SIDE**2)[:, None], torch.arange(SIDE**2)[None])
        assert torch.allclose((p * meets).sum(-1), torch.ones(()).double(), atol=1e-6)

    with torch.no_grad(), Seam(model, look):
        model(image)
    assert len(want) == 2
    with torch.no_grad(), regard.watch(model, statistics="light", grid=(SIDE, SIDE), prefix=0) as w:
        model(image)
    i = torch.arange(SIDE**2)
    atlas = w.atlas
    for n, p in enumerate(want.values()):
        distance = (p * (i[:, None] - i[None]).abs()).sum((0, 2, 3))
        assert torch.allclose(torch.tensor(atlas["distance"][n].values).double(), distance, rtol=1e-4)
        rows = torch.tensor(atlas["rows"][n].values)
        assert rows.tolist() == [2 * SIDE**2] * p.shape[1]


def test_a_fold_of_ones_own():
    """Given for a layer by name, it stands before what is known."""
    model, image = swin(), torch.randn(1, 3, 4 * SIDE, 4 * SIDE)
    wrong = windows((SIDE, SIDE), (2, 2))
    with pytest.raises(WatchError, match=r"the fold is one of 64 tokens, and the layer attends over|different windows"):
        with torch.no_grad(), regard.watch(model, folds={"*.blocks.0.attn": Fold(Full(), wrong.order)}):
            model(image)
    own = Fold(Grid([Blocks(4)] * 2, (SIDE, SIDE)), TileOrder((SIDE, SIDE), (4, 4)))
    found = []
    for folds in ({"*.blocks.0.attn": own}, {}):
        with torch.no_grad(), regard.watch(model, statistics=("distance",), folds=folds) as w:
            model(image)
        found.append(torch.tensor(w.atlas["distance"].values))
    assert torch.equal(found[0], found[1])


def test_windows_that_do_not_divide_the_map_stay_refused():
    """The model pads such a map, and the padding takes part."""
    model, image = swin(40), torch.randn(1, 3, 40, 40)
    with pytest.raises(WatchError, match="folds windows or axes into the batch"):
        with torch.no_grad(), regard.watch(model):
            model(image)
    with pytest.raises(ValueError, match="windows of 4 x 4 do not divide the map of 10 x 10"):
        windows((10, 10), (4, 4))
    with pytest.raises(ValueError, match="do not divide"):
        strided((10, 10), (4, 4))
    with pytest.raises(ValueError, match="order must have no padding, got 44 padded positions"):
        Fold(Full(), TileOrder((10, 10), (4, 4)))


def test_listed_order():
    order = Listed(torch.tensor([2, 0, 1]))
    x = torch.tensor([10.0, 11, 12])[:, None]
    assert order.apply(x).flatten().tolist() == [12, 10, 11]
    assert torch.equal(order.undo(order.apply(x)), x)
