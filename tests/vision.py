"""timm needs torchvision, and torchvision's compiled ops load only beside the torch build they were made for.

Beside a CPU build of torch from PyPI they do not load, and a torchvision whose ops are missing breaks the import of
transformers as well. So `make test` puts torchvision's files in a folder of their own (share/torchvision-python in
the environment), and `import_timm` brings that folder in after declaring the two operators whose absence stops the
import. Only its Python part is used.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """timm, with whatever torchvision this environment has."""
    aside = Path(sys.prefix) / "share" / "torchvision-python"
    if importlib.util.find_spec("torchvision") is None and aside.is_dir():
        sys.path.append(str(aside))
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import timm

    return timm
