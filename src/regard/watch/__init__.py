"""A model that someone else wrote: the seam, the recorder, the atlas, its anatomy, interventions.

The package is callable: `regard.watch(model)` is `regard.watch.recorder.watch(model)`.
"""

from regard._callable import make_callable

make_callable(__name__, "regard.watch.recorder:watch")
