"""The table of engines: rows that can be used as they are."""

from __future__ import annotations

from importlib.util import find_spec

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
    for path in (row.health_path, row.metrics_path, row.limits_path):
        assert path == "" or path.startswith("/")
    assert row.health_path, "an engine without a health check cannot be watched"
    assert bool(row.metrics) == bool(row.metrics_path)


@pytest.mark.parametrize("row", [r for r in ENGINES.values() if r.metrics], ids=lambda row: row.name)
def test_every_engine_with_metrics_tells_load_and_latency(row: EngineRow) -> None:
    assert {"running", "waiting", "generation_tokens", "itl_sum_s", "itl_count"} <= set(row.metrics)


def test_engines_that_we_ship_can_be_started() -> None:
    shipped = {row.name: row.serve_module for row in ENGINES.values() if row.serve_module}
    assert set(shipped) == {"openvino", "emulated", "llamacpp"}
    for module in shipped.values():
        assert find_spec(module) is not None, module
