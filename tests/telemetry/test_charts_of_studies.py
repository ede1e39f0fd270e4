"""Charts of studies as files, and the page around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiron.telemetry import axes
from chiron.telemetry.chart_files import write_charts
from chiron.telemetry.marks import INK, Chart, Panel, Rule, Series
from chiron.telemetry.study_page import chart_section, study_page, table_section
from result_factory import EVIL

pytest.importorskip("matplotlib")


def chart(name: str) -> Chart:
    series = Series(name=name, colour="#2f7fc1", mark="dots", x=(1.0, 2.0), y=(0.98, 1.0), texts=("a", "b"))
    rules = (Rule(name="target", y=0.99), Rule(name="bound", x=0.5, colour=INK, dash=""))
    panel = Panel(y=axes.attainment("within SLO", [0.98, 1.0]), series=(series,), rules=rules)
    return Chart(title="A chart", x=axes.linear("GPU-hours", 0.0, 3.0), panels=(panel, panel))


@pytest.mark.slow
def test_equal_charts_give_equal_files_that_name_what_they_show(tmp_path: Path) -> None:
    first, second = (write_charts({"load/1": chart("chiron")}, tmp_path / each) for each in ("a", "b"))
    assert [path.name for path in first] == ["load_1.png", "load_1.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    svg = first[1].read_text()
    for words in ("A chart", "chiron", "target", "bound", "GPU-hours", "within SLO", "99 %"):
        assert f"<!-- {words} -->" in svg, words


def test_a_page_escapes_whatever_names_hold() -> None:
    sections = [table_section(EVIL, [EVIL], [[EVIL, EVIL]], EVIL), chart_section("", [chart(EVIL)])]
    page = study_page(EVIL, EVIL, EVIL, [EVIL], sections, EVIL)
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<figure") == 1
    assert page.count("<tr>") == 2
