"""The simulated reader: answers by hand, noise of the stated size, and an encoding that is plain regression."""

import numpy as np
import pytest
import torch

from regard.tasks.lexicon import Lexicon
from regard.tasks.listener import LAGS, encode, features, read


def test_the_encoding_is_ridge_regression_on_a_matrix_of_places_by_words():
    g = torch.Generator().manual_seed(0)
    words, answers = torch.randint(5, (60,), generator=g), torch.randn(60, 3, generator=g, dtype=torch.float64)
    columns = []
    for lag in range(len(LAGS)):
        one = torch.nn.functional.one_hot(words, 5).double()
        columns.append(torch.cat([torch.zeros(lag, 5, dtype=torch.float64), one[: 60 - lag]]))
    x = torch.cat(columns, 1)
    want = np.linalg.solve((x.T @ x + 2 * torch.eye(15)).numpy(), (x.T @ answers).numpy())[:5]
    np.testing.assert_allclose(encode(answers, words, 5, 2.0), want, atol=1e-10)


def test_a_reader_hears_words_now_and_later_with_noise_of_the_stated_size():
    of_word, words = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    heard = read(of_word, words, torch.Generator(), noise=0)
    np.testing.assert_allclose(heard, [[1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1], [0, 1.25, 0.5]])
    g = torch.Generator().manual_seed(0)
    words = torch.randint(3, (20_000,), generator=g)
    plain = read(of_word, words, g, noise=0)
    for subjects in (1, 25):
        noise = read(of_word, words, g, subjects=subjects) - plain
        assert float(noise.std() / plain.std()) == pytest.approx(10 / subjects**0.5, rel=0.05)


def test_a_blind_reader_has_no_feature_of_frequency():
    task, g = Lexicon(), torch.Generator().manual_seed(0)
    known, blind = features(task, g), features(task, g, frequency=False)
    assert (known.shape, blind.shape) == ((400, 5), (400, 4))
    np.testing.assert_allclose(known.mean(0), np.zeros(5), atol=1e-9)
    np.testing.assert_allclose(known[:, 1:3], blind[:, :2])
    assert np.corrcoef(known[:, 0], task.frequency[2:].log())[0, 1] == pytest.approx(1)
