"""Whether this is the optional compiled build (setup.py)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def build() -> str:
    """``compiled`` or ``plain Python``, with the reason if it was to be compiled and is not."""
    spec = find_spec("chiron.core.types")  # Found, not imported.
    if spec is not None and spec.origin is not None and not spec.origin.endswith(".py"):
        return "compiled"
    reason = Path(__file__).parents[1] / "not_compiled.txt"
    return f"plain Python; not compiled: {reason.read_text().strip()}" if reason.is_file() else "plain Python"
