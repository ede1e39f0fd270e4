"""``lost+found``: where a store moves unknown and damaged files.

A file that no row names may be the upload of a batch whose row was lost: whoever deletes it makes the damage final.
So nothing is deleted because it is unknown. What is put aside counts against a limit; beyond it everything stays where
it is, which is told too. Nobody but the operator empties the folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from chiron.store.settings import StoreSettings

FOLDER = "lost+found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """What was put aside, and what could not be."""

    moved: tuple[Path, ...] = ()
    left: tuple[Path, ...] = ()
    """For these there is no room within the limit, or the disk said no; they are where they were."""


class LostFound:
    def __init__(self, directory: Path, settings: StoreSettings) -> None:
        self.path = directory / FOLDER
        self._settings = settings

    def holds(self) -> tuple[int, int]:
        """Files in it and their bytes."""
        sizes = [entry.stat().st_size for entry in _files(self.path)]
        return len(sizes), sum(sizes)

    def room_for(self, files: int, size: int) -> bool:
        count, total = self.holds()
        return count + files <= self._settings.lost_files_max and total + size <= self._settings.lost_bytes_max

    def limit(self) -> str:
        """The limit in words."""
        count, total = self.holds()
        return (
            f"{self.path} holds {count} files with {total >> 20} MiB; store.lost_files_max is "
            f"{self._settings.lost_files_max}, store.lost_bytes_max is {self._settings.lost_bytes_max >> 20} MiB"
        )

    def put(self, paths: list[Path]) -> Aside:
        """Move them in, in order, for as long as there is room."""
        moved: list[Path] = []
        left: list[Path] = []
        count, total = self.holds() if paths else (0, 0)
        for path in paths:
            try:
                size = path.stat().st_size
                fits = count < self._settings.lost_files_max and total + size <= self._settings.lost_bytes_max
                if not fits:
                    left.append(path)
                    continue
                self.path.mkdir(mode=0o700, exist_ok=True)
                target = self._free(path.name)
                path.rename(target)
            except OSError:
                left.append(path)
            else:
                moved.append(target)
                count, total = count + 1, total + size
        return Aside(moved=tuple(moved), left=tuple(left))

    def folder(self, name: str) -> Path:
        """A new folder in it, for files that belong together. Raises OSError."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        made = self._free(name)
        made.mkdir(mode=0o700)
        return made

    def _free(self, name: str) -> Path:
        """A path that does not exist."""
        target, number = self.path / name, 0
        while os.path.lexists(target):
            number += 1
            target = self.path / f"{name}.{number}"
        return target


def _files(path: Path) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    folders = [path]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        found.append(entry)
        except FileNotFoundError:
            continue
    return found
