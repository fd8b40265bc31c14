"""How often words come, against a count."""

import torch

from regard.tasks.lexicon import Lexicon


def test_frequencies_are_those_of_long_text():
    task = Lexicon(length=500)
    frequency = task.frequency
    assert frequency[:2].tolist() == [0, 0]
    torch.testing.assert_close(frequency.sum(), torch.tensor(1.0, dtype=torch.float64))
    ids = task.batch(80, torch.Generator().manual_seed(0)).input_ids[:, 1:]
    counted = torch.bincount(ids.flatten(), minlength=402).double() / ids.numel()
    torch.testing.assert_close(counted, frequency, atol=6e-3, rtol=0)
    common = frequency > 0.01
    torch.testing.assert_close(
        counted[common] / frequency[common], torch.ones(int(common.sum())).double(), atol=0.1, rtol=0
    )
