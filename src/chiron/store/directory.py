"""The directory of a store: one process has it at a time; uploaded files lie in it as plain files."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from chiron.store.database import DATABASE
from chiron.store.port import StoreError, StoreFull, StoreLocked

FILES = "files"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def lock(directory: Path) -> int:
    """Make the directory and take it for this process, until the returned descriptor is closed.

    Prompts and answers lie in it, so a new one is its owner's alone. The lock is the kernel's: it is gone as soon as
    the process is, however it ends.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / FILES).mkdir(exist_ok=True)
        (directory / DATABASE).touch(mode=0o600)  # SQLite would make it readable to all; its other files follow it.
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


def file_path(directory: Path, file_id: str) -> Path:
    return directory / FILES / file_id


def remove_files(directory: Path, file_ids: list[str]) -> None:
    for file_id in file_ids:
        file_path(directory, file_id).unlink(missing_ok=True)


def remove_orphans(directory: Path, known: set[str]) -> None:
    """Remove files without a row: uploads that were cut off, deletions that were not finished."""
    remove_files(directory, [path.name for path in (directory / FILES).iterdir() if path.name not in known])


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
