"""The packages that an extra of Heliostat brings, for formats and backends that most projects do not need."""

from importlib.util import find_spec

EXTRAS = {"litert_torch": "litert", "ai_edge_litert": "litert", "executorch": "executorch"}
"""By the name of the package as it is imported."""


def missing(package: str) -> str | None:
    """What is not installed and how to install it, or None if `package` is there. Nothing is imported."""
    if find_spec(package) is not None:
        return None
    return f"{package} is not installed; type: pip install 'heliostat[{EXTRAS[package]}]'"
