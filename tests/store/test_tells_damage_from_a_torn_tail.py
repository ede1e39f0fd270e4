"""The log's last commit may be torn by a power cut, of which nobody was told; anything else that does not fit is
damage. SQLite takes both for the end of the log."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from chiron.store.sqlite.acknowledged import Acknowledged, read_acknowledged
from chiron.store.sqlite.store import SqliteStore
from chiron.store.sqlite.wal import FRAME_BYTES, HEADER_BYTES, read_log
from store_calls import start, upload
from store_sites import sqlite_site

LOG = "batch.sqlite3-wal"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A store with a batch and then three uploads, each in a commit of its own, all of it in the log."""
    site = sqlite_site(tmp_path / "open")

    async def fill() -> None:
        async with site.store() as store:
            await start(site, store, 5)
            for name in ("one", "two", "three"):
                await upload(store, name.encode(), filename=name)
            shutil.copytree(tmp_path / "open", tmp_path / "killed")

    asyncio.run(fill())
    (tmp_path / "killed" / "batch.sqlite3-shm").unlink()
    return tmp_path / "killed"


def opened(directory: Path) -> tuple[list[str], list[str], int]:
    """Names of files, notes of damage, number of batches."""

    async def run() -> tuple[list[str], list[str], int]:
        async with sqlite_site(directory).store() as store:
            assert isinstance(store, SqliteStore)
            names = [file.filename for file in await store.list_files(None, order="asc")]
            return names, store.damage.notes, len(await store.list_batches(None))

    return asyncio.run(run())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def acknowledge(directory: Path, commits: int) -> None:
    file = Acknowledged(directory)
    file.write(commits)
    file.close()


def commits(directory: Path) -> int:
    found = read_acknowledged(directory)
    assert found is not None
    return found


def test_what_sqlite_would_use_is_known_to_the_frame(killed: Path) -> None:
    log = read_log(killed / LOG)
    assert (log.used, log.goes_on, log.header_fits) == (len(log.frames), False, True)
    for frame in (0, 7, len(log.frames) - 1):
        flip(killed / LOG, HEADER_BYTES + frame * FRAME_BYTES + 500)
        found = read_log(killed / LOG)
        assert [place for place, one in enumerate(found.frames) if not one.fits] == [frame]
        copy = killed.with_name(f"sqlite-{frame}")
        shutil.copytree(killed, copy)
        with sqlite3.connect(copy / "batch.sqlite3") as db:
            used = db.execute("PRAGMA wal_checkpoint").fetchone()[1]
        db.close()
        assert found.used == used
        flip(killed / LOG, HEADER_BYTES + frame * FRAME_BYTES + 500)


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_torn_last_commit_of_which_nobody_was_told_is_no_damage(killed: Path, how: str) -> None:
    acknowledge(killed, commits(killed) - 1)
    size = (killed / LOG).stat().st_size
    if how == "cut":
        with (killed / LOG).open("r+b") as file:
            file.truncate(size - 5000)
    else:
        flip(killed / LOG, size - 5000)
    names, notes, batches = opened(killed)
    assert (names, notes, batches) == (["in.jsonl", "one", "two"], [], 1)
    assert [path.read_bytes() for path in (killed / "lost+found").iterdir()] == [b"three"]


def test_a_last_commit_of_which_somebody_was_told_is_missed(killed: Path) -> None:
    flip(killed / LOG, (killed / LOG).stat().st_size - 5000)
    _, notes, batches = opened(killed)
    assert "1 commits that were acknowledged to callers would be lost" in notes[0]
    assert batches == 1
    assert opened(killed)[1] == [], "it is told once"


@pytest.mark.parametrize("knows", [True, False])
def test_damage_inside_costs_no_commit_behind_it(killed: Path, knows: bool) -> None:
    if not knows:
        (killed / "acknowledged").unlink()
    log = read_log(killed / LOG)
    # A page that is written again later: nothing at all is lost with this frame.
    frame = next(
        place for place, one in enumerate(log.frames) if one.page in {later.page for later in log.frames[place + 20 :]}
    )
    flip(killed / LOG, HEADER_BYTES + frame * FRAME_BYTES + 100)
    names, notes, batches = opened(killed)
    assert (names, batches) == (["in.jsonl", "one", "two", "three"], 1)
    assert "log is damaged" in notes[0]
    assert (killed / "lost+found" / "damaged" / LOG).exists()


@pytest.mark.parametrize("offset", [0, 5, 17, 25])
def test_a_damaged_head_of_the_log_costs_nothing(killed: Path, offset: int) -> None:
    flip(killed / LOG, offset)
    names, notes, batches = opened(killed)
    assert (names, batches) == (["in.jsonl", "one", "two", "three"], 1)
    assert notes


@pytest.mark.parametrize("name", [LOG, "batch.sqlite3"])
def test_a_log_or_a_database_that_is_gone_is_missed_and_no_upload_is_deleted(killed: Path, name: str) -> None:
    (killed / name).unlink()
    uploads = sorted(path.read_bytes() for path in (killed / "files").iterdir())
    _, notes, _ = opened(killed)
    assert "commits" in notes[0]
    there = [*(killed / "files").iterdir(), *(killed / "lost+found").rglob("file-*")]
    assert sorted(path.read_bytes() for path in there) == uploads


def test_a_damaged_number_of_commits_is_told(killed: Path) -> None:
    flip(killed / "acknowledged", 3)
    names, notes, _ = opened(killed)
    assert names[-1] == "three"
    assert "not known" in notes[0]
