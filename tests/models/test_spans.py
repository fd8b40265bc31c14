"""The span extractor: cells from the formula, arrow attention in the encoder, spans read from both cells."""

import pytest
import torch

from regard.layers.band import band_valid, from_band, to_band
from regard.models.spans import SpanExtractor, SpanLayer


def made(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = {"dim": 16, "heads": 2, "ends": 5, "feature": 4, **options}
        model = SpanExtractor(11, 3, 4, **given).double()
        ids = torch.randint(11, (2, 13))
    return model, ids


def test_cells_start_as_the_bilinear_form_of_their_ends():
    model, ids = made()
    model.layers = torch.nn.ModuleList()
    model.out = torch.nn.Identity()
    with torch.no_grad():
        found = model(ids) / 2  # the residual adds the cells to themselves
        x = model.encoder.hidden(ids)
        h, t = model.first(x), model.last(x)
    for b, i, c in ((0, 0, 4), (1, 5, 0), (1, 12, 2), (0, 7, 8)):
        j = i + c - 4
        a, z = torch.cat([h[b, i], torch.ones(1).double()]), torch.cat([t[b, j], torch.ones(1).double()])
        want = torch.stack([a @ u @ z for u in model.bilinear]) + model.linear1(h[b, i]) + model.linear2(t[b, j])
        torch.testing.assert_close(found[b, i, c], want)


def test_every_cell_beside_the_square_is_far_below_zero():
    model, ids = made()
    with torch.no_grad():
        logits = model(ids)
    valid = band_valid(13, 4)[0]
    assert (logits[:, ~valid] == -1e4).all()
    assert logits[:, valid].abs().max() < 100


def test_the_encoder_sees_a_window_and_the_first_token():
    model, ids = made(layers=1)
    other = ids.clone()
    other[:, 8] = (other[:, 8] + 1) % 11
    with torch.no_grad():
        moved = (model.encoder.hidden(ids) - model.encoder.hidden(other)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_spans_are_read_from_both_cells(monkeypatch):
    model, ids = made()
    square = torch.full((2, 13, 13, 3), -1.0)
    square[0, 2, 5, 1], square[0, 5, 2, 1] = 3.0, -2.0  # mean above 0
    square[0, 3, 6, 0], square[0, 6, 3, 0] = 1.0, -2.0  # below
    square[1, 12, 12, 2] = 1.0
    monkeypatch.setattr(SpanExtractor, "forward", lambda self, ids: to_band(square, 4))
    assert model.extract(ids) == [{(2, 5, 1)}, {(12, 12, 2)}]


def test_a_layer_without_plus_attention_sees_its_neighbours_alone():
    """Two 3 x 3 convolutions reach two cells; the plus reaches the whole row."""
    for plus, reach in ((False, 2), (True, 6)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = SpanLayer(4, plus).double()
            x = torch.randn(1, 15, 7, 4, dtype=torch.float64, requires_grad=True)
        valid = band_valid(15, 3)
        (grad,) = torch.autograd.grad(layer(x, valid)[0, 7, 0].square().sum(), x)
        touched = (grad[0, 7].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert touched == list(range(reach + 1))
        with torch.no_grad():
            assert from_band(layer(x, valid)).isfinite().all()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="joined must be"):
        SpanExtractor(11, 3, 4, joined="rolled")
