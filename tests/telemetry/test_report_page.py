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

from chiron.telemetry import axes, charts, fleet_charts
from chiron.telemetry.drawing import draw
from chiron.telemetry.errors import ReportError
from chiron.telemetry.figures import write_figures
from chiron.telemetry.html import report_html, write_report
from chiron.telemetry.marks import Chart, Series
from chiron.telemetry.palette import COLOURS, INSTANCE_COLOURS, ROLE_COLOURS, looks
from chiron.telemetry.run_data import OUTCOMES, BatchSizePoint, DecisionPoint
from chiron.telemetry.series import cdf, latency_cdf, log_axis, thin
from chiron.telemetry.traffic import bins_of, requests, tokens_until
from chiron.telemetry.verdict import group
from result_factory import EVIL, client_run, hour, small, summary_of, tick, unseen


class Page(HTMLParser):
    """Elements with their attributes, the text of each script, and all words outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside == ["script"]:
            self.scripts[-1] += data
        elif not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def decisions(self) -> list[dict[str, Any]]:
        loaded: list[dict[str, Any]] = json.loads(self.scripts[0])
        return loaded

    def classed(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def page() -> Page:
    results = [
        hour("llumnix", slack=2.1, pressure=False),
        hour("chiron", slack=1.45, lag_s=30),
        hour("slow", slack=1.0),
    ]
    return Page(report_html(results))


def series_of(chart: Chart | None) -> list[Series]:
    assert chart is not None
    return [series for panel in chart.panels for series in panel.series]


# The file ---------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_is_small(page: Page, tmp_path: Path) -> None:
    path = write_report([small("chiron"), small("rival", gpu_hours=12)], tmp_path / "r.html")
    assert path.stat().st_size < 100_000
    text = path.read_text(encoding="utf-8")
    loads = [(tag, key) for tag, attrs in Page(text).elements for key in attrs if key in ("src", "href", "srcset")]
    assert loads == []
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert not any(tag in ("link", "img", "iframe", "object", "base", "form") for tag, _ in page.elements)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|https?:", page.scripts[-1])


@pytest.mark.slow
def test_a_page_of_forty_views_stays_small(tmp_path: Path) -> None:
    one = hour("chiron")
    several = tuple(f"model {i}" for i in range(4))
    fleet = tuple(replace(point, model=name) for point in one.fleet for name in several)
    sizes = tuple(replace(point, model=several[point.instance_id % 4]) for point in one.batch_sizes)
    models = replace(one.requests, model=(np.arange(len(one.requests.model)) % 4).astype(np.int16))
    busy = replace(one, models=several, fleet=fleet, batch_sizes=sizes, requests=models, decisions=one.decisions * 5)
    path = write_report([replace(busy, policy=f"policy {i}") for i in range(10)], tmp_path / "r.html")
    assert 100_000 < path.stat().st_size < 1_200_000


def test_parts_come_in_the_order_of_the_questions(page: Page) -> None:
    parts = [
        "attains at least 99 %", "GPU-hours", "By class", "Attainment against GPU-hours", "Fleets of all policies",
        "One policy over time", "Fleet by role", "Max batch sizes", "Backpressure", "Queue by deadline", "Requests",
        "Output tokens", "Time to first token", "Latency", "Decisions", "Run it again",
    ]  # fmt: skip
    places = []
    for part in parts:
        places.append(page.text.index(part, places[-1] if places else 0))
    assert places == sorted(places)


def test_every_place_that_the_script_fills_is_in_the_page(page: Page) -> None:
    ids = {attrs.get("id") for _, attrs in page.elements} | {"models"}
    wanted = set(re.findall(r'place\("([a-z_-]+)"\)', page.scripts[-1]))
    assert len(wanted) > 6
    assert wanted <= ids


def test_the_page_can_be_read_without_a_script_and_by_a_screen_reader(page: Page) -> None:
    assert len(page.classed("view")) == 3
    assert not any("hidden" in attrs for attrs in page.classed("view"))
    drawings = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert len(drawings) > 20
    assert all(attrs["aria-label"] for attrs in drawings)
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert all(attrs.get("scope") in ("col", "row") for attrs in heads)
    assert all(attrs.get("role") == "table" for tag, attrs in page.elements if tag == "table")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1


# What is compared -------------------------------------------------------------------------------------------------


def test_each_policy_has_one_colour_everywhere(page: Page) -> None:
    for number, policy in enumerate(("chiron", "llumnix", "slow")):
        colour = COLOURS[number]
        drawn = [attrs for _, attrs in page.elements if attrs.get("data-name") == policy and "stroke" in attrs]
        assert len(drawn) > 3
        assert {attrs["stroke"] for attrs in drawn} == {colour}
    assert looks(["chiron", "zeta"])["chiron"] == looks(["alpha", "chiron"])["chiron"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper", ["#ffffff", "#14181d"])
def test_lines_stand_out_from_a_white_and_from_a_dark_page(paper: str) -> None:
    for colour in (*COLOURS, *INSTANCE_COLOURS, ROLE_COLOURS["mixed"], ROLE_COLOURS["batch"]):
        assert contrast(colour, paper) >= 3, (colour, paper)


def test_words_stand_out_from_their_ground() -> None:
    css = report_html([small()]).split("</style>")[0]
    for scheme in re.findall(r":root \{([^}]*--paper[^}]*)\}", css):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for name in ("ink", "quiet", "miss", "accent"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, (name, colours)
            assert contrast(colours[name], colours["card"]) >= 4.5, (name, colours)


def test_the_bound_and_the_target_are_drawn_and_named_in_the_legend(page: Page) -> None:
    assert {"target 99 %", "lower bound 8.40"} <= {
        attrs["data-name"] for _, attrs in page.elements if "data-name" in attrs
    }
    chart = charts.tradeoff(group([small()]), looks(["chiron"]), 3.25, 0.99)
    assert chart is not None
    assert [(rule.x, rule.y) for rule in chart.panels[0].rules] == [(None, 0.99), (3.25, None)]
    assert "lower bound 3.25" in report_html([small()], bounds={0: 3.25})


def test_nines_are_apart_on_the_axis_of_attainment() -> None:
    shares = (0.975, 0.98, 0.99, 0.999, 0.9999, 1.0)
    axis = axes.attainment("within SLO", shares)
    places = [axis.place(share) for share in shares]
    assert places == sorted(places)
    assert min(np.diff(places[1:])) > 0.07
    assert axis.place(0.999) - axis.place(0.99) > 0.2
    assert [text for _, text in axis.ticks] == ["90 %", "99 %", "99.9 %", "99.99 %", "100 %"]
    assert axis.place(0.0) == 0.0
    everything = axes.attainment("", [0.0, 0.4, 1.0])
    assert [text for _, text in everything.ticks] == ["0 %", "50 %", "90 %", "99 %", "100 %"]


@pytest.mark.parametrize("shares", [[], [1.0], [0.0], [0.5, 0.5], [0.999999999], [1 - 1e-16], [0.9, 0.99999]])
def test_any_attainment_has_an_axis_with_its_ends_and_ticks_in_order(shares: list[float]) -> None:
    axis = axes.attainment("", shares)
    places = [axis.place(value) for value, _ in axis.ticks]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0.0, 1.0)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_the_fleets_of_all_policies_are_in_one_chart(page: Page) -> None:
    text = draw(charts.fleets(group([hour("a"), hour("b"), hour("c")]), looks(["a", "b", "c"]), 600))  # type: ignore[arg-type]
    assert re.findall(r'class="line" data-name="(\w)"', text) == ["c", "b", "a"]
    assert "Fleets of all policies" in page.text


def test_the_table_marks_misses_and_shows_ranges_over_seeds() -> None:
    text = report_html(
        [small("good", seed=s, gpu_hours=10.0 + s) for s in (0, 1)] + [small("bad", seed=s, met=0.5) for s in (0, 1)]
    )
    assert re.search(r'<td [^>]*class="miss">50 %</td>', text)
    assert '10.50<span class="range">10.00–11.00</span>' in text
    assert text.index("good</th>") < text.index("bad</th>")
    assert "lower bound, every SLO met" in text


def test_a_column_that_nobody_has_a_figure_for_is_left_out() -> None:
    text = report_html([unseen("gateway"), unseen("direct")])
    heads = re.findall(r'<th scope="col" role="columnheader"[^>]*>([^<]*)</th>', text.split("<details")[0])
    assert heads == ["policy", "chat in SLO", "jobs in SLO", "chat p99 TTFT, s", "chat p99 ITL, ms", "requests/s",
                     "output tokens/s", "not served", "late batch"]  # fmt: skip
    assert ">–<" not in text
    assert "GPU-hours" not in Page(text).text


def test_a_clients_report_has_throughput_tokens_errors_and_a_time_axis() -> None:
    text = report_html([client_run()], errors={"503 overloaded": (412, "No room for <b>")})
    page = Page(text)
    figures = {attrs["data-label"] for attrs in (a for _, a in page.elements) if "data-label" in attrs}
    assert {"requests/s", "output tokens/s", "not served", "finished", "rejected", "failed", "p50 TTFT, s"} <= figures
    assert not {"cancelled", "unfinished", "GPU-hours", "peak GPUs"} & figures
    for part in ("Over time", "requests/s", "not served, requests/s", "tokens/s", "Time to first token", "time, min"):
        assert part in page.text
    assert "503 overloaded" in page.text
    assert "412" in page.text
    assert "No room for <b>" in page.text
    for part in ("Fleet", "Backpressure", "Queue by deadline", "Attainment against", "Decisions"):
        assert part not in page.text


def test_requests_and_tokens_over_time_add_up() -> None:
    table = client_run().requests
    bins = bins_of(3700.0)
    assert len(bins.widths_s) <= 120
    chart = requests(table, bins, 3700.0)
    drawn = {series.name: np.array(series.y[:-1]) @ bins.widths_s for series in series_of(chart)}
    assert drawn["came"] == pytest.approx(len(table.arrival_s))
    for name in ("finished", "failed", "rejected"):
        assert drawn[name] == pytest.approx((table.outcome == OUTCOMES.index(name)).sum())
    edges, first, last = ([0.0, 5.0, 10.0, 30.0], [0.0, 20.0], [10.0, 20.0])
    made = tokens_until(np.array(edges), np.array(first), np.array(last), np.array([100.0, 7.0]))
    assert made == pytest.approx([0.0, 50.0, 100.0, 107.0])


# What a user named ------------------------------------------------------------------------------------------------


def test_names_and_texts_cannot_break_out_of_the_page() -> None:
    known = small(EVIL)
    classes = tuple(replace(cls, name=f"{cls.name} {EVIL}") for cls in known.classes)
    named = replace(
        known, scenario=EVIL, scenario_text=EVIL, settings={EVIL: EVIL}, models=(EVIL,), classes=classes,
        summary=summary_of(known.requests, policy=EVIL, classes=classes, models=(EVIL,)),
        fleet=tuple(replace(point, model=EVIL) for point in known.fleet),
        batch_sizes=tuple(replace(point, model=EVIL) for point in known.batch_sizes),
        decisions=(
            DecisionPoint(t_s=1.0, kind=EVIL, subject=EVIL, before=1, after=2, reason=EVIL, numbers={EVIL: 1.0}),
        ),
    )  # fmt: skip
    for results in ([named], [named, replace(named, policy=f"{EVIL} too")]):
        text = report_html(results, command=EVIL, notes=[EVIL], errors={EVIL: (3, EVIL)})
        parsed, plain = (
            Page(text),
            Page(report_html([replace(r, policy=f"p{i}") for i, r in enumerate([small(), small()][: len(results)])])),
        )
        assert len(parsed.scripts) == 2
        assert {tag for tag, _ in parsed.elements} <= {tag for tag, _ in plain.elements} | {"ul", "li"}
        assert not any(key.startswith("on") for _, attrs in parsed.elements for key in attrs)
        assert EVIL in parsed.decisions[0]["rows"][0][2]
        assert parsed.scripts[-1] == plain.scripts[-1]
        assert parsed.text.count("onerror=alert(1)") > 10


def test_a_notebook_shows_figures_in_which_names_are_escaped() -> None:
    shown = replace(small(EVIL), scenario=EVIL)._repr_html_()
    parsed = Page(shown)
    assert {tag for tag, _ in parsed.elements} <= {
        "div",
        "p",
        "b",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert "alert(1)" in parsed.text
    assert "100 % in SLO in its worst class, 10.00 GPU-hours" in parsed.text
    assert {"chat", "jobs"} <= set(parsed.words)
    assert len(hour("chiron")._repr_html_()) < 5_000


def test_a_result_and_its_requests_are_a_line() -> None:
    result = hour("chiron")
    assert re.fullmatch(
        r"Result\(policy='chiron', scenario='lunch wave', seed=0, [\d,]+ requests, [\d.]+ % in SLO in its worst class, "
        r"[\d.]+ GPU-hours\)",
        repr(result),
    )
    assert len(repr(result.requests)) < 100
    assert len(repr(replace(result, policy="p" * 10_000, scenario="s" * 10_000, summary={}))) < 200
    assert "seed" not in repr(unseen("x", met=0.5)).replace("seed=0", "")


# What is shown of one policy --------------------------------------------------------------------------------------


def test_the_page_says_how_to_run_it_again() -> None:
    text = report_html([small("chiron", seed=3), small("llumnix", seed=3)])
    assert "chiron compare lunch --policy chiron --policy llumnix --seed 3 --report report.html" in text
    assert "name = &quot;lunch&quot;" in text
    assert "mine --all" in report_html([small()], command="mine --all")


def test_an_empty_run_still_makes_a_page() -> None:
    bare = replace(small(), fleet=(), batch_sizes=(), decisions=(), settings={}, scenario_text="")
    parsed = Page(report_html([bare]))
    assert "Decisions" not in parsed.text
    assert "Queue by deadline" not in parsed.text
    none = {field: getattr(bare.requests, field)[:0] for field in bare.requests.__slots__}
    nothing = replace(bare.requests, **none)
    empty = replace(bare, requests=nothing, summary=summary_of(nothing, gpu_seconds=0.0, sim_s=0.0))
    assert "No request was made" in Page(report_html([empty])).text


def test_decisions_that_changed_the_fleet_come_before_batch_sizes() -> None:
    sizes = [
        DecisionPoint(t_s=float(i), kind="batch_size", subject="1", before=i, after=i + 1, reason="r", numbers={})
        for i in range(500)
    ]
    fleet = [DecisionPoint(t_s=0.5, kind="fleet", subject="m", before=1, after=2, reason="grow", numbers={"n": nan})]
    (shown,) = Page(report_html([replace(small(), decisions=(*fleet, *sizes))])).decisions
    assert (len(shown["rows"]), shown["total"]) == (300, 501)
    assert shown["rows"][0][2] == "m: 1 → 2 instances: grow"
    assert shown["rows"][-1][0] == "0:08:19"
    assert shown["reasons"] == [["max batch size", "r", 500], ["fleet", "grow", 1]]


def test_decisions_are_told_in_the_sentences_of_explain() -> None:
    decision = DecisionPoint(
        t_s=61.0, kind="fleet", subject="llama", before=3, after=5, reason="interactive_load",
        numbers={"cold_start_s": 60.0, "work_rate": 0.8912},
    )  # fmt: skip
    (shown,) = Page(report_html([replace(small(), decisions=(decision,))])).decisions
    assert shown["rows"] == [
        [
            "0:01:01",
            "fleet",
            "llama: 3 → 5 instances: current and forecast interactive load needs this many instances",
            "cold start 60 s, work rate 0.89",
        ]
    ]


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


def test_a_distribution_shows_the_few_slowest_of_many() -> None:
    curve = cdf(np.arange(100_000.0))
    assert len(curve.value) < 300
    assert curve.share[-1] == 1.0
    for share in (0.99, 0.999, 0.9999):
        assert min(abs(curve.share - share)) < (1 - share) * 0.05


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


@pytest.mark.parametrize("high", [1e-9, 0.3, 1.0, 7.0, 60.0, 61.0, 1e5, 1e12])
def test_ticks_of_an_axis_are_few_round_and_within(high: float) -> None:
    for axis in (axes.linear("", 0.0, high), axes.linear("", 0.0, high, whole=True), axes.time(high)[1]):
        assert 1 <= len(axis.ticks) <= 12
        assert all(axis.low <= value <= axis.high * (1 + 1e-9) for value, _ in axis.ticks)
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_fleet_bands_add_up_to_the_instances_and_groups_to_the_queue() -> None:
    groups = (*((100.0 * i, i) for i in range(1, 15)), (inf, 2))
    points = [
        tick(0.0, mixed=2),
        tick(10.0, mixed=3, starting=1, draining=1, groups=groups, waiting_batch=200, waiting_interactive=4),
    ]
    bands = series_of(fleet_charts.fleet(points, 60.0))
    assert sum(band.y[1] for band in bands if band.mark == "layer") == 5
    drawn = fleet_charts.queue(points, 60.0)
    assert sum(band.y[1] for band in series_of(drawn)) == 204
    assert len(series_of(drawn)) <= fleet_charts.GROUP_BANDS + 2
    assert drawn is not None
    heights = [int(top) for top in re.findall(r'class="layer"[^>]* d="M0 10000H\d+V(\d+)', draw(drawn))]
    assert heights == sorted(heights)


def test_policies_without_backpressure_show_none_rather_than_zero() -> None:
    assert fleet_charts.pressure([tick(0.0, ibp=nan, ibp_target=nan)], 10.0) is None


def test_batch_backpressure_that_was_never_above_zero_has_no_panel_but_a_word() -> None:
    never = fleet_charts.pressure([tick(0.0, bbp=0.0), tick(5.0, bbp=0.0)], 10.0)
    assert never is not None
    assert [series.name for series in series_of(never)] == ["IBP", "IBP target"]
    assert "BBP was 0 throughout" in draw(never)
    once = fleet_charts.pressure([tick(0.0, bbp=0.0), tick(5.0, bbp=2.0)], 10.0)
    assert [series.name for series in series_of(once)] == ["IBP", "IBP target", "BBP"]


def test_a_queue_that_was_always_empty_has_no_chart() -> None:
    assert fleet_charts.queue([tick(0.0), tick(5.0)], 10.0) is None
    assert fleet_charts.queue([], 10.0) is None
    assert fleet_charts.fleet([], 10.0) is None


def test_the_batch_size_chart_says_how_many_instances_it_leaves_out(page: Page) -> None:
    assert f"The {fleet_charts.INSTANCES_DRAWN} instances that changed it most, of 12 instances." in page.text
    chart = fleet_charts.batch_sizes(hour("chiron").batch_sizes, 3600.0)
    assert sum(len(series.x) for series in series_of(chart)) < 2 * 2000 + 100


def test_a_batch_size_is_drawn_from_its_instances_start_to_its_end_although_it_never_changed() -> None:
    sizes = [
        BatchSizePoint(t_s=t, instance_id=i, model="m", max_batch_size=n, running=0, itl_s=nan, itl_slo_s=nan)
        for i, t, n in ((1, 0.0, 32), (2, 0.0, 32), (3, 10.0, 32), (2, 40.0, 16), (3, 50.0, 0))
    ]
    lines = {s.name: s for s in series_of(fleet_charts.batch_sizes(sizes, 100.0)) if s.mark == "step"}
    drawn = {name: list(zip(line.x, line.y, strict=True)) for name, line in lines.items()}
    assert drawn == {
        "instance 1": [(0.0, 32), (100.0, 32)],
        "instance 2": [(0.0, 32), (40.0, 16), (100.0, 16)],
        "instance 3": [(10.0, 32), (50.0, 32)],
    }


def test_the_end_of_an_instance_whose_beginning_is_forgotten_draws_nothing() -> None:
    end = BatchSizePoint(t_s=9.0, instance_id=1, model="m", max_batch_size=0, running=0, itl_s=nan, itl_slo_s=nan)
    assert fleet_charts.batch_sizes([end], 100.0) is None


# Figures ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_figures_show_a_limit_far_beyond_what_happened(tmp_path: Path) -> None:
    # Warnings are errors here: a label outside its chart makes matplotlib give up the layout.
    quick = small()
    table = replace(quick.requests, finish_s=np.where(quick.requests.cls == 1, 1.1, quick.requests.finish_s))
    table = replace(table, first_token_s=np.where(table.cls == 1, 1.0, table.first_token_s))
    assert write_figures([replace(quick, requests=table)], tmp_path, formats=("svg",))


@pytest.mark.slow
def test_figures_of_an_empty_run_and_of_a_wrong_format(tmp_path: Path) -> None:
    bare = replace(small(), fleet=(), batch_sizes=(), decisions=())
    assert write_figures([bare], tmp_path, formats=("svg",))
    with pytest.raises(ReportError, match=r"formats is \['gif'\]; allowed are png, svg, pdf"):
        write_figures([bare], tmp_path, formats=("gif",))


def test_the_page_of_a_run_whose_gpus_nobody_saw_shows_no_zero() -> None:
    page = Page(report_html([unseen("gateway")]))
    assert "GPU" not in page.text


def test_late_batch_work_is_told_only_of_runs_with_batch_work() -> None:
    one = small()
    chats = replace(one.requests, cls=np.zeros_like(one.requests.cls))
    talk = replace(one, requests=chats, summary=summary_of(chats))
    assert "late batch" in report_html([one])
    assert "late batch" not in report_html([talk])


def test_what_counts_as_missed_names_every_way_to_end() -> None:
    simulated = Page(report_html([small()])).text
    assert all(name in simulated for name in OUTCOMES[1:])
    live = Page(report_html([replace(small(), seed=None)])).text
    assert "only if they had missed an SLO by then" in live


def test_a_single_run_is_compared_with_nothing_but_its_bound() -> None:
    live = small(seed=None, gpu_hours_bound=None, gpu_hours_bound_full=None)
    assert "Attainment against" not in Page(report_html([live])).text
    bounded = Page(report_html([small()])).text
    assert "Attainment against GPU-hours" in bounded
    assert bounded.count("Fleet by role") == 1
    assert "GPUs billed" not in bounded
