"""Batch: shapes are checked, samples come out whole."""

import pytest
import torch

from regard.tasks.batch import Batch


def example():
    ids = torch.arange(12).view(3, 4)
    spans = {"a": torch.tensor([[0, 1], [1, 2], [2, 4]])}
    return Batch(ids, ids.clone(), spans, {"g": ids > 5})


def test_samples_are_batches_of_one():
    batch = example()
    assert len(batch) == 3
    ones = list(batch)
    assert [one.spans["a"].tolist() for one in ones] == [[[0, 1]], [[1, 2]], [[2, 4]]]
    assert torch.equal(torch.cat([one.groups["g"] for one in ones]), batch.groups["g"])
    assert batch.valid.all()
    some = batch[torch.tensor([2, 0])]
    assert some.spans["a"].tolist() == [[2, 4], [0, 1]]
    assert torch.equal(some.groups["g"], batch.groups["g"][[2, 0]])
    with pytest.raises(TypeError, match="slices"):
        batch[0]


@pytest.mark.parametrize("part", ["labels", "valid", "groups"])
def test_wrong_shapes_are_named(part):
    ids = torch.zeros(3, 4, dtype=torch.long)
    wrong = torch.zeros(3, 5, dtype=torch.long)
    given = {"labels": ids} | ({"groups": {"g": wrong > 0}} if part == "groups" else {part: wrong})
    with pytest.raises(ValueError, match=part):
        Batch(ids, **given)
    with pytest.raises(ValueError, match="spans"):
        Batch(ids, ids, {"a": torch.zeros(2, 2, dtype=torch.long)})
    with pytest.raises(ValueError, match="input_ids"):
        Batch(ids[0], ids[0])
