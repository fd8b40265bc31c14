"""What each head can leave out: candidates, their errors and times, a search under a budget, and the plan in use.

The package is callable: `regard.plan(model, inputs, loss=0.01)` is `regard.plan.build.plan(...)`.
"""

from regard._callable import make_callable

make_callable(__name__, "regard.plan.build:plan")
