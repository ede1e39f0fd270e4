"""The HTML report and the figures: complete, self-contained, honest about what they leave out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.telemetry import fleet_charts
from chiron.telemetry.errors import ReportError
from chiron.telemetry.figures import write_figures
from chiron.telemetry.html import report_html, write_report
from chiron.telemetry.palette import looks
from chiron.telemetry.result import BatchSizePoint, DecisionPoint
from chiron.telemetry.series import cdf, latency_cdf, log_axis, thin
from result_factory import hour, small, tick, unseen


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data
        self.words.append(data)

    @property
    def data(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.scripts[0])
        return loaded


@pytest.fixture(scope="module")
def page() -> Page:
    results = [
        hour("llumnix", slack=2.1, pressure=False),
        hour("chiron", slack=1.45, lag_s=30),
        hour("slow", slack=1.0),
    ]
    return Page(report_html(results))


def test_the_page_loads_nothing_and_is_small(page: Page, tmp_path: Path) -> None:
    path = write_report([small("chiron"), small("rival", gpu_hours=12)], tmp_path / "r.html")
    assert path.stat().st_size < 6_000_000
    text = path.read_text(encoding="utf-8")
    loads = [(tag, key) for tag, attrs in Page(text).elements for key in attrs if key in ("src", "href", "srcset")]
    assert loads == []
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert not any(tag in ("link", "img", "iframe", "object", "base") for tag, _ in page.elements)


def test_parts_come_in_the_order_of_the_questions(page: Page) -> None:
    text = " ".join(page.words)
    parts = ["attains at least 99 %", "GPU-hours", "Attainment against GPU-hours", "Fleet by role", "Max batch sizes",
             "Backpressure", "Queue by deadline", "Latency", "Decisions", "Run it again"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_every_place_that_the_script_fills_is_in_the_page(page: Page) -> None:
    ids = {attrs.get("id") for _, attrs in page.elements}
    wanted = set(re.findall(r'place\("([a-z_-]+)"\)', page.scripts[-1]))
    assert len(wanted) > 8
    assert wanted <= ids
    assert set(page.data["views"]["chiron"]["llama"]) <= ids


def test_each_policy_has_one_colour_everywhere(page: Page) -> None:
    data = page.data
    for trace in data["tradeoff"]["data"]:
        assert trace["marker"]["color"] == data["colours"][trace["name"]]
    for figure in data["latencies"]:
        for trace in figure["data"]:
            assert trace["line"]["color"] == data["colours"][trace["name"]]
    assert len(set(data["colours"].values())) == 3
    assert looks(["chiron", "zeta"])["chiron"] == looks(["alpha", "chiron"])["chiron"]


def test_the_bound_and_the_target_are_drawn(page: Page) -> None:
    lines = page.data["tradeoff"]["layout"]["shapes"]
    assert {"y": 99.0} in [{"y": line["y0"]} for line in lines]
    assert {"x": 8.4} in [{"x": line["x0"]} for line in lines]
    given = Page(report_html([small()], bounds={0: 3.25})).data
    assert [line["x0"] for line in given["tradeoff"]["layout"]["shapes"]][-1] == 3.25


def test_the_table_marks_misses_and_shows_ranges_over_seeds() -> None:
    text = report_html(
        [small("good", seed=s, gpu_hours=10.0 + s) for s in (0, 1)] + [small("bad", seed=s, met=0.5) for s in (0, 1)]
    )
    assert re.search(r'<td class="miss">50 %</td>', text)
    assert '10.50<span class="range">10.00–11.00</span>' in text
    assert text.index(">good</th>") < text.index(">bad</th>")
    assert "lower bound, every SLO met" in text


def test_names_and_texts_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script><b>&"
    result = replace(
        small(evil), scenario=evil, scenario_text=evil, settings={"x": evil},
        decisions=(DecisionPoint(t_s=1.0, kind="fleet", subject=evil, before=1, after=2, reason="<!--", numbers={}),),
    )  # fmt: skip
    parsed = Page(report_html([result], command=evil))
    assert len(parsed.scripts) == 3
    assert parsed.data["policies"] == [evil]
    assert parsed.data["decisions"][evil]["rows"][0][2] == evil
    assert not any(tag == "b" for tag, _ in parsed.elements)


def test_the_page_says_how_to_run_it_again() -> None:
    text = report_html([small("chiron", seed=3), small("llumnix", seed=3)])
    assert "chiron compare lunch --policy chiron --policy llumnix --seed 3 --report report.html" in text
    assert "name = &quot;lunch&quot;" in text
    assert "mine --all" in report_html([small()], command="mine --all")


def test_an_empty_run_still_makes_a_page() -> None:
    bare = replace(small(), fleet=(), batch_sizes=(), decisions=(), settings={}, scenario_text="")
    parsed = Page(report_html([bare]))
    assert parsed.data["decisions"]["chiron"] == {"rows": [], "total": 0, "reasons": []}
    assert parsed.data["views"]["chiron"]["llama"]["queue"]["data"][0]["y"] == []


def test_decisions_that_changed_the_fleet_come_before_batch_sizes() -> None:
    sizes = [
        DecisionPoint(t_s=float(i), kind="batch_size", subject="1", before=i, after=i + 1, reason="r", numbers={})
        for i in range(500)
    ]
    fleet = [DecisionPoint(t_s=0.5, kind="fleet", subject="m", before=1, after=2, reason="grow", numbers={"n": nan})]
    shown = Page(report_html([replace(small(), decisions=(*fleet, *sizes))])).data["decisions"]["chiron"]
    assert (len(shown["rows"]), shown["total"]) == (300, 501)
    assert shown["rows"][0][5] == "grow"
    assert shown["rows"][-1][0] == 499.0
    assert shown["reasons"] == [["batch_size", "r", 500], ["fleet", "grow", 1]]


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"cannot write .*none"):
        write_report([small()], tmp_path / "none" / "r.html")


def test_thinning_keeps_peaks_valleys_and_the_end_within_the_limit() -> None:
    values = np.sin(np.arange(50_000) / 50)
    values[[12_345, 23_456, 5]] = [9.0, -9.0, np.nan]
    kept = thin(values, 2000)
    assert len(kept) <= 2000
    assert {12_345, 23_456, 49_999} <= set(kept.tolist())
    assert thin(values[:10], 2000).tolist() == list(range(10))
    assert thin(np.full(5000, np.nan), 300)[-1] == 4999


def test_a_distribution_counts_what_never_happened() -> None:
    curve = cdf(np.array([3.0, np.nan, 1.0, np.nan]))
    assert curve.value.tolist() == [1.0, 3.0]
    assert curve.share.tolist() == [0.25, 0.5]
    assert len(cdf(np.array([np.nan])).value) == 0
    half = replace(small().requests, outcome=np.array([0, 4] * 100 + [0], dtype=np.int8))
    assert latency_cdf(replace(small(), requests=half), 0, "itl").share[-1] == 0.5


def test_distributions_agree_with_the_attainment_at_the_slo() -> None:
    result = hour("chiron", slack=1.0)
    curve = latency_cdf(result, 0, "ttft")
    chat = result.requests.cls == 0
    met = np.mean(result.requests.ttft_s()[chat] <= 10.0)
    assert np.interp(10.0, curve.value, curve.share) == pytest.approx(met, abs=1 / 200)


def test_log_axes_show_the_limit_and_all_curves() -> None:
    low, high, ticks = log_axis([cdf(np.array([0.0, 0.05, 0.1]))], 2.0)
    assert low < 1e-4 < 2.0 < high
    assert ticks == [1e-4, 1e-3, 0.01, 0.1, 1.0]
    assert log_axis([], inf)[2] == [1.0]
    assert log_axis([cdf(np.array([0.1, 0.3]))], 0.2)[2] == [0.1, 0.2]


def test_fleet_bands_add_up_to_the_instances_and_groups_to_the_queue() -> None:
    groups = (*((100.0 * i, i) for i in range(1, 15)), (inf, 2))
    points = [
        tick(0.0, mixed=2),
        tick(10.0, mixed=3, starting=1, draining=1, groups=groups, waiting_batch=200, waiting_interactive=4),
    ]
    bands = fleet_charts.fleet(points, 60.0)["data"]
    assert sum(band["y"][1] for band in bands if band.get("stackgroup")) == 5
    drawn = fleet_charts.queue(points, 60.0)
    assert sum(band["y"][1] for band in drawn["data"]) == 204
    assert len(drawn["data"]) <= fleet_charts.GROUP_BANDS + 2
    json.dumps(drawn, allow_nan=False)


def test_policies_without_backpressure_show_none_rather_than_zero() -> None:
    assert fleet_charts.pressure([tick(0.0, ibp=nan, ibp_target=nan)], 10.0)["data"] == []


def test_the_batch_size_chart_says_how_many_instances_it_leaves_out(page: Page) -> None:
    chart = page.data["views"]["chiron"]["llama"]["batch_sizes"]
    assert (chart["drawn"], chart["instances"]) == (fleet_charts.INSTANCES_DRAWN, 12)
    assert sum(len(trace["x"]) for trace in chart["data"]) < 2 * 2000 + 100


def test_a_batch_size_is_drawn_from_its_instances_start_to_its_end_although_it_never_changed() -> None:
    sizes = [
        BatchSizePoint(t_s=t, instance_id=i, model="m", max_batch_size=n, running=0, itl_s=nan, itl_slo_s=nan)
        for i, t, n in ((1, 0.0, 32), (2, 0.0, 32), (3, 10.0, 32), (2, 40.0, 16), (3, 50.0, 0))
    ]
    lines = {t["name"]: t for t in fleet_charts.batch_sizes(sizes, 100.0)["data"] if t["mode"] == "lines"}
    drawn = {name: list(zip(line["x"], line["y"], strict=True)) for name, line in lines.items()}
    assert drawn == {
        "instance 1": [(0.0, 32), (100.0, 32)],
        "instance 2": [(0.0, 32), (40.0, 16), (100.0, 16)],
        "instance 3": [(10.0, 32), (50.0, 32)],
    }


def test_the_end_of_an_instance_whose_beginning_is_forgotten_draws_nothing() -> None:
    end = BatchSizePoint(t_s=9.0, instance_id=1, model="m", max_batch_size=0, running=0, itl_s=nan, itl_slo_s=nan)
    assert fleet_charts.batch_sizes([end], 100.0)["data"] == []


@pytest.mark.slow
def test_figures_are_written_in_each_format_and_the_same_again(tmp_path: Path) -> None:
    results = [small("chiron"), small("odd/name", gpu_hours=20.0, met=0.9)]
    first = write_figures(results, tmp_path / "a", formats=("svg",))
    second = write_figures(results, tmp_path / "b", formats=("svg",))
    names = {p.name for p in first}
    assert {"overview.svg", "tradeoff.svg", "fleets.svg", "ttft-chat.svg", "fleet-odd_name.svg"} <= names
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    png = write_figures([small()], tmp_path / "c", formats=("png",))[0]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_figures_show_a_limit_far_beyond_what_happened(tmp_path: Path) -> None:
    # Warnings are errors here: a label outside its chart makes matplotlib give up the layout.
    quick = small()
    table = replace(quick.requests, finish_s=np.where(quick.requests.cls == 1, 1.1, quick.requests.finish_s))
    table = replace(table, first_token_s=np.where(table.cls == 1, 1.0, table.first_token_s))
    assert write_figures([replace(quick, requests=table)], tmp_path, formats=("svg",))


def test_figures_of_an_empty_run_and_of_a_wrong_format(tmp_path: Path) -> None:
    bare = replace(small(), fleet=(), batch_sizes=(), decisions=())
    assert write_figures([bare], tmp_path, formats=("svg",))
    with pytest.raises(ReportError, match=r"formats is \['gif'\]; allowed are png, svg, pdf"):
        write_figures([bare], tmp_path, formats=("gif",))


def test_the_page_of_a_run_whose_gpus_nobody_saw_shows_no_zero() -> None:
    page = report_html([unseen("gateway")])
    assert '<td class="none">–</td>' in page
    assert '"tradeoff":{"data":[]' in page
