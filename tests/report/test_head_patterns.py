"""The plot of weight maps by kind: every map a point, every cluster its mean map."""

import numpy as np
import pytest

from regard.report.head_patterns import head_patterns, main, plane


def test_the_plot_shows_every_cluster():
    generator = np.random.default_rng(0)
    codes, clusters = generator.normal(size=(30, 5)), np.arange(30) % 3
    figure = head_patterns(codes, clusters, np.arange(30) // 10, generator.random((30, 4, 4)))
    axes = [ax for part in figure.subfigs for ax in part.axes]
    assert len(axes) == 1 + 4
    assert sum(len(c.get_offsets()) for c in axes[0].collections) == 30
    assert [ax.get_visible() for ax in axes[1:]] == [True, True, True, False]
    points = plane(codes)
    assert points.var(0)[0] >= points.var(0)[1]
    with pytest.raises(ValueError, match="clusters must be one for each of the 30"):
        head_patterns(codes, clusters[:2], clusters, codes)
    with pytest.raises(ValueError, match="codes must be"):
        head_patterns(codes[:, :1], clusters, clusters, codes)


def test_the_command_draws_the_shipped_model(tmp_path):
    main(str(tmp_path / "kinds.svg"), images=3, steps=2)
    assert (tmp_path / "kinds.svg").read_text().count("maps") == 8  # a title for every cluster
