"""Checksums of what is stored: every row and every block of an uploaded file has one, checked whenever it is read.

A row's sum is a CRC-32 over its values and its key, salted with its table: a row that fits its sum is a row that we
wrote, whatever page of the disk it was found on. Items change in two numbers only, their state and their attempts.
These are added to the sum with factors of their own, so that SQL can keep it up to date without reading the row, and
so that a sum that was wrong before stays wrong after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol
from zlib import crc32

from chiron.store.port import StoreDamaged


class Row(Protocol):
    """Values by name; iterated in the order of the columns."""

    def __getitem__(self, name: str, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


COLUMNS: dict[str, tuple[str, ...]] = {
    "meta": ("no", "schema", "commits", "seen_s", "trusted_s", "doubt_s"),
    "files": (
        *("no", "id", "purpose", "filename", "bytes", "created_s", "owner", "batch_id", "state", "expires_s"),
        "block_sums",
    ),
    "batches": (
        *("no", "id", "owner", "input_file_id", "endpoint", "completion_window", "status", "metadata"),
        *("created_s", "expires_s", "in_progress_s", "finalizing_s", "completed_s"),
        *("failed_s", "expired_s", "cancelling_s", "cancelled_s"),
        *("total", "completed", "failed", "errors", "output_file_id", "error_file_id", "model", "recent"),
        *("output_bytes", "error_bytes", "output_expires_after_s", "lanes", "incomplete", "usage"),
    ),
    "work": ("batch", "lane", "model", "items", "input_bytes", "input_bytes_square", "id_bytes"),
    "purges": ("no", "batch", "state", "next_key"),
    "copies": ("no", "row"),
}
"""Tables whose rows have a ``sum`` over all their other columns, in the order of the table. ``items`` and ``results``
have functions of their own below."""

REALS = {
    table: tuple(place for place, name in enumerate(names) if name.endswith("_s")) for table, names in COLUMNS.items()
}
"""Places of the columns of floats; SQLite keeps those that are whole numbers as integers."""

SALTS = {table: crc32(table.encode()) for table in (*COLUMNS, "items", "results")}
STATE_FACTOR = 0x1_D1B5_4A33
ATTEMPT_FACTOR = 0x1F_9E37_79B1

BLOCK_BYTES = 256 << 10
"""Uploads have a sum per block of this size."""


def row_sum(table: str, values: Sequence[object]) -> int:
    """Of the values of ``COLUMNS[table]``."""
    plain = list(values)
    for place in REALS[table]:
        value = plain[place]
        if type(value) is int:
            plain[place] = float(value)
    return crc32(repr(plain).encode(errors="surrogatepass"), SALTS[table])


def check_row(table: str, row: Row, what: str) -> Row:
    """The row, if it fits its sum; ``what`` names it. The row has all columns of the table in order, the sum last."""
    *values, found = row
    if row_sum(table, values) != found:
        raise StoreDamaged(f"{what}: its row in the database is damaged")
    return row


def item_sum(
    key: int,
    state: int,
    lane: int,
    attempts: int,
    offset: int,
    size: int,
    input_bytes: int,
    custom_id: str,
    body_sum: int | None,
) -> int:
    fixed = crc32(f"{key} {lane} {offset} {size} {input_bytes} {body_sum} {custom_id}".encode(), SALTS["items"])
    return fixed + state * STATE_FACTOR + attempts * ATTEMPT_FACTOR


ITEM_COLUMNS = ("key", "state", "lane", "attempts", "offset", "bytes", "input_bytes", "custom_id", "body_sum")
"""The arguments of ``item_sum``, in order."""


def item_fits(row: Row) -> bool:
    """Whether an item's row, with at least ``ITEM_COLUMNS`` and ``sum``, is as it was written."""
    values = [row[name] for name in ITEM_COLUMNS]
    *numbers, custom_id, _ = values
    if any(type(number) is not int for number in numbers) or type(custom_id) is not str:
        return False  # A damaged header gives values of other types, with which there is no reckoning.
    return bool(item_sum(*values) == row["sum"])


def result_sum(key: int, state: int, line: bytes) -> int:
    """``state``: of the item, so that a result cannot change from the output to the errors unnoticed."""
    return crc32(line, crc32(b"%d" % key, SALTS["results"])) + state * STATE_FACTOR


def result_fits(key: int, state: int, line: object, found: object) -> bool:
    return isinstance(line, bytes) and result_sum(key, state, line) == found


class BlockSums:
    """Sums of a file that comes in pieces of any size."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._running = 0
        self._filled = 0

    def add(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            piece = view[: BLOCK_BYTES - self._filled]
            self._running = crc32(piece, self._running)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == BLOCK_BYTES:
                self._sums.append(self._running)
                self._running = self._filled = 0

    def packed(self) -> bytes:
        """Four bytes per block, the last one for what is left."""
        return pack([*self._sums, self._running] if self._filled else self._sums)


def pack(sums: Iterable[int]) -> bytes:
    return b"".join(one.to_bytes(4, "big") for one in sums)


def unpack(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[at : at + 4], "big") for at in range(0, len(packed), 4)]
