"""Interventions at inference: directions, causal experiments, attribution and how faithful it is.

The package is callable: `regard.steer(model, edits)` is `regard.watch.intervene.intervene(model, edits)`, so each
method of steering is a function that returns edits.
"""

from regard._callable import make_callable

make_callable(__name__, "regard.watch.intervene:intervene")
