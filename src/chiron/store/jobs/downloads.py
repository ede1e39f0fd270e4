"""Output and error files as they are given out: whole, or not at all, or broken off where they are damaged.

What is told with the first byte, that a file is whole, cannot be taken back. So a file up to a size is read from end to
end before it, once per start; later readings check as well, and break off.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from chiron.store.jobs.batches import find_batch, find_file
from chiron.store.jobs.database import Database
from chiron.store.jobs.results import Page, begin_reading, read_page
from chiron.store.jobs.rows import OK
from chiron.store.sums import Row

T = TypeVar("T")

KNOWN_MAX: Final = 1_000
"""Files remembered as whole."""


@dataclass(slots=True)
class WholeFiles:
    """Which files need no check before their first byte."""

    bytes_max: int
    """A larger file is checked only while it is given out."""
    _known: dict[str, None] = field(default_factory=dict)
    """The oldest finding first."""

    def is_unchecked(self, file_id: str, size: int) -> bool:
        return size <= self.bytes_max and file_id not in self._known

    def add(self, file_id: str) -> None:
        self._known[file_id] = None
        while len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]


class Read(Protocol):
    """Runs a query in one snapshot of the database."""

    def __call__(self, query: Callable[[Database], T], /) -> Awaitable[T]: ...


async def read_lines(
    read: Read, whole: WholeFiles, batch_id: str, state: int, owner: str | None, block_bytes: int
) -> AsyncIterator[bytes]:
    """The lines of a batch's output (``OK``) or errors (``FAILED``), in blocks of about ``block_bytes``."""
    batch = await read(lambda db: find_batch(db, batch_id, owner))
    file_id = _file_id(batch, state)
    size = batch["output_bytes" if state == OK else "error_bytes"]
    if file_id is not None and whole.is_unchecked(file_id, size):
        async for _ in _pages(read, batch, state, block_bytes):
            pass
        whole.add(file_id)
    async for page in _pages(read, batch, state, block_bytes):
        yield page.lines


async def _pages(read: Read, batch: Row, state: int, block_bytes: int) -> AsyncIterator[Page]:
    reading = begin_reading(batch, state)

    def query(db: Database) -> Page:
        now = find_batch(db, batch["id"])
        file_id = _file_id(now, state)
        if file_id is not None:
            # Its lines go with it.
            find_file(db, file_id)
        return read_page(db, now, reading, block_bytes)

    while (page := await read(query)).lines:
        reading.turn(page)
        yield page


def _file_id(batch: Row, state: int) -> str | None:
    found: str | None = batch["output_file_id" if state == OK else "error_file_id"]
    return found
