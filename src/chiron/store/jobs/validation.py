"""From an input file to items, on a thread of its own, a block of lines at a time.

Blocks are committed as they come, between the work of others; the batch runs only once the last one is in. After a
crash the file is simply read again: the rows of the first attempt are overwritten by equal ones. A batch of which the
disk has lost items is read again as well, and gets those that are missing.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from io import BufferedReader, RawIOBase
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from chiron.store.jobs.batches import fail_validation, find_batch, find_file, update_batch
from chiron.store.jobs.database import Operation, Transaction
from chiron.store.jobs.recount import add_missing, end_mending
from chiron.store.jobs.results import id_size
from chiron.store.jobs.rows import OPEN, item_key, write_row
from chiron.store.port import Check, InputLimits, ItemSpec, LineError, NotFound, StoreDamaged, StoreError
from chiron.store.sums import BLOCK_BYTES, ITEM_COLUMNS, Row, item_sum

BLOCK_ITEMS = 500
"""Items per transaction: a few milliseconds of the writer's time."""
_BOM = b"\xef\xbb\xbf"
_Row = tuple[int, int, int, int, int, int, int, str, int]


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    """1 is the first."""
    offset: int
    """Where ``text`` begins in the file."""
    text: bytes | None
    """Stripped; None if it was too long."""


def read_lines(stream: BinaryIO, line_bytes_max: int) -> Iterator[Line]:
    """Lines that are not blank. No more than one of them is in memory."""
    offset = number = 0
    while raw := stream.readline(line_bytes_max + 2):
        number += 1
        size = len(raw)
        too_long = False
        while not raw.endswith(b"\n") and (more := stream.readline(1 << 20)):
            # The rest of a long line is read and dropped.
            too_long = True
            size += len(more)
            raw = more
        if too_long:
            yield Line(number, offset, None)
        else:
            bare = raw.removeprefix(_BOM) if offset == 0 else raw
            text = bare.lstrip()
            begin = offset + len(raw) - len(text)
            text = text.rstrip()
            if text:
                yield Line(number, begin, text if len(text) <= line_bytes_max else None)
        offset += size


@dataclass(slots=True)
class _Work:
    """Sums over the items of one model."""

    lane: int
    items: int = 0
    input_bytes: int = 0
    input_bytes_square: int = 0
    id_bytes: int = 0


@dataclass(slots=True)
class _Findings:
    work: dict[str, _Work] = field(default_factory=dict)
    hashes: array[int] = field(default_factory=lambda: array("q"))
    """Hash of each item's custom id, by index; the numbers of their lines beside it."""
    lines: array[int] = field(default_factory=lambda: array("q"))
    errors: list[LineError] = field(default_factory=list)


class Validation:
    """Validates one batch. ``run`` blocks; everything it writes goes through ``submit``, and ``ask`` only reads.
    ``open_input`` raises FileNotFoundError if the content is gone, and StoreError."""

    def __init__(
        self,
        batch_id: str,
        open_input: Callable[[Row], RawIOBase],
        check: Check,
        limits: InputLimits,
        submit: Callable[[Operation[bool]], Future[bool]],
        ask: Callable[[Operation[Any]], Future[Any]],
        now: Callable[[], float],
    ) -> None:
        self._batch_id = batch_id
        self._open_input = open_input
        self._check = check
        self._limits = limits
        self._submit = submit
        self._ask = ask
        self._now = now
        self._found = _Findings()
        self._mending = False
        self._line = 0
        self._committing: Future[bool] | None = None

    def run(self) -> None:
        """Raises ``StoreError`` with the batch left as it is: validate it again later."""
        self._mending = bool(self._ask(self._is_mended).result())
        try:
            file = self._ask(self._input).result()
            with BufferedReader(self._open_input(file), BLOCK_BYTES) as stream:
                if not self._read_items(stream):
                    return
        except (FileNotFoundError, NotFound) as error:
            why = error.strerror if isinstance(error, FileNotFoundError) else "the store does not know it"
            message = f"the input file cannot be read: {why}"
            self._found.errors.append(LineError(code="input_file_missing", message=message, param="input_file_id"))
        except OSError as error:
            raise StoreError(f"the input of batch {self._batch_id!r} cannot be read: {error.strerror}") from error
        found = self._found
        if self._mending:
            self._submit(self._end_mending).result()
            return
        if not found.hashes and not found.errors:
            message = "the input file holds no request"
            found.errors.append(LineError(code="empty_file", message=message, param="input_file_id"))
        candidates = _same_hashes(found.hashes)
        self._submit(lambda transaction: self._end(transaction, candidates)).result()

    def _is_mended(self, transaction: Transaction) -> bool:
        """Whether this batch ran already, and only lacks items that the disk has lost."""
        return bool(find_batch(transaction.db, self._batch_id)["incomplete"])

    def _input(self, transaction: Transaction) -> Row:
        batch = find_batch(transaction.db, self._batch_id)
        return find_file(transaction.db, batch["input_file_id"])

    def _read_items(self, stream: BinaryIO) -> bool:
        """False if the batch was cancelled meanwhile."""
        try:
            return self._insert_items(stream)
        except StoreDamaged as error:
            line = self._line + 1
            self._found.errors.append(
                LineError(code="input_file_damaged", message=str(error), param="input_file_id", line=line)
            )
            return self._settle()

    def _insert_items(self, stream: BinaryIO) -> bool:
        """False if the batch was cancelled meanwhile."""
        limits, errors = self._limits, self._found.errors
        rows: list[_Row] = []
        for line in read_lines(stream, limits.line_bytes_max):
            self._line = line.number
            if len(self._found.hashes) == limits.items_max:
                message = f"the file holds more than {limits.items_max} requests"
                errors.append(LineError(code="too_many_requests", message=message, line=line.number))
                break
            spec = self._spec(line)
            if isinstance(spec, LineError):
                errors.append(replace(spec, line=line.number))
                if len(errors) == limits.errors_max:
                    break
                continue
            rows.append(self._row(line, spec))
            if len(rows) == BLOCK_ITEMS:
                if not self._insert(rows):
                    return False
                rows = []
        return self._insert(rows) and self._settle()

    def _row(self, line: Line, spec: ItemSpec) -> _Row:
        """The row of a line's item but for its batch."""
        found = self._found
        assert line.text is not None
        size = len(line.text) - spec.body_offset if spec.body_bytes is None else spec.body_bytes
        assert 0 <= spec.body_offset <= spec.body_offset + size <= len(line.text), spec
        assert spec.input_bytes >= 0, spec
        index = len(found.hashes)
        found.hashes.append(hash(spec.custom_id))
        found.lines.append(line.number)
        work = found.work.setdefault(spec.model, _Work(len(found.work)))
        work.items += 1
        work.input_bytes += spec.input_bytes
        work.input_bytes_square += spec.input_bytes * spec.input_bytes
        work.id_bytes += id_size(spec.custom_id)
        body_sum = crc32(line.text[spec.body_offset : spec.body_offset + size])
        offset = line.offset + spec.body_offset
        return (index, OPEN, work.lane, 0, offset, size, spec.input_bytes, spec.custom_id, body_sum)

    def _spec(self, line: Line) -> ItemSpec | LineError:
        if line.text is None:
            message = f"the line is longer than {self._limits.line_bytes_max} bytes"
            return LineError(code="line_too_long", message=message)
        if not line.text.isascii():
            try:
                line.text.decode()
            except UnicodeDecodeError as error:
                message = f"the line is not UTF-8: byte {error.start + 1} is 0x{line.text[error.start]:02x}"
                return LineError(code="invalid_json_line", message=message)
        spec = self._check(line.text)
        if isinstance(spec, ItemSpec):
            for name, value in (("custom_id", spec.custom_id), ("model", spec.model)):
                if value.encode(errors="replace").decode() != value:
                    message = f"{value!r} holds half of a surrogate pair, which is no character"
                    return LineError(code="invalid_json_line", message=message, param=name)
            if "\0" in spec.model:
                message = "the model's name holds the character U+0000"
                return LineError(code="invalid_json_line", message=message, param="model")
        return spec

    def _insert(self, rows: list[_Row]) -> bool:
        def insert(transaction: Transaction) -> bool:
            batch = find_batch(transaction.db, self._batch_id)
            base = item_key(batch["no"], 0)
            if self._mending:
                add_missing(transaction.db, batch, [(base + row[0], *row[1:]) for row in rows])
                return bool(batch["incomplete"])
            if batch["status"] != "validating":
                return False
            summed = [(base + row[0], *row[1:], item_sum(base + row[0], *row[1:])) for row in rows]
            transaction.db.insert_rows("items", (*ITEM_COLUMNS, "sum"), summed, True)
            return True

        # The next block is read while this one is committed.
        if not self._settle():
            return False
        self._committing = self._submit(insert)
        return True

    def _settle(self) -> bool:
        """Wait for the block under way; False if the batch was cancelled meanwhile."""
        return self._committing is None or self._committing.result()

    def _end_mending(self, transaction: Transaction) -> bool:
        batch = find_batch(transaction.db, self._batch_id)
        if batch["incomplete"]:
            end_mending(transaction.db, batch, "; ".join(error.message for error in self._found.errors))
        return True

    def _end(self, transaction: Transaction, candidates: list[tuple[int, int]]) -> bool:
        """Accept the batch, or fail it."""
        db = transaction.db
        batch = find_batch(db, self._batch_id)
        if batch["status"] != "validating":
            return False
        no, found = batch["no"], self._found
        errors = [*found.errors, *_duplicates(transaction, no, candidates, found.lines, self._limits.errors_max)]
        if errors:
            errors.sort(key=lambda error: error.line or 0)
            fail_validation(transaction, no, errors[: self._limits.errors_max], self._now())
            return True
        for name, work in found.work.items():
            write_row(db, "work", asdict(work) | {"batch": no, "model": name})
        model = next(iter(found.work)) if len(found.work) == 1 else None
        lanes = json.dumps(list(found.work))
        total = len(found.hashes)
        transaction.has_news = True
        update_batch(db, no, status="in_progress", in_progress_s=self._now(), total=total, model=model, lanes=lanes)
        return True


def _same_hashes(hashes: array[int]) -> list[tuple[int, int]]:
    """Pairs of indices with equal hashes: each index with the last one before it, in order."""
    if not hashes:
        return []
    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    places = np.flatnonzero(np.diff(values[order]) == 0)
    earlier, later = order[places], order[places + 1]
    by_later = np.argsort(later)
    return list(zip(earlier[by_later].tolist(), later[by_later].tolist(), strict=True))


def _duplicates(
    transaction: Transaction, batch: int, candidates: list[tuple[int, int]], lines: array[int], errors_max: int
) -> list[LineError]:
    """The first custom ids used again. Hashes found the candidates in a few bytes per item, the rows decide."""

    def custom_id(index: int) -> str:
        key = item_key(batch, index)
        found: str = transaction.db.execute("SELECT custom_id FROM items WHERE key = ?", (key,)).fetchone()[0]
        return found

    errors: list[LineError] = []
    first_lines: dict[str, int] = {}
    for earlier, later in candidates:
        first_lines.setdefault(custom_id(earlier), lines[earlier])
        name, line = custom_id(later), lines[later]
        first = first_lines.setdefault(name, line)
        if first != line:
            message = f"custom_id {name!r} was used on line {first} already."
            errors.append(LineError(code="duplicate_custom_id", message=message, param="custom_id", line=line))
        if len(errors) == errors_max:
            break
    return errors
