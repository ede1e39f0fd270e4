"""Uploaded files: written as they come, and known once their row is committed.

While it comes in a file is called ``ID.part``; what is left of such files is removed when the store opens. What makes
it a file of the store is its row. Its content and its final name are on disk before the row is.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from io import FileIO
from pathlib import Path
from threading import Lock

from chiron.store.directory import check_room, disk_error, file_path, part_path, sync_directory
from chiron.store.port import StoreClosed, StoredFile, StoreError, TooLarge
from chiron.store.settings import StoreSettings
from chiron.store.sums import BlockSums

RunInThread = Callable[[Callable[[], None]], Awaitable[None]]
BUFFER_BYTES = 1 << 20


class FileUpload:
    """Implements ``Upload``. ``insert`` commits the row, with the sums of the content's blocks, and says when the file
    was made and when it goes."""

    def __init__(
        self,
        *,
        directory: Path,
        file: StoredFile,
        bytes_max: int,
        settings: StoreSettings,
        in_thread: RunInThread,
        insert: Callable[[StoredFile, float | None, bytes], Awaitable[StoredFile]],
        on_end: Callable[[FileUpload], None],
    ) -> None:
        self.purpose = file.purpose
        self.expires_after_s: float | None = None
        self._directory = directory
        self._file = file
        self._path = part_path(directory, file.id)
        self._bytes_max = bytes_max
        self._settings = settings
        self._in_thread = in_thread
        self._insert = insert
        self._on_end = on_end
        self._buffer: list[bytes] = []
        self._buffered = 0
        self._bytes = 0
        self._sums = BlockSums()
        self._stream: FileIO | None = None
        self._ended = False
        self._failed = False
        """Something is missing on disk: it can only be aborted."""
        self._known = False
        """Its row is written, or being written: its content stays."""
        self._disk = Lock()
        """Nothing is removed or closed while it is written."""

    async def write(self, data: bytes) -> None:
        self._require_open()
        if self._bytes + len(data) > self._bytes_max:
            self._failed = True
            raise TooLarge(f"{self._file.filename!r}: larger than {self._bytes_max} bytes")
        self._bytes += len(data)
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= BUFFER_BYTES:
            await self._in_thread(self._flush)

    async def commit(self) -> StoredFile:
        self._require_open()
        await self._in_thread(self._flush_to_disk)
        self._require_open()
        file = StoredFile(
            id=self._file.id,
            purpose=self.purpose,
            filename=self._file.filename,
            bytes=self._bytes,
            created_s=self._file.created_s,
            owner=self._file.owner,
        )
        self._known = True
        try:
            file = await self._insert(file, self.expires_after_s, self._sums.packed())
        except StoreError:
            self._known, self._failed = False, True
            raise
        self._end()
        return file

    async def abort(self) -> None:
        if not self._ended and not self._known:
            self._end()
            await self._in_thread(self._discard)

    def _require_open(self) -> None:
        if self._ended or self._failed:
            raise StoreClosed(f"{self._file.filename!r}: the upload has {'ended' if self._ended else 'failed'}")

    def _end(self) -> None:
        self._ended = True
        self._on_end(self)

    def _flush(self) -> None:
        with self._disk:
            self._require_open()
            self._write_out()

    def _write_out(self) -> None:
        self._failed = True
        try:
            check_room(self._directory, self._settings.reserve_bytes)
            if self._stream is None:
                self._stream = FileIO(
                    os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w"
                )
            data = memoryview(b"".join(self._buffer))
            self._sums.add(data)
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._buffer.clear()
        self._buffered = 0
        self._failed = False

    def _flush_to_disk(self) -> None:
        with self._disk:
            self._require_open()
            self._write_out()
            assert self._stream is not None
            self._failed = True
            try:
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._path = self._path.rename(file_path(self._directory, self._file.id))
                sync_directory(self._path.parent)
            except OSError as error:
                raise disk_error(error, self._path) from error
            self._failed = False

    def _discard(self) -> None:
        with self._disk:
            if self._stream is not None:
                self._stream.close()
            self._path.unlink(missing_ok=True)
