"""What pipelines of stages are judged by: throughput, latency, cold starts, and replicas of each stage over time."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from chiron.cli.simulate.tables import print_results
from chiron.telemetry.fleet_charts import STAGES_DRAWN, stages
from chiron.telemetry.html import report_html
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import DecisionPoint
from chiron.telemetry.store import load_result, save_result
from result_factory import small

COLUMNS = ("tokens", "cold", "p50")


def scaled(t_s: float, subject: str, before: float, after: float) -> DecisionPoint:
    return DecisionPoint(
        t_s=t_s, kind="stage", subject=subject, before=before, after=after, reason="bottleneck", numbers={}
    )


PLANS = (scaled(100.0, "llama#1/0-9", 1, 3), scaled(200.0, "llama#1/10-19", 2, 4), scaled(400.0, "llama#1/0-9", 3, 2))


def staged(**changes: object) -> Result:
    result = small("stage-balance", cold_starts=7, warm_starts=1, throughput_tokens_per_s=1234.0)
    return replace(result, settings={**result.settings, "stages": {"tick_s": 5.0}}, decisions=PLANS)


def table_of(*results: Result) -> str:
    out = io.StringIO()
    print_results(Console(file=out, width=160, markup=False), results)
    return out.getvalue()


def test_the_table_has_them_where_a_policy_has_stages_and_nowhere_else() -> None:
    whole = small("whole", cold_starts=2)
    beside, alone = table_of(staged(), whole), table_of(whole)
    assert all(column in beside for column in COLUMNS)
    assert not any(column in alone.split("\n\n")[0] for column in COLUMNS)
    line = next(each for each in beside.splitlines() if each.startswith("stage-balance "))
    assert "1,234" in line
    assert " 7 " in line


def test_the_report_has_them_and_the_replicas_of_each_stage() -> None:
    page = report_html([staged(), small("whole")])
    for text in ("cold starts", "output tokens/s", "Replicas of stages", "#1/10-19".removeprefix("#")):
        assert text in page
    assert "Replicas of stages" not in report_html([small("whole")])


def test_the_chart_shows_each_stage_from_beginning_to_end() -> None:
    chart = stages([*PLANS, scaled(1.0, "other#1/0-9", 1, 9)], "llama", 600.0)
    assert chart is not None
    lines = {series.name: (series.x, series.y) for series in chart.panels[0].series}
    assert list(lines) == ["1/0-9", "1/10-19"]
    assert lines["1/0-9"][1] == (1, 3, 2, 2)
    assert lines["1/10-19"][1] == (2, 4, 4)
    many = [scaled(1.0 + i, f"llama#{i}/0-9", 1, 2) for i in range(20)]
    crowded = stages(many, "llama", 600.0)
    assert crowded is not None
    assert len(crowded.panels[0].series) == STAGES_DRAWN
    assert "of 20" in crowded.caption
    assert stages([], "llama", 600.0) is None


def test_results_that_were_saved_before_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = small()
    for name in ("cold_starts", "warm_starts", "throughput_tokens_per_s"):
        del kept.summary[name]
    path = tmp_path_factory.mktemp("old") / "old.chiron"
    save_result(kept, path)
    read = load_result(path).summary
    assert (read["cold_starts"], read["throughput_tokens_per_s"]) == (None, None)
    assert "tokens" not in table_of(replace(load_result(path)))
