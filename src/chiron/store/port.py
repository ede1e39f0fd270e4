"""The port of the durable store of batch work, and the values that it takes and returns.

An implementation guarantees: what an awaited call answered is on disk; each item of an accepted batch ends with exactly
one result line, whatever is killed when; and memory does not grow with the size of a file or a batch.

Times named ``_s`` are wall-clock seconds since the epoch, or durations in seconds. ``owner`` is the name of an API key
("" where no keys are used): a key sees its own files and batches only, and ``owner=None`` sees all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from chiron.store.trusted_clock import ClockMarks


class StoreError(Exception):
    """An operation of the store failed. The message says which and why."""


class NotFound(StoreError):  # noqa: N818
    """No such file, batch or cursor, or it belongs to another key."""


class Conflict(StoreError):  # noqa: N818
    """The operation does not fit the state: deleting a file in use, cancelling an ended batch."""


class TooLarge(StoreError):  # noqa: N818
    """More bytes than the caller allowed."""


class StoreFull(StoreError):  # noqa: N818
    """No room on the disk or in the quota. Nothing was changed; the same call works once there is room."""


class StoreLocked(StoreError):  # noqa: N818
    """Another process has the directory open."""


class StoreCorrupt(StoreError):  # noqa: N818
    """The database is damaged, or not one of ours."""


class StoreDamaged(StoreError):  # noqa: N818
    """The requested data is damaged on the disk: the message names it. The rest of the store is served."""


class StoreUnavailable(StoreError):  # noqa: N818
    """The store cannot be used for now; the message says why. It may be later."""


class StoreClosed(StoreError):  # noqa: N818
    """The store is not open, or is closing."""


BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})
"""Statuses that a batch never leaves."""
RUNNING = ("in_progress", "finalizing", "cancelling")
"""Statuses in which results come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    """``file-`` and hexadecimal digits."""
    purpose: str
    filename: str
    bytes: int
    created_s: float
    owner: str
    expires_s: float | None = None
    """When it is deleted; later if a batch still needs it then. None: after the retention."""
    status: str = "processed"
    batch_id: str | None = None
    """The batch whose output or error lines this is; None for an uploaded file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """Why a line of an input file cannot be used."""

    code: str
    """A low-cardinality constant, such as ``invalid_json_line``."""
    message: str
    param: str | None = None
    """The field at fault."""
    line: int | None = None
    """1 is the first line. The store sets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemSpec:
    """What ``check`` found out about a line of an input file."""

    custom_id: str
    model: str
    input_bytes: int
    """Size of the prompt, to estimate the work: summed up, plain and squared, in ``PendingWork``."""
    body_offset: int = 0
    """Where, in the line that ``check`` got, the bytes begin that ``Item.body`` shall hold."""
    body_bytes: int | None = None
    """How many bytes those are; None: to the end of the line. So by default ``Item.body`` is the whole line."""


Check = Callable[[bytes], ItemSpec | LineError]
"""Reads one line (UTF-8, no byte order mark, stripped, not empty). Pure, and called on a thread of the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLimits:
    """What an input file may hold."""

    items_max: int = 1_000_000
    """Lines that are not blank. Checking for duplicate ids takes about 30 bytes of memory each meanwhile."""
    line_bytes_max: int = 8 << 20
    errors_max: int = 100
    """Errors kept for the user. Reading stops at as many."""

    def __post_init__(self) -> None:
        assert 0 < self.items_max < 1 << 32, self.items_max
        assert self.line_bytes_max > 0, self.line_bytes_max
        assert self.errors_max > 0, self.errors_max


class TokenUsage(NamedTuple):
    """Tokens that answers took."""

    input: int = 0
    cached: int = 0
    """Of the input: not computed again."""
    output: int = 0
    reasoning: int = 0
    """Of the output: not shown."""


NO_TOKENS = TokenUsage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch and its progress. Counts are exact as of the last commit."""

    id: str
    """``batch_`` and hexadecimal digits."""
    owner: str
    input_file_id: str
    endpoint: str
    completion_window: str
    """As the user wrote it."""
    status: BatchStatus
    metadata: Mapping[str, str]
    created_s: float
    expires_s: float
    """The deadline."""
    in_progress_s: float | None = None
    finalizing_s: float | None = None
    completed_s: float | None = None
    failed_s: float | None = None
    expired_s: float | None = None
    cancelling_s: float | None = None
    cancelled_s: float | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    """Items with a line in the error file; at the end also those that never ran (``batch_expired``, ...)."""
    errors: tuple[LineError, ...] = ()
    """Why the batch failed as a whole; mostly lines of the input file."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    """Set when the batch ends, each only if it has lines."""
    model: str | None = None
    """None until validated, and when the items name several models."""
    usage: TokenUsage = NO_TOKENS
    """Of all items with a result."""
    recent: tuple[tuple[int, int], ...] = ()
    """(start in seconds, items ended) per slot of ``progress.SLOT_S`` seconds, over the last minute; oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One leased request of a batch."""

    batch_id: str
    index: int
    """Place among the items of the input file, from 0."""
    custom_id: str
    model: str
    endpoint: str
    body: bytes
    """The part of the input line that ``ItemSpec`` pointed at (the whole line by default)."""
    deadline_s: float
    attempts: int
    """Failed attempts so far, as told to ``release``. Survives a restart."""
    owner: str
    damage: str = ""
    """Why ``body`` is empty, if it is: the input file no longer holds the bytes that were accepted. Such an item cannot
    run; it is leased so that it ends with that reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of an item."""

    batch_id: str
    index: int
    ok: bool
    """Whether the line belongs into the output file; else it belongs into the error file."""
    line: bytes
    """JSON without a line break."""
    usage: TokenUsage = NO_TOKENS


def request_id(batch_id: str, index: int) -> str:
    """The id of an item's request and of its result line: the same however often it is tried, and whether it gets an
    answer or not. Of fixed width, so that the size of an error file is known without writing it."""
    return f"batch_req_{batch_id.removeprefix('batch_')}{index:08x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWork:
    """Items of one batch and model that are neither ended nor leased."""

    batch_id: str
    model: str
    deadline_s: float
    items: int
    input_bytes: int
    input_bytes_square: int
    """Sum of the squares: with the count and the sum it gives the spread of lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What ``sweep`` removed."""

    batches: int
    files: int


class Upload(Protocol):
    """A file on its way in. It exists once ``commit`` has returned; a crash before that leaves nothing."""

    purpose: str
    """May be changed until ``commit``, as the next may: a form may name them after the file."""
    expires_after_s: float | None
    """Seconds from ``commit`` until it goes by itself; the retention, if that is shorter."""

    async def write(self, data: bytes) -> None:
        """Raises ``TooLarge`` and ``StoreFull``; the upload can then only be aborted."""

    async def commit(self) -> StoredFile:
        """Raises ``StoreFull``; the upload can then only be aborted."""

    async def abort(self) -> None:
        """Forget it. Does nothing after ``commit`` or a first ``abort``."""


class BatchStore(Protocol):
    """Files, batches and their items. All methods may raise ``StoreError``; ``StoreFull`` where they write."""

    unavailable: str
    """Why it cannot be used although it is wanted, as callers are told (``StoreUnavailable``); empty if it can. Whoever
    opens it may set it."""

    async def open(self) -> None:
        """Take the store. Items leased by a process that is gone are pending again, half-made files are removed.
        Raises ``StoreLocked`` and ``StoreCorrupt``."""

    def hurry(self, within_s: float) -> None:
        """It is to be closed: after that time nothing waits any more for a server that does not answer."""

    async def close(self) -> None:
        """Wait for what was asked and let go. Nothing is lost without it."""

    def on_news(self, tell: Callable[[], None]) -> None:
        """``tell`` is called, on the loop that opened the store, when somebody else made work that can be leased."""

    def report(self) -> Mapping[str, Any]:
        """For the status page."""

    async def begin_file(self, purpose: str, filename: str, owner: str, bytes_max: int) -> Upload: ...

    async def get_file(self, file_id: str, owner: str | None) -> StoredFile: ...

    async def list_files(
        self,
        owner: str | None,
        after: str | None = None,
        limit: int = 100,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> list[StoredFile]:
        """By time of creation, from behind the file ``after``. Ask for one more than a page to know if there is one."""

    async def delete_file(self, file_id: str, owner: str | None) -> None:
        """Raises ``Conflict`` for the input of a batch that has not ended."""

    def read_file(self, file_id: str, owner: str | None) -> AsyncIterator[bytes]:
        """Its content in blocks. Lines of output and error files come in the order of the input. Raises ``NotFound``
        at the first block, or later if the file is deleted meanwhile: the content is never silently cut short."""

    def read_results(self, batch_id: str, ok: bool, owner: str | None = None) -> AsyncIterator[bytes]:
        """The lines there are so far of the output (``ok``) or error file, also of a batch that has not ended."""

    async def create_batch(
        self,
        *,
        owner: str,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        deadline_s: float,
        metadata: Mapping[str, str],
        now_s: float,
        output_expires_after_s: float | None = None,
    ) -> Batch:
        """A batch in ``validating``; its output and error files go by themselves ``output_expires_after_s`` after they
        are made (the retention, if that is shorter). Raises ``NotFound`` if the owner has no such file."""

    async def validate(self, batch_id: str, check: Check, limits: InputLimits) -> Batch:
        """Read the input file and make its lines items. Ends in ``in_progress``, in ``failed`` with the errors, or in
        ``cancelled`` if that was asked meanwhile. Starts over if it is called again after a crash or ``StoreFull``."""

    async def unvalidated(self) -> list[Batch]:
        """Batches in ``validating``, oldest first, but for those that another process is validating."""

    async def get_batch(self, batch_id: str, owner: str | None) -> Batch: ...

    async def list_batches(self, owner: str | None, after: str | None = None, limit: int = 20) -> list[Batch]:
        """Newest first, from behind the batch ``after``."""

    async def cancel_batch(self, batch_id: str, now_s: float, owner: str | None = None) -> Batch:
        """``cancelling`` while items are leased, else ``cancelled``. Raises ``Conflict`` if it ended otherwise."""

    async def lease(
        self,
        model: str,
        limit: int,
        before_deadline_s: float | None = None,
        bytes_max: int | None = None,
        besides: Collection[str] = (),
    ) -> list[Item]:
        """Up to ``limit`` pending items, earliest deadline first, then oldest batch, then input order; no more once
        their bodies have ``bytes_max`` bytes, and none of the batches ``besides``, by id. They are the caller's until
        ``finish``, ``release`` or the end of the process."""

    async def finish(self, ended: Sequence[Ended], now_s: float) -> None:
        """Keep these results. A second result for an item, or one for a batch that has ended, is ignored."""

    async def release(self, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
        """Give leased items, as (batch id, index), back; they are leased again before others of their batch."""

    async def pending(self) -> list[PendingWork]:
        """By deadline."""

    async def clock_marks(self) -> ClockMarks:
        """What was kept last; of a store that never kept any, the newest time that is written in it."""

    async def keep_clock_marks(self, marks: ClockMarks) -> None: ...

    async def expire(self, now_s: float) -> list[str]:
        """Call this every second or so. Batches past their deadline lease nothing any more and are returned, once;
        they are ``finalizing`` while items are leased, then ``expired``, and items that never ran get their line in
        the error file. Also ends batches whose last leased items were released, and removes files that were to go by
        themselves by then, but for inputs of batches that have not ended."""

    async def sweep(self, now_s: float) -> Swept:
        """Remove what ended, and uploads unused, longer ago than the store's retention."""

    async def save_learned(self, name: str, data: bytes) -> None:
        """Keep what was learned in place of what was kept under this name: at most ``learned.LEARNED_BYTES_MAX``, else
        ValueError. A crash leaves the old or the new, whole."""

    async def load_learned(self, name: str) -> bytes | None:
        """What was kept last; None: nothing. Raises ``StoreDamaged`` if it is no longer what was kept."""
