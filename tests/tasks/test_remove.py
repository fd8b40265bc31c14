"""Sets of heads taken out together: one alone is the scan's, two are not their sum, random ones are reproducible."""

import numpy as np
import pytest
import torch

import regard
from regard.steer.causal import head_ablation
from regard.tasks.heads import TASKS, remove_heads
from regard.watch.effects import loss


@pytest.fixture(scope="module")
def loaded():
    return regard.load("testbed:decoder")


@pytest.mark.parametrize("task", ["needle", "repeated"])
def test_sets_of_one_are_the_scan(loaded, task):
    how = {"prompts": 2, "length": 208, "seed": 3}
    sets = [[(1, 2)], [(0, 5)], [(1, 2), (0, 5)]]
    found = remove_heads(loaded, task, sets, **how)
    assert found.dims == ("set", "sample")

    (batch,) = TASKS[task](loaded, 2, 208, torch.Generator().manual_seed(3))
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    alone = head_ablation(loaded.model, inputs, loss(batch.labels), heads=[(1, 2), (0, 5)])
    np.testing.assert_allclose(found[0], alone.sel(layer=1, head=2), atol=1e-4)
    np.testing.assert_allclose(found[1], alone.sel(layer=0, head=5), atol=1e-4)
    np.testing.assert_allclose(found["plain"], alone["plain"], atol=1e-5)
    assert abs(found[2] - found[:2].sum("set")).max() > 1e-3


def test_refusals(loaded):
    with pytest.raises(ValueError, match="task must be one of needle, repeated"):
        remove_heads(loaded, "haystack", [[(0, 0)]])
    with pytest.raises(ValueError, match="sets must hold at least one head each"):
        remove_heads(loaded, "needle", [[]])
    with pytest.raises(ValueError, match="kind='half'"):
        remove_heads(loaded, "needle", [[(0, 0)]], kind="half", prompts=1, length=208)
