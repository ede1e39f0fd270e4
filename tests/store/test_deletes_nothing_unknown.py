"""What the store does not know is put aside within a limit, and never deleted."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from chiron.store.port import StoredFile
from chiron.store.settings import StoreSettings
from store_calls import lines_of, upload
from store_sites import sqlite_site


def reopened(directory: Path, settings: StoreSettings | None = None) -> list[StoredFile]:
    async def run() -> list[StoredFile]:
        async with sqlite_site(directory, settings).store() as store:
            return await store.list_files(None)

    return asyncio.run(run())


def uploaded(directory: Path) -> StoredFile:
    async def run() -> StoredFile:
        async with sqlite_site(directory).store() as store:
            return await upload(store, lines_of(3))

    return asyncio.run(run())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_upload_without_a_row_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = uploaded(tmp_path)
    (tmp_path / "files" / "file-0123").write_bytes(b"whose row was lost")
    with caplog.at_level(logging.WARNING, "chiron.store"):
        assert reopened(tmp_path) == [kept]
    assert contents(tmp_path / "lost+found") == {"file-0123": b"whose row was lost"}
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
    assert "file-0123" in caplog.text
    assert "lost+found" in caplog.text


def test_two_of_one_name_are_both_kept(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        uploaded(tmp_path)
        (tmp_path / "files" / "file-0123").write_bytes(content)
        reopened(tmp_path)
    assert contents(tmp_path / "lost+found") == {"file-0123": b"first", "file-0123.1": b"second"}


@pytest.mark.parametrize(
    "limit",
    [
        StoreSettings(reserve_bytes=0, lost_files_max=2),
        StoreSettings(reserve_bytes=0, lost_bytes_max=25),
    ],
)
def test_beyond_its_limit_everything_stays_where_it_is_and_that_is_told(
    limit: StoreSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = uploaded(tmp_path)
    for number in range(4):
        (tmp_path / "files" / f"file-{number}").write_bytes(b"ten bytes!")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "chiron.store"):
            assert reopened(tmp_path, limit) == [kept]
        assert set(contents(tmp_path / "lost+found")) == {"file-0", "file-1"}
        assert set(contents(tmp_path / "files")) == {kept.id, "file-2", "file-3"}
        assert "no room" in caplog.text
        assert "store.lost_files_max" in caplog.text
