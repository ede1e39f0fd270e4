"""Settings of the SQLite store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    retention_s: float = 30 * 86_400.0
    """``sweep`` removes batches that ended, and uploads unused, this long ago. ``inf`` keeps them for ever."""
    reserve_bytes: int = 256 << 20
    """Uploads are refused when they would leave less room than this on the disk: accepted work still has to write
    its results."""
    database_bytes_max: int = 1 << 40
    """The database (items and results, not uploaded files) may grow to this; ``StoreFull`` beyond."""
    operations_max: int = 1_000
    """Operations of callers in flight at a time; further callers wait."""
    group_max: int = 256
    """Operations committed in one transaction, with one wait for the disk."""
    read_threads: int = 3
    """Threads that read files and results."""
    upload_threads: int = 2
    """Threads that write uploads: a large one waits for the disk for seconds at its end."""
    block_bytes: int = 256 << 10
    """Files and results are read in blocks of about this size: what a slow reader holds in memory."""
    check_bytes_max: int = 64 << 20
    """A database up to this size is checked for damage as it is opened (a tenth of a second); of a larger one only
    what is touched."""

    check_first_bytes_max: int = 1 << 30
    """A file or an output up to this size is checked from end to end before its first byte is given out, once per
    start; a larger one while it is given out, which then breaks off where it is damaged."""
    lost_files_max: int = 1_000
    """Files that may lie in ``lost+found``. Beyond it unknown files stay where they are, and nothing is mended that
    would first be put aside."""
    lost_bytes_max: int = 16 << 30
    """The same in bytes."""

    def __post_init__(self) -> None:
        sizes = ("reserve_bytes", "check_bytes_max", "check_first_bytes_max", "lost_files_max", "lost_bytes_max")
        for name in ("retention_s", *sizes):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be 0 or more")
        for name in ("operations_max", "group_max", "read_threads", "upload_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be 1 or more")
        if self.block_bytes < 4096:
            raise ValueError(f"block_bytes: {self.block_bytes!r} must be 4096 or more")
        if self.database_bytes_max < 1 << 20:
            raise ValueError(f"database_bytes_max: {self.database_bytes_max!r} must be at least 1 MiB")
