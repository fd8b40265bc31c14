"""Generators of tasks with their solvers, and the small models trained on them.

``task.batch(n, generator)`` draws a ``Batch``; ``task.solve(prompt)`` answers it from the prompt alone.
"""
