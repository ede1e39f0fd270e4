"""The table of engines: rows that can be used as they are."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from chiron.engines.rows import ENGINES, EngineRow

OURS = {
    "running",
    "waiting",
    "kv_usage",
    "kv_blocks",
    "block_size",
    "kv_capacity_tokens",
    "kv_used_tokens",
    "preemptions",
    "generation_tokens",
    "prompt_tokens",
    "itl_sum_s",
    "itl_count",
    "steps",
    "busy_s",
    "context_tokens",
    "decode_tokens",
    "prefill_tokens",
    "waiting_tokens",
    "head_tokens",
}


@pytest.mark.parametrize("row", ENGINES.values(), ids=lambda row: row.name)
def test_rows_use_known_names_and_absolute_paths(row: EngineRow) -> None:
    assert ENGINES[row.name] is row
    assert set(row.metrics) <= OURS
    assert all(names for names in row.metrics.values())
    for path in (row.health_path, row.metrics_path, row.context_path, row.limit.path if row.limit else ""):
        assert path == "" or path.startswith("/")
    assert row.health_path, "an engine without a health check cannot be watched"
    assert bool(row.metrics) == bool(row.metrics_path)


@pytest.mark.parametrize("row", [r for r in ENGINES.values() if r.metrics], ids=lambda row: row.name)
def test_every_engine_with_metrics_tells_load_and_latency(row: EngineRow) -> None:
    assert {"running", "waiting", "generation_tokens", "itl_sum_s", "itl_count"} <= set(row.metrics)


COMMAND_NAMES = {
    "python",
    "port",
    "model",
    "model_path",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_capacity_tokens",
    "context_per_seq",
    "threads",
    "profile",
    "pace",
}


@pytest.mark.parametrize("row", ENGINES.values(), ids=lambda row: row.name)
def test_commands_name_only_what_there_is_and_give_the_engine_a_port(row: EngineRow) -> None:
    words = [part for word in row.command for part in ((word,) if isinstance(word, str) else word)]
    named = re.findall(r"\{(\w+)\}", " ".join(words))
    assert set(named) <= COMMAND_NAMES
    assert not row.command or row.announces_port != ("port" in named)
    assert row.profile_key in ("", *named)


def test_engines_that_we_ship_can_be_started() -> None:
    shipped = {row.name: row.command[2] for row in ENGINES.values() if row.announces_port}
    assert set(shipped) == {"openvino", "emulated", "llamacpp"}
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
