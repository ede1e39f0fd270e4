"""The optional compiled build, made in a folder of its own from a copy of the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def copy_source(folder: Path) -> None:
    """All that a build reads."""
    folder.mkdir(parents=True, exist_ok=True)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT / "src", folder / "src", ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)


def setup(folder: Path, *arguments: str, **environment: str) -> str:
    """Run setup.py in ``folder`` and return what it said on stderr."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        env={**os.environ, "CHIRON_COMPILE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def python(code: str, *arguments: str, source: Path | None = None) -> bytes:
    """What ``code`` prints in a process of its own, with the package from ``source`` or as it is here."""
    first = [str(source)] if source is not None else []
    path = [*first, str(ROOT / "tests" / "support" / "simulated"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
