"""Opening a store on SQLite: what was cut off is finished, damage is mended, and what nobody knows is put aside."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from chiron.store.damage import Damage
from chiron.store.directory import (
    DATABASE,
    FILES,
    disk_error,
    make_private,
    remove_files,
    remove_parts,
    sync_directory,
    unknown_files,
)
from chiron.store.jobs.database import Meta, meta_of
from chiron.store.port import StoreError, StoreFull
from chiron.store.settings import StoreSettings
from chiron.store.sqlite.acknowledged import Acknowledged
from chiron.store.sqlite.database import Connection, damaged, open_for_writing, read_meta
from chiron.store.sqlite.inspect import database_damage, is_older, is_ours, log_damage, missing_commits
from chiron.store.sqlite.lost import LostFound
from chiron.store.sqlite.mend import finish, mend

log = logging.getLogger("chiron.store")

NAMES_SHOWN = 5
"""Files named in one line of the log."""


def names(paths: Sequence[Path]) -> str:
    more = len(paths) - NAMES_SHOWN
    return ", ".join(path.name for path in paths[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


class Opening:
    """Of the store in one directory, which nobody else may have."""

    def __init__(self, directory: Path, settings: StoreSettings, *, lost: LostFound, damage: Damage) -> None:
        self._directory = directory
        self._path = directory / DATABASE
        self._settings = settings
        self._lost = lost
        self._damage = damage

    def database(self) -> tuple[Connection, Meta, Acknowledged]:
        """Ready to write to. Raises StoreError, or an error of SQLite's."""
        db = self._whole()
        try:
            uploads = db.execute("SELECT id FROM files WHERE batch_id IS NULL").fetchall()
            sync_directory(self._directory)
            remove_parts(self._directory)
            removals = [row["id"] for row in db.execute("SELECT id FROM removals").fetchall()]
            remove_files(self._directory, removals)
            db.execute("DELETE FROM removals")
            meta = meta_of(read_meta(db))
            acknowledged = Acknowledged(self._directory)
            acknowledged.write(meta.commits, durably=True)
            self._put_aside_unknown({row["id"] for row in uploads})
            for complaint in make_private(self._directory):
                log.warning("%s; change its owner or its mode", complaint)
        except BaseException:
            db.close()
            raise
        return db, meta, acknowledged

    def _whole(self) -> Connection:
        """The database, mended if it is damaged and can be."""
        try:
            finish(self._directory, self._lost)
            why = log_damage(self._directory)
            if why and is_older(self._path):
                why = self._leave_to_sqlite(why)
        except OSError as error:
            raise disk_error(error, self._path) from error
        refusal: StoreError = damaged(self._path, why)
        if not why:
            try:
                db = open_for_writing(self._directory, self._settings)
            except StoreFull:
                raise
            except StoreError as error:
                refusal, why = error, str(error)
            else:
                why = self._damage_in(db)
                if not why:
                    return db
                db.close()
                refusal = damaged(self._path, why)
        if not is_ours(self._path):
            raise refusal
        mend(self._directory, self._lost, lambda what: self._damage.note(what, "start"), why)
        db = open_for_writing(self._directory, self._settings)
        if why := database_damage(db, full=True):
            db.close()
            raise damaged(self._path, f"it was repaired, and still: {why}")
        return db

    def _leave_to_sqlite(self, why: str) -> str:
        """The log of a store from before rows had sums: what comes behind the damage cannot be told from what was torn,
        so it is kept and told of."""
        path = self._path.with_name(f"{DATABASE}-wal")
        if not self._lost.room_for(1, path.stat().st_size):
            return f"{why}; there is no room to keep it: {self._lost.limit()}"
        place = self._lost.folder("damaged")
        shutil.copy2(path, place)
        sync_directory(place)
        self._damage.note(f"{why}; what was committed after the damage is lost, but for the copy in {place}", "start")
        return ""

    def _damage_in(self, db: Connection) -> str:
        small = self._path.stat().st_size <= self._settings.check_bytes_max
        if why := database_damage(db, full=small or self._damage.is_undealt()):
            return why
        if words := missing_commits(self._directory, read_meta(db)["commits"]):
            self._damage.note(words, "start")
        elif self._damage.is_undealt():
            self._damage.note("what was met is gone: everything in the database was looked at and is whole", "start")
        return ""

    def _put_aside_unknown(self, known: set[str]) -> None:
        aside = self._lost.put(unknown_files(self._directory, known))
        if aside.moved:
            count, shown = len(aside.moved), names(aside.moved)
            log.warning("%d files that no row names are moved to %s: %s", count, self._lost.path, shown)
        if aside.left:
            log.error(
                "%d files that no row names stay in %s: there is no room for them in lost+found (%s); nothing of it is "
                "deleted, look through both and remove what you do not need: %s",
                len(aside.left),
                self._directory / FILES,
                self._lost.limit(),
                names(aside.left),
            )
