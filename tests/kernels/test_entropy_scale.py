import math

import pytest
import torch

from regard.kernels.entropy_scale import entropy_scale


def test_the_paper_s_formula():
    n = 30 * 52
    assert entropy_scale(2 * n, n, 128) == pytest.approx(math.sqrt(math.log(2 * n, 7) / math.log(n, 7) / 128))
    assert entropy_scale(n, n) == 1
    assert entropy_scale(n, n, 64) == 64**-0.5


def test_it_holds_the_entropy_of_gaussian_scores_nearer():
    """With more keys of the same kind, the share of the largest possible entropy stays nearer to what it was."""
    scores = 3 * torch.randn(400, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def share(s):
        p = s.softmax(-1)
        return float(-(p * p.log()).sum(-1).mean()) - math.log(256)

    before = share(scores[:, :256])
    plain, scaled = share(scores), share(entropy_scale(4096, 256) * scores)
    assert before < scaled < plain


def test_refusals():
    with pytest.raises(ValueError, match="n must be above 1 key, got 1"):
        entropy_scale(1, 4)
    with pytest.raises(ValueError, match="n_train must be above 1 key"):
        entropy_scale(4, 0.5)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        entropy_scale(4, 4, 0)
