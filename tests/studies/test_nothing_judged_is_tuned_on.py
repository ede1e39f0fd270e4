"""What ``chiron tune`` may see, and the proof that it is not what ``compare`` judges."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from chiron.cli import app
from chiron.config.build import workload_of
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.studies.calibration import Calibration, calibrations, check_apart, seen, windows
from chiron.workload.load import trace_digest
from study_factory import GENERATED, TRACED

CSV = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{i},100,{10 + i % 7}\n" for i in range(120))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    (tmp_path / "own.csv").write_text(CSV)
    (tmp_path / "copy.csv").write_text(CSV)
    (tmp_path / "other.csv").write_text(CSV.replace("0,100,", "0,101,"))
    path = tmp_path / "own.toml"
    path.write_text(
        TRACED.replace("azure-2023-conv", "own.csv").replace('duration = "3m"\n', "").replace("traced", "own")
    )
    return path


def test_the_first_part_is_tuned_on_and_the_rest_judged_as_if_it_began_at_0() -> None:
    judged = parse_scenario(TRACED + '[calibration]\nfirst = "1m"\n', directory=Path())
    whole = workload_of(parse_scenario(TRACED, directory=Path()), 1)
    first, rest = workload_of(judged, 1, part="calibration"), workload_of(judged, 1)
    assert len(first) + len(rest) == len(whole)
    assert first.arrival_s[-1] < 60.0 <= whole.arrival_s[len(first)]
    np.testing.assert_array_equal(rest.arrival_s, whole.arrival_s[len(first) :] - 60.0)
    np.testing.assert_array_equal(rest.output_tokens, whole.output_tokens[len(first) :])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ('first = "1h"', "calibration.first: 3600 s leaves no request; the last arrives at"),
        ('first = "1m"\nscenarios = ["demo"]', "calibration: give either first"),
        ("", "calibration: give either first"),
        ('fist = "1m"', "calibration.fist: unknown key"),
    ],
)
def test_a_calibration_that_cannot_be_meant_is_an_error(calibration: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workload_of(parse_scenario(f"{TRACED}[calibration]\n{calibration}\n", directory=Path()), 1)


def test_without_a_word_about_it_the_first_third_is_tuned_on() -> None:
    judged, (source,) = calibrations(parse_scenario(TRACED, directory=Path()), [], None)
    (seen,), (rest,) = windows(source.scenario, "calibration"), windows(judged, "judged")
    assert seen.end_s == rest.start_s == pytest.approx(60.0, abs=2.0)
    check_apart([seen], [rest], "settings.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "own.csv"], "is both tuned on and judged"),
        (["--calibrate", "copy.csv"], "is both tuned on and judged"),
        (["--calibrate", "own.toml"], "is both tuned on and judged"),
        (["--calibrate", "none.toml"], "none.toml"),
        (["--calibrate", "none.csv"], "neither a file nor a packaged trace"),
        (["--calibrate", "other.csv", "--first", "1m"], "give either --calibrate or --first"),
        (["--first", "5h"], "leaves no request"),
        (["--set", "calibration.first='5h'"], "leaves no request"),
        (["--first", "soon"], "--first: duration 'soon'"),
        (["--trials", "0"], "--trials is 0; it must be 1 or more"),
        (["--target", "99"], "--target is 99; it must be above 0 and at most 1"),
        (["--jobs", "many"], "--jobs is 'many'; it must be auto, or 1 or more"),
        (["--jobs", "2", "--ray", "auto"], "give either --jobs or --ray"),
        (["--out", "nowhere/x.toml"], "there is no directory"),
        (["--policy", "hpa"], "unknown policy 'hpa'; did you mean"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(
    options: list[str], message: str, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    result = call("tune", scenario.name, *options)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr
    assert result.stderr.count("error:") == 1


def test_tuned_settings_are_compared_on_what_they_have_not_seen(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    tuned = call("tune", "own.toml", "-p", "hpa-queue", "--first", "1m", "-n", 2, "--jobs", 1, "-o", "found.toml")
    assert tuned.exit_code == 0, tuned.output
    assert "(as it was)" in tuned.stdout
    compared = call("compare", "own.toml", "-p", "hpa-queue", "--settings", "found.toml", "--jobs", 1)
    assert compared.exit_code == 0, compared.output
    assert "judged without the first 60 s" in compared.stderr
    renamed = scenario.with_name("renamed.toml")
    renamed.write_text(scenario.read_text().replace('"own"', '"renamed"').replace("own.csv", "copy.csv"))
    refused = call("compare", renamed, "-p", "hpa-queue", "--settings", "found.toml", "--jobs", 1)
    assert refused.exit_code == 2
    assert "found.toml: trace own.csv from 0 min to 1 min is both tuned on and judged" in " ".join(
        refused.stderr.split()
    )


PROGRAMS = """
[[program]]
model = "llama"
class = "chat"
arrivals = { kind = "poisson", rate = 0.5, duration = "2m" }
steps = 3
first = 100
added = 20
output = 10
"""


@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [
        ("", "", True),
        ('class = "chat"\narrivals', 'class = "chat"\nname = "agents"\ndeadline = "1m"\narrivals', True),
        ("seeds = [1]", "seeds = [2]", False),
        ("rate = 0.5", "rate = 0.6", False),
        ("steps = 3", "steps = 4", False),
    ],
)
def test_programs_are_known_by_what_draws_them(before: str, after: str, shared: bool) -> None:
    """As generated streams are. Labels and deadlines draw nothing."""
    text = TRACED[: TRACED.index("[[workload]]")] + PROGRAMS
    own = windows(parse_scenario(text, directory=Path()), "judged")
    other = windows(parse_scenario(text.replace(before, after), directory=Path()), "judged")
    assert [(window.start_s, window.end_s) for window in own] == [(0.0, 120.0)]
    assert own[0].shares(other[0]) is shared
    judged, (source,) = calibrations(parse_scenario(text, directory=Path()), [], 40.0)
    check_apart(windows(source.scenario, "calibration"), windows(judged, "judged"), "settings.toml")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("own.toml", "own: program[0] of seed 1 from 0 min to 2 min is both tuned on and judged"),
        ("other.csv", "--calibrate other.csv: takes the place of traces, and program[0] would be tuned on and judged"),
    ],
)
def test_programs_that_are_judged_are_not_tuned_on(
    calibration: str, message: str, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    text = scenario.read_text()
    alone = text[: text.index("[[workload]]")] + PROGRAMS
    Path("own.toml").write_text(alone if calibration == "own.toml" else text + PROGRAMS)
    result = call("tune", "own.toml", "--calibrate", calibration)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr


HISTORY = '\n[[history]]\ntrace = "{}"\nmodel = "llama"\nclass = "chat"\n{}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv.gz", gzip.compress(CSV.encode())),
        ("own.tsv", CSV.replace(",", "\t").encode()),
        ("lines.csv", CSV.encode() + b"\n\n"),
        ("spaced.csv", CSV.replace("\n", "\r\n").encode()),
        ("shuffled.csv", "\n".join([*CSV.split("\n")[:1], *reversed(CSV.split("\n")[1:])]).encode()),
    ],
)
def test_a_trace_is_known_by_its_requests_however_it_is_written(
    name: str, content: bytes, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    Path(name).write_bytes(content)
    result = call("tune", "own.toml", "--calibrate", name)
    assert (result.exit_code, "is both tuned on and judged" in " ".join(result.stderr.split())) == (2, True)
    assert trace_digest("other.csv") != trace_digest("own.csv")


def test_a_copy_of_packaged_clients_is_known_by_its_tables(tmp_path: Path) -> None:
    with np.load(str(resources.files("chiron") / "data" / "traces" / "servegen-m-small.npz")) as packed:
        np.savez(tmp_path / "copy.npz", **packed)
    assert trace_digest(tmp_path / "copy.npz") == trace_digest("servegen-m-small") != trace_digest("servegen-m-mid")


def test_what_policies_live_through_before_a_calibration_is_tuned_on_too(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    text = scenario.read_text().replace('"own"', '"past"').replace("own.csv", "other.csv")
    Path("past.toml").write_text(text + HISTORY.format("copy.csv", 'start = "30s"'))
    result = call("tune", "own.toml", "--calibrate", "past.toml")
    assert result.exit_code == 2
    said = "own: trace copy.csv of the history from 0.5 min to its end is both tuned on and judged"
    assert said in " ".join(result.stderr.split())


def test_windows_of_a_history_are_in_the_settings_file(scenario: Path) -> None:
    past = parse_scenario(scenario.read_text() + HISTORY.format("other.csv", ""), directory=scenario.parent)
    found = seen([Calibration(scenario=past, part="judged")], [1])
    assert [window.source for window in found] == ["trace own.csv", "trace other.csv of the history"]
    generated = GENERATED + GENERATED[GENERATED.index("[[workload]]") :].replace("workload", "history")
    drawn = parse_scenario(generated, directory=scenario.parent)
    own, before = seen([Calibration(scenario=drawn, part="judged")], [1])
    assert not own.shares(before), "streams of the history draw by themselves"


@pytest.mark.parametrize(("part", "code"), [('duration = "20s"', 0), ('duration = "21s"', 2), ("", 2)])
def test_a_policy_is_not_judged_by_what_it_has_lived_through(
    part: str, code: int, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    Path("found.toml").write_text("[policies.hpa-queue]\ntarget = 1\n")
    Path("own.toml").write_text(scenario.read_text() + 'start = "20s"\n' + HISTORY.format("copy.csv", part))
    commands = [
        ("compare", "own.toml", "-p", "hpa-queue", "--settings", "found.toml", "--jobs", 1),
        ("tune", "own.toml", "-p", "hpa-queue", "-n", 1, "--jobs", 1, "--calibrate", "other.csv"),
    ]
    for command in commands:
        result = call(*command)
        said = "own: trace copy.csv of the history and trace own.csv share from 0.3333 min to"
        assert (result.exit_code, said in " ".join(result.stderr.split())) == (code, code == 2), result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies = 1", "settings.toml: policies: missing"),
        ("[policies.hpa-queue]\ntarget = 'high'", "policies.hpa-queue.target: 'high' must be a finite number"),
        ("[policies.hpa-queue]\nunknown = 1", "policies.hpa-queue.unknown: unknown key"),
        ("[policies.hpa-queue]\ntarget = 1\n[calibration]", "calibration: {} must be tables"),
        ("not TOML", "settings.toml: not TOML"),
    ],
)
def test_a_settings_file_is_not_believed(text: str, message: str, scenario: Path) -> None:
    path = scenario.with_name("settings.toml")
    path.write_text(text)
    result = call("compare", scenario, "--settings", path)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
