"""Engines may print what they like: logs have a limit, and the last lines are at hand."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from chiron.fleet.process.engine_process import exit_text, tail
from chiron.fleet.process.fleet import prune_logs
from chiron.fleet.process.supervisor import Log, ReadyLine
from fleet_factory import an_instance, local_fleet, stub_kind, until


def test_a_log_is_capped_and_rotated_once(tmp_path: Path) -> None:
    async def story() -> None:
        kind = stub_kind("--log-lines", "20000", port=None, log_bytes_max=50_000)
        async with local_fleet(tmp_path, {"stub": kind}) as (fleet, heard):
            instance = an_instance(1)
            fleet.create(instance)
            await until(lambda: heard.ready == [1], "ready: the line was found behind two megabytes")
            path = fleet.log_path(instance)
            assert path.name == "org_model-1.log"
            sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
            assert set(sizes) == {path.name, f"{path.name}.1"}
            assert max(sizes.values()) <= 50_000
            assert "chiron-engine ready" in tail(path, 2)

    asyncio.run(story())


def test_old_logs_are_pruned_but_not_those_in_use(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"m-{number}.log"
        path.write_text("x")
        os.utime(path, (number, number))
    (tmp_path / "notes.txt").write_text("not ours")
    in_use = tmp_path / "m-0.log"
    prune_logs(tmp_path, 3, {in_use})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["m-0.log", "m-7.log", "m-8.log", "m-9.log", "notes.txt"]


def test_a_log_that_cannot_be_written_loses_output_and_nothing_else(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "missing" / "x.log"), 100)
    log.write(b"lost")
    (tmp_path / "missing").mkdir()
    log.write(b"kept")
    assert (tmp_path / "missing" / "x.log").read_bytes() == b"kept"
    log.write(b"y" * 1000)
    assert (tmp_path / "missing" / "x.log").stat().st_size <= 100


def test_a_log_goes_on_where_an_earlier_run_left_it(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"a" * 90)
    Log(str(path), 100).write(b"b" * 20)
    assert (tmp_path / "x.log.1").read_bytes() == b"a" * 90 + b"b" * 10
    assert path.read_bytes() == b"b" * 10


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_ready_line_is_found_in_any_pieces(size: int) -> None:
    output = b"loading\r\nchiron-engine ready port=99999\nchiron-engine ready port=80x\n" + b"x" * 5000
    output += b"\n  chiron-engine ready port=8123\r\nchiron-engine ready port=8124\n"
    line = ReadyLine()
    found = [line.feed(output[at : at + size]) for at in range(0, len(output), size)]
    assert [port for port in found if port is not None] == [8123]


def test_exit_status_in_words() -> None:
    assert exit_text(3) == "it exited with status 3"
    assert exit_text(137) == "it was killed by SIGKILL"
    assert exit_text(255) == "it exited with status 255"


def test_the_tail_of_nothing_is_nothing(tmp_path: Path) -> None:
    assert tail(tmp_path / "missing.log", 3) == ""
    (tmp_path / "bytes.log").write_bytes(b"a\nb\n\xff\xfe\n")
    assert tail(tmp_path / "bytes.log", 2) == "b\n\ufffd\ufffd"
