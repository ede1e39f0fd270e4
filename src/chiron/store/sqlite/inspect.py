"""Looking for damage before anything is served: first at the log, which SQLite would cut short in silence, then at what
is in the database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from chiron.store.directory import DATABASE
from chiron.store.jobs.recount import keys_of
from chiron.store.jobs.rows import FAILED, LOST, OK, copy_number
from chiron.store.port import StoreDamaged
from chiron.store.sqlite.acknowledged import exists, read_acknowledged
from chiron.store.sqlite.database import (
    APPLICATION_ID,
    INDEXES,
    PAGE_BYTES,
    SCHEMA_VERSION,
    TABLES,
    Connection,
    read_meta,
)
from chiron.store.sqlite.pages import Pages
from chiron.store.sqlite.wal import Log, read_log
from chiron.store.sums import COLUMNS, item_fits, result_fits, row_sum

FIRST_WITH_SUMS = 3
"""Version of the schema."""
_SMALL = ("meta", "files", "batches", "work", "purges", "removals", "copies")


def log_damage(directory: Path) -> str:
    """Why the log must not be left to SQLite; empty if it may be. Raises OSError.

    A log that goes on behind what SQLite would use has a torn tail or is damaged. It is damaged if the database, as
    SQLite would see it, knows fewer commits than were acknowledged; where that number is not known, if a later commit
    began behind what does not fit."""
    log_path = directory / (DATABASE + "-wal")
    log = read_log(log_path)
    if not log.goes_on:
        return ""
    acknowledged = read_acknowledged(directory)
    seen = _commits(directory / DATABASE, log_path, log)
    if acknowledged is not None and seen is not None:
        if seen >= acknowledged:
            return ""
        return f"the log is damaged; {acknowledged - seen} commits that were acknowledged to callers would be lost"
    return "the log is damaged, and later commits follow" if log.is_torn_inside else ""


def _commits(path: Path, log_path: Path, log: Log) -> int | None:
    """How many commits the database would know with what SQLite uses of the log."""
    used = Log(frames=log.frames[: log.used], used=log.used)
    found = (row for row in Pages(path, log_path, used).rows(meta_only=True) if row.table == "meta")
    return max((row.values[COLUMNS["meta"].index("commits")] for row in found), default=None)


def is_ours(path: Path) -> bool:
    """Whether the database, or what is left of it, is ours, and not of a newer version than this, which keeps its
    number in ``meta`` as well."""
    log_path = path.with_name(DATABASE + "-wal")
    pages = Pages(path, log_path, read_log(log_path))
    schema = COLUMNS["meta"].index("schema")
    if any(row.table == "meta" and row.values[schema] > SCHEMA_VERSION for row in pages.rows(meta_only=True)):
        return False
    if read_acknowledged(path.parent) or next(pages.rows(), None) is not None:
        return True
    return _marks(pages) == (APPLICATION_ID, SCHEMA_VERSION)


def is_older(path: Path) -> bool:
    """Whether the database is ours and from before rows had sums: from such a one nothing can be told apart."""
    log_path = path.with_name(DATABASE + "-wal")
    application, version = _marks(Pages(path, log_path, read_log(log_path)))
    return application == APPLICATION_ID and 0 < version < FIRST_WITH_SUMS


def _marks(pages: Pages) -> tuple[int, int]:
    """The application's id and the schema's version, from the first page."""
    first = pages.newest(1) or bytes(PAGE_BYTES)
    return int.from_bytes(first[68:72], "big"), int.from_bytes(first[60:64], "big")


def missing_commits(directory: Path, commits: int) -> str:
    """What to tell of commits that are gone without a trace."""
    acknowledged = read_acknowledged(directory)
    if acknowledged is None:
        if exists(directory):
            return "the number of acknowledged commits is damaged: whether the last ones are all there is not known"
        return ""
    if commits >= acknowledged:
        return ""
    return (
        f"{acknowledged - commits} of {acknowledged} commits that were acknowledged to callers are missing: the end of "
        "the log, or the database, is gone; uploads that came with them are moved to lost+found"
    )


def database_damage(db: Connection, *, full: bool) -> str:
    """What is wrong first; empty if nothing is. ``full``: also every item and result, and every page."""
    try:
        return next(_findings(db, full=full), "")
    except (sqlite3.Error, StoreDamaged) as error:
        return str(error)
    except (TypeError, ValueError, OverflowError) as error:
        return f"a value is of no use: {error}"


def _findings(db: Connection, *, full: bool) -> Iterator[str]:
    schema = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"))
    if schema != TABLES | INDEXES:
        yield "the schema is not what it was"
    if read_meta(db)["schema"] != SCHEMA_VERSION:
        yield "the schema's version is not what it was"
    for check in ("integrity_check(1)",) if full else (f"integrity_check({table})" for table in _SMALL):
        report = db.execute(f"PRAGMA {check}").fetchone()[0]
        if report != "ok":
            yield report
    for table in COLUMNS:
        for row in db.execute(f"SELECT * FROM {table}"):
            *values, found = row
            if row_sum(table, values) != found:
                yield f"a row of {table} does not fit its sum"
    copies = {row["no"] for row in db.execute("SELECT no FROM copies")}
    rows = {
        copy_number(table, row["no"]) for table in ("files", "batches") for row in db.execute(f"SELECT no FROM {table}")
    }
    if copies != rows:
        yield "files and batches are not those of which there are copies"
    if full:
        yield from _deep_findings(db)


def _deep_findings(db: Connection) -> Iterator[str]:
    for row in db.execute("SELECT * FROM items"):
        if not item_fits(row):
            yield "a row of items does not fit its sum"
    for row in db.execute("SELECT key, state, line, results.sum FROM results LEFT JOIN items USING(key)"):
        # Without an item it belongs to a batch that is being removed.
        if row["state"] is not None and not result_fits(row["key"], row["state"], row["line"], row["sum"]):
            yield "a row of results does not fit its sum"
    for batch in db.execute("SELECT * FROM batches WHERE total > 0 AND status != 'validating'").fetchall():
        counts = dict(
            db.execute(
                "SELECT state, count(*) FROM items WHERE key BETWEEN ? AND ? GROUP BY state", keys_of(batch["no"])
            ).fetchall()
        )
        if sum(counts.values()) != batch["total"] and not batch["incomplete"]:
            yield f"batch {batch['id']!r} has {sum(counts.values())} of its {batch['total']} items"
        if counts.get(OK, 0) != batch["completed"] or counts.get(FAILED, 0) + counts.get(LOST, 0) > batch["failed"]:
            yield f"batch {batch['id']!r} does not have the results that it counts"
        yield from _missing_results(db, batch)


def _missing_results(db: Connection, batch: sqlite3.Row) -> Iterator[str]:
    """Items with a result have it, unless the file that it was in has been deleted."""
    for state, name in ((OK, "output_file_id"), (FAILED, "error_file_id")):
        if batch[name] is not None and not db.execute("SELECT 1 FROM files WHERE id = ?", (batch[name],)).fetchone():
            continue
        count = db.execute(
            "SELECT count(*) FROM items WHERE key BETWEEN ? AND ? AND state = ?"
            " AND NOT EXISTS (SELECT 1 FROM results WHERE results.key = items.key)",
            (*keys_of(batch["no"]), state),
        ).fetchone()[0]
        if count:
            yield f"batch {batch['id']!r} lacks {count} results"
