"""The table of engines: rows that can be used as they are."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from chiron.engines.rows import COMMAND_NAMES, ENGINES, METRICS, EngineRow, LimitRequest


@pytest.mark.parametrize("row", ENGINES.values(), ids=lambda row: row.name)
def test_rows_use_known_names_and_absolute_paths(row: EngineRow) -> None:
    assert ENGINES[row.name] is row
    assert set(row.metrics) <= METRICS
    assert all(names for names in row.metrics.values())
    for path in (row.health_path, row.metrics_path, row.context_path, row.limit.path if row.limit else ""):
        assert path == "" or path.startswith("/")
    assert row.health_path, "an engine without a health check cannot be watched"
    assert bool(row.metrics) == bool(row.metrics_path)


@pytest.mark.parametrize("row", [r for r in ENGINES.values() if r.metrics], ids=lambda row: row.name)
def test_every_engine_with_metrics_tells_load_and_latency(row: EngineRow) -> None:
    assert {"running", "waiting", "generation_tokens", "itl_sum_s", "itl_count"} <= set(row.metrics)


@pytest.mark.parametrize("row", ENGINES.values(), ids=lambda row: row.name)
def test_commands_name_only_what_there_is_and_give_the_engine_a_port(row: EngineRow) -> None:
    words = [part for word in row.command for part in ((word,) if isinstance(word, str) else word)]
    named = re.findall(r"\{(\w+)\}", " ".join(words))
    assert set(named) <= COMMAND_NAMES
    assert not row.command or row.announces_port != ("port" in named)
    assert row.profile_key in ("", *named)


def test_engines_that_we_ship_can_be_started() -> None:
    shipped = {row.name: row.command[2] for row in ENGINES.values() if row.announces_port}
    assert set(shipped) == {"openvino", "emulated", "llamacpp", "staged"}
    for module in shipped.values():
        assert isinstance(module, str)
        assert find_spec(module) is not None, module


def test_extras_that_engines_need_exist_and_install_what_they_import() -> None:
    root = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for row in ENGINES.values():
        assert bool(row.extra) == bool(row.modules)
        wanted = " ".join(extras[row.extra]).replace("-", "_") if row.extra else ""
        assert all(module in wanted for module in row.modules), row.name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"max_num_seqs": 0}, "engine 'x': max_num_seqs is 0; it must be 1 or more"),
        ({"max_instances": 0}, "max_instances is 0"),
        ({"health_path": ""}, "health_path is ''; it must be given"),
        ({"metrics_path": "metrics"}, "metrics_path is 'metrics'; it must be empty or begin with '/'"),
        ({"metrics": {"runing": ("x",)}}, "metrics is ['runing']; it must be among block_size, "),
        ({"command": ("x", "{prt}")}, "command is 'x {prt}'; it must be names among "),
    ],
)
def test_a_row_that_cannot_be_used_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineRow(name="x", **row)


def test_a_limit_request_says_where_the_number_stands() -> None:
    assert LimitRequest(path="/x", body='{"n": LIMIT}').message(12) == b'{"n": 12}'
    with pytest.raises(ValueError, match="must hold LIMIT"):
        LimitRequest(path="/x", body="{}")
    with pytest.raises(ValueError, match="path is 'x'"):
        LimitRequest(path="x")
