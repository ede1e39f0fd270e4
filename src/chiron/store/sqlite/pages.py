"""Rows found on the pages of a damaged database, without its trees.

Every leaf of a table says which rows lie on it; that is all that is read. Which table a row belongs to, and whether it
is what was written, its checksum says: so a damaged tree above the leaves, a damaged schema or a damaged header costs
nothing, and what was not written by us cannot pass for a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import error as StructError  # noqa: N812
from struct import unpack_from
from typing import Any

from chiron.store.jobs.rows import FAILED, OK
from chiron.store.sqlite.database import PAGE_BYTES
from chiron.store.sqlite.wal import Frame, Log
from chiron.store.sums import COLUMNS, ITEM_COLUMNS, item_sum, result_fits, row_sum

LEAF = 0x0D
_LOCAL_MAX = PAGE_BYTES - 35
_LOCAL_MIN = (PAGE_BYTES - 12) * 32 // 255 - 23
_SLOTS_MAX = (PAGE_BYTES - 8) // 2


class Damaged(Exception):  # noqa: N818
    """What stands here is no cell or no record."""


@dataclass(frozen=True, slots=True)
class Found:
    """A row that fits its sum."""

    table: str
    key: int
    values: tuple[Any, ...]
    """Of the columns that the sum covers; of ``results`` the key, the line and the state of its item."""


class Pages:
    """The newest known state of each page: from the log where it has one, else from the database."""

    def __init__(self, database: Path, log_path: Path, log: Log) -> None:
        self._database = _mapped(database)
        self._log = _mapped(log_path) if log.frames else b""
        self.count = -(-len(self._database) // PAGE_BYTES)
        self._newest: dict[int, Frame | None] = {}
        """None: the newest state is damaged."""
        self._older: dict[int, Frame] = {}
        for frame in _counting(log):
            if frame.fits:
                self._newest[frame.page] = self._older[frame.page] = frame
                self.count = max(self.count, frame.page)
            elif 0 < frame.page <= self.count + len(log.frames):
                self._newest[frame.page] = None

    def newest(self, number: int) -> bytes | None:
        frame = self._newest.get(number, _IN_DATABASE)
        if frame is None:
            return None
        return self._of_database(number) if frame is _IN_DATABASE else self._of_log(frame)

    def older(self, number: int) -> bytes | None:
        """The state before the newest, where that is damaged."""
        if self._newest.get(number, _IN_DATABASE) is not None:
            return None
        frame = self._older.get(number)
        return self._of_database(number) if frame is None else self._of_log(frame)

    def _of_database(self, number: int) -> bytes | None:
        page = self._database[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]
        return page.ljust(PAGE_BYTES, b"\0") if page else None

    def _of_log(self, frame: Frame) -> bytes:
        return self._log[frame.offset : frame.offset + PAGE_BYTES]

    def rows(self, *, meta_only: bool = False) -> Iterator[Found]:
        """All rows that can be found; of a row that is there in several states the order says nothing. ``meta_only``:
        only that of ``meta`` is asked for, which is alone on its page."""
        for number in range(1, self.count + 1):
            yield from self.rows_on(number, meta_only=meta_only)

    def rows_on(self, number: int, *, meta_only: bool = False) -> Iterator[Found]:
        """The rows of one page."""
        for page in (self.newest(number), self.older(number)):
            if page is not None and not (meta_only and page[3:5] != b"\0\1"):
                yield from self._rows_on(page, 100 if number == 1 else 0)

    def _rows_on(self, page: bytes, begin: int) -> Iterator[Found]:
        # A flipped bit or two in the kind of a page does not hide what is on it.
        if (page[begin] ^ LEAF).bit_count() > 2:
            return
        cells = unpack_from(">H", page, begin + 3)[0]
        for slot in range(_SLOTS_MAX - begin // 2):
            offset = unpack_from(">H", page, begin + 8 + 2 * slot)[0]
            # The count of cells may be what is damaged: their places go on for as long as there are any.
            if slot >= cells and offset == 0:
                return
            try:
                found = identify(*self._cell(page, offset))
            except (Damaged, IndexError, ValueError, OverflowError, StructError):
                continue
            if found is not None:
                yield found

    def _cell(self, page: bytes, offset: int) -> tuple[int, list[Any]]:
        if not 8 < offset < PAGE_BYTES - 3:
            raise Damaged
        size, offset = _varint(page, offset)
        key, offset = _varint(page, offset)
        if size > len(self._database) + len(self._log) + PAGE_BYTES:
            raise Damaged
        if size <= _LOCAL_MAX:
            payload = page[offset : offset + size]
        else:
            local = _LOCAL_MIN + (size - _LOCAL_MIN) % (PAGE_BYTES - 4)
            local = local if local <= _LOCAL_MAX else _LOCAL_MIN
            payload = self._overflowing(page[offset : offset + local], unpack_from(">I", page, offset + local)[0], size)
        if len(payload) != size:
            raise Damaged
        return key, _record(payload)

    def _overflowing(self, local: bytes, number: int, size: int) -> bytes:
        pieces, have = [local], len(local)
        while have < size:
            page = self.newest(number) if 0 < number <= self.count else None
            if page is None:
                raise Damaged
            number = unpack_from(">I", page, 0)[0]
            pieces.append(page[4 : 4 + size - have])
            have += len(pieces[-1])
        return b"".join(pieces)


def _mapped(path: Path) -> bytes | mmap:
    """The content of a file, without reading it."""
    if not path.exists() or path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_READ)


_IN_DATABASE = Frame(page=0, is_commit=False, offset=0, fits=True)


def _counting(log: Log) -> Sequence[Frame]:
    """The frames that were committed, as far as one can tell: up to the last commit, or all if a commit may be among
    those that are damaged behind it."""
    frames = log.frames
    last = max((place for place, frame in enumerate(frames) if frame.fits and frame.is_commit), default=-1)
    behind = any(not frame.fits for frame in frames[last + 1 :])
    return frames if behind else frames[: last + 1]


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for place in range(8):
        byte = data[offset + place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, offset + place + 1
    value = value << 8 | data[offset + 8]
    return value - (1 << 64) if value >= 1 << 63 else value, offset + 9


_WIDTHS = (0, 1, 2, 3, 4, 6, 8)


def _record(payload: bytes) -> list[Any]:
    """The values of a record in SQLite's format."""
    end, offset = _varint(payload, 0)
    if not 0 < end <= len(payload):
        raise Damaged
    kinds = []
    while offset < end:
        kind, offset = _varint(payload, offset)
        kinds.append(kind)
    if offset != end:
        raise Damaged
    values = []
    for kind in kinds:
        value, offset = _value(payload, offset, kind)
        values.append(value)
    if offset != len(payload):
        raise Damaged
    return values


def _value(payload: bytes, offset: int, kind: int) -> tuple[Any, int]:
    if kind == 0:
        return None, offset
    if kind in (8, 9):
        return kind - 8, offset
    if 0 < kind < 7:
        end = offset + _WIDTHS[kind]
        return int.from_bytes(payload[offset:end], "big", signed=True), end
    if kind == 7:
        return unpack_from(">d", payload, offset)[0], offset + 8
    if kind < 12:
        raise Damaged
    end = offset + (kind - 12) // 2
    data = payload[offset:end]
    if len(data) != end - offset:
        raise Damaged
    return (data.decode() if kind % 2 else data), end


_BY_WIDTH = {len(columns) + 1: table for table, columns in COLUMNS.items() if table not in ("work", "copies")}
"""``work`` has no rows of this kind, and can be reckoned from the items."""
assert len(_BY_WIDTH) == len(COLUMNS) - 2


def identify(key: int, values: list[Any]) -> Found | None:
    """Whose row it is, if it is one."""
    if not values or values[0] is not None:
        return None  # The key of each of our tables is the number of its row, which a record leaves out.
    values[0] = key
    *fixed, total = values
    if len(values) == len(ITEM_COLUMNS) + 1:
        return _item(key, fixed, total)
    if len(values) == 3:
        return _result_or_copy(key, fixed, total)
    table = _BY_WIDTH.get(len(values))
    if table is not None and row_sum(table, fixed) == total:
        return Found(table, key, tuple(fixed))
    return None


def _item(key: int, fixed: list[Any], total: Any) -> Found | None:
    *numbers, custom_id, _ = fixed
    if any(type(number) is not int for number in numbers) or type(custom_id) is not str or item_sum(*fixed) != total:
        return None
    return Found("items", key, tuple(fixed))


def _result_or_copy(key: int, fixed: list[Any], total: Any) -> Found | None:
    line = fixed[1]
    if isinstance(line, bytes):
        state = next((state for state in (OK, FAILED) if result_fits(key, state, line, total)), None)
        return None if state is None else Found("results", key, (key, line, state))
    return Found("copies", key, tuple(fixed)) if row_sum("copies", fixed) == total else None
