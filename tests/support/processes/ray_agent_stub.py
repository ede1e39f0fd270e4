"""A program in the place of a Python with Ray, which answers as an agent does."""

from __future__ import annotations

import stat
import sys
from pathlib import Path


def a_python(directory: Path, body: str) -> str:
    """Its path; ``body`` is what it does, with ``json``, ``os``, ``sys`` and ``time`` imported."""
    path = directory / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
