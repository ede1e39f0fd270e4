"""Terminal, page, picture, notebook: one figure is the same text everywhere, and never better than it is."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from chiron.cli.demo.verdict import verdict_lines
from chiron.cli.load.view import print_figures
from chiron.cli.simulate.tables import print_results
from chiron.telemetry.format import amount, milliseconds, percent, whole
from chiron.telemetry.html import report_html
from chiron.telemetry.result import Result
from result_factory import small, unseen

SHARES = (0.975, 0.98999, 0.99, 0.9990004, 0.99996, 1.0)


def printed(results: list[Result]) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    print_results(console, results)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def with_attainment(share: float, **names: Any) -> Result:
    made = small(**names)
    return replace(made, summary=made.summary | {"attainment": {"chat": share, "jobs": 1.0}})


@given(st.floats(min_value=0.0, max_value=1.0))
@example(0.99999)
@example(1 - 1e-16)
@example(0.9999999)
@example(0.57)
def test_a_share_never_reads_as_more_than_it_is(share: float) -> None:
    shown = float(percent(share).removesuffix(" %")) / 100
    assert shown <= share + 1e-12
    assert (percent(share) == "100 %") == (share == 1.0)
    assert share - shown <= 1e-4 + 1e-12


@given(st.floats(min_value=0.0, max_value=1.0), st.sampled_from([0.9, 0.95, 0.99, 0.995, 0.999, 0.9999]))
def test_who_misses_a_target_is_not_shown_with_it(share: float, target: float) -> None:
    if share < target - 1e-9:
        assert float(percent(share).removesuffix(" %")) < float(percent(target).removesuffix(" %"))


@pytest.mark.parametrize("share", SHARES)
def test_terminal_and_page_show_the_same_attainment(share: float) -> None:
    results = [with_attainment(share), with_attainment(0.5, policy="rival")]
    cells = re.findall(r'data-label="chat in SLO"[^>]*>([^<]*)<', report_html(results))
    assert percent(share) in cells
    lines = printed(results)
    assert all(cell in lines for cell in cells)


def test_terminal_and_page_show_the_same_figures() -> None:
    results = [small(gpu_hours=123.456), small("rival", gpu_hours=2.005)]
    page, lines = report_html(results), printed(results)
    for label in ("GPU-hours", "× bound", "cost", "chat p99 TTFT, s", "chat p99 ITL, ms", "peak GPUs"):
        cells = re.findall(rf'data-label="{label}"[^>]*>([^<]+)<', page)[:2]
        assert len(cells) == 2, label
        assert all(re.search(rf"(^|\s){re.escape(cell)}(\s|$)", lines) for cell in cells), (label, cells, lines)


def test_the_terminal_leaves_out_what_nobody_has_a_figure_for() -> None:
    lines = printed([unseen("gateway"), unseen("direct")])
    assert "GPU" not in lines
    assert "cost" not in lines
    assert "–" not in lines.split("\n\n")[0]


def test_load_and_demo_round_as_reports_do() -> None:
    share = 0.99996
    spread = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    cls = {"requests": 25_000, "finished": 25_000, "attainment": share, "ttft_s": spread, "itl_s": spread,
           "gap_p99_s": spread, "tokens_per_s": 5.0}  # fmt: skip
    figures: dict[str, Any] = {
        "classes": {"chat": cls}, "programs": {}, "jobs": [], "errors": {}, "examples": {}, "warnings": [], "sent": 1,
        "wall_s": 1.0, "url": "u", "cpu_share": 0.1, "digest": "d", "late_s": spread | {"max": 0.0},
        "tokens": dict.fromkeys(("input", "input_wanted", "output", "output_wanted"), 0),
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    print_figures(console, figures)
    assert "99.996 %" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "99.996 % within both SLOs" in verdict_lines(figures, small(), 4)[0]


def test_names_with_brackets_are_printed_as_they_are() -> None:
    name = "[/red]a[bold]b"
    made = small(name)
    classes = tuple(replace(cls, name=f"{cls.name}[/x]") for cls in made.classes)
    shares = {cls.name: 1.0 for cls in classes}
    named = replace(made, scenario=name, classes=classes, summary=made.summary | {"attainment": shares})
    lines = printed([named])
    assert lines.count(name) >= 3
    assert "chat[/x]" in lines


def test_small_and_large_numbers_keep_figures_that_say_something() -> None:
    assert [amount(x) for x in (0.0471, 0.5, 99.994, 123.456, 12345.6)] == ["0.047", "0.50", "99.99", "123.5", "12,346"]
    assert [milliseconds(x) for x in (0.00234, 0.0196, 1.5)] == ["2.3", "19.6", "1,500"]
    assert [whole(x) for x in (3.0, 3.5, 1234.5)] == ["3", "3.5", "1,234"]
