"""What operations ask of a database, and what they get: SQLite's own connection, or one to PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from chiron.store.sums import Row
from chiron.store.trusted_clock import ClockMarks

T = TypeVar("T")


class Cursor(Protocol):
    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...
    def close(self) -> object: ...


class Database(Protocol):
    """Statements have ``?`` for each value."""

    @property
    def keeps_copies(self) -> bool:
        """Whether rows of files and batches are kept twice."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor: ...

    def insert_rows(self, table: str, names: Sequence[str], rows: Collection[Sequence[Any]], replace: bool) -> None:
        """Many at once; ``replace``: rows may be there with the same key (the first column)."""

    def page(self, sql: str, values: Sequence[Any], block_bytes: int) -> Cursor:
        """The first rows of a query that is ordered by ``key`` and has a column ``line``: at least as many as have
        ``block_bytes`` in their lines, and no more of them in memory than about as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the store remembers of itself."""

    commits: int = 0
    """Numbered so far."""
    marks: ClockMarks = field(default_factory=ClockMarks)


def meta_of(row: Row) -> Meta:
    marks = ClockMarks(seen_s=row["seen_s"], trusted_s=row["trusted_s"], doubt_s=row["doubt_s"])
    return Meta(commits=row["commits"], marks=marks)


@dataclass(slots=True)
class Transaction:
    """What an operation works on."""

    db: Database
    meta: Meta
    """An operation may replace it, but for ``commits``."""
    undo: list[Callable[[], None]] = field(default_factory=list)
    """How to take back changes in memory if the transaction is rolled back; called last first."""
    has_chores: bool = False
    """Set by an operation that leaves chores."""
    has_news: bool = False
    """Set by an operation after which there is work to lease that there was not before."""


Operation = Callable[[Transaction], T]


class Leases(Protocol):
    """Who has which item."""

    def count(self, db: Database, batch: int) -> int:
        """Leased items of a batch."""

    def drop(self, transaction: Transaction, batch: int) -> None:
        """The batch has ended."""

    def close(self, transaction: Transaction, batch: int, state: int, keys: Sequence[int]) -> list[Row]:
        """Give open items their final state; they are nobody's any more. Returns key, lane, input_bytes and
        custom_id of those that were open."""
