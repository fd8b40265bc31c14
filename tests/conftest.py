"""Shared set-up: shape annotations are checked at run time, and hypothesis runs a fixed number of examples."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

settings.register_profile(
    "regard", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("regard")

# Every annotated shape in these packages is checked on every call the tests make.
CHECKED = ("patterns", "kernels", "watch", "measures", "layers", "models", "steer")
install_import_hook([f"regard.{name}" for name in CHECKED], "beartype.beartype")
