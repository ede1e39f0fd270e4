"""The directory of a store: one process has it at a time; uploaded files lie in it as plain files.

While an upload comes in its file is called ``ID.part``: such a file was never acknowledged, so it may be removed when
the store opens. A file with its final name that no row names is unknown, and is put aside.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from chiron.store.port import StoreError, StoreFull, StoreLocked

DATABASE = "batch.sqlite3"
FILES = "files"
PART = ".part"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def lock(directory: Path) -> int:
    """``hold``, with the places in it where SQLite's store keeps database and files."""
    try:
        make_directory(directory)
        (directory / FILES).mkdir(mode=0o700, exist_ok=True)
        (directory / DATABASE).touch(mode=0o600)  # SQLite would make it readable to all; its other files follow it.
    except OSError as error:
        raise disk_error(error, directory) from error
    return hold(directory)


def hold(directory: Path) -> int:
    """Make the directory and take it for this process, until the returned descriptor is closed.

    Prompts and answers lie in it, so it is its owner's alone. The lock is the kernel's: it is gone as soon as the
    process is, however it ends.
    """
    try:
        make_directory(directory)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise disk_error(error, directory) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreLocked(f"{directory}: in use by another process (pid {holder})") from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError:
        pass  # On a full disk the lock holds as well; only the pid in the message is missing.
    return descriptor


def make_directory(directory: Path) -> None:
    """Raises OSError."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)


def make_private(directory: Path) -> list[str]:
    """Take from everybody but the owner what they may do with the directory and all that is in it. Returns what could
    not be changed, in words. Links are left alone: they lead elsewhere."""
    complaints = []
    for path, mode in open_to_others(directory):
        try:
            path.chmod(mode & 0o700)
        except OSError as error:
            complaints.append(f"{path} can be used by others (mode {mode:03o}): {error.strerror}")
    return complaints


def open_to_others(directory: Path) -> Iterator[tuple[Path, int]]:
    """What others than the owner may use, each with its mode."""
    for place, _, names in os.walk(directory):
        for path in (Path(place), *(Path(place, name) for name in names)):
            try:
                # The directory itself may be a link; what is in it must not lead us out of it.
                about = path.stat() if path == directory else path.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISLNK(about.st_mode) and about.st_mode & 0o077:
                yield path, stat.S_IMODE(about.st_mode)


def file_path(directory: Path, file_id: str) -> Path:
    return directory / FILES / file_id


def part_path(directory: Path, file_id: str) -> Path:
    """Where an upload is while it comes in."""
    return directory / FILES / (file_id + PART)


def remove_files(directory: Path, file_ids: list[str]) -> None:
    for file_id in file_ids:
        file_path(directory, file_id).unlink(missing_ok=True)


def remove_parts(directory: Path) -> None:
    """Remove what is left of uploads that were cut off."""
    for path in (directory / FILES).glob(f"*{PART}"):
        path.unlink(missing_ok=True)


def unknown_files(directory: Path, known: set[str]) -> list[Path]:
    """Files without a row."""
    return sorted(path for path in (directory / FILES).iterdir() if path.name not in known)


def sync_directory(directory: Path) -> None:
    """Put the names of the files in it on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(directory: Path, reserve_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < reserve_bytes:
        raise StoreFull(
            f"{directory}: {free >> 20} MiB free on the disk, {reserve_bytes >> 20} MiB are kept for results of "
            "accepted work"
        )


def disk_error(error: OSError, path: Path) -> StoreError:
    if error.errno in _NO_ROOM:
        return StoreFull(f"{path}: no room on the disk ({error.strerror})")
    return StoreError(f"{path}: {error.strerror}")
