"""What an earlier build in the same checkout compiled, and this one does not, would be imported in its place."""

from __future__ import annotations

from pathlib import Path

from compiled import copy_source, setup


def test_what_an_earlier_build_left_is_gone(tmp_path: Path) -> None:
    copy_source(tmp_path)
    package = tmp_path / "build" / "lib" / "chiron"
    package.mkdir(parents=True)
    (package / "stale.so").touch()
    setup(tmp_path, "build", CHIRON_COMPILE="0")
    assert not (package / "stale.so").exists()
    assert (package / "api.py").exists()
