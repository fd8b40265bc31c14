"""The report: one self-contained page for a model and a text or a picture, and the same figures in matplotlib.

The package is callable: `regard.report(atlas, path)` is `regard.report.build.report(atlas, path)`.
"""

from regard._callable import make_callable

make_callable(__name__, "regard.report.build:report")
