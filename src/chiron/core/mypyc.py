"""What code says to mypyc, for the optional compiled build (setup.py). Never compiled itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["mypyc_attr"]

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: Any) -> Callable[[type], type]:
        """Tells mypyc something and Python nothing; the real one is not installed where nothing is compiled."""
        return lambda cls: cls
