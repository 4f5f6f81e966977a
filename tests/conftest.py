"""Shapes in signatures are checked while the tests run, and hypothesis gives the same cases every time."""

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(["nf4", "kernels", "models", "eval", "train"], "beartype.beartype")

settings.register_profile(
    "qlora", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("qlora")
