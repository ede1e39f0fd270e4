"""The page on the paper's claims: what its figures mean, and what it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "paper.py"
sys.path.insert(0, str(BENCH.parent))

import paper  # noqa: E402
from chiron.studies.journal import Journal  # noqa: E402
from paper import CLAIMS, Bench, Figures, Section, Trial, key_of, main, page, settles_s, spread  # noqa: E402


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([(0.0, 64)], 0.0, id="it never moved"),
        pytest.param([(0.0, 64), (20.0, 500)], 20.0, id="one step"),
        pytest.param([(0.0, 64), (20.0, 500), (40.0, 440), (60.0, 560)], 20.0, id="within a quarter"),
        pytest.param([(0.0, 64), (20.0, 500), (400.0, 200), (410.0, 500)], 410.0, id="a halving late"),
    ],
)
def test_settled_is_when_it_last_was_far_from_its_median(sizes: list[tuple[float, int]], expected: float) -> None:
    assert settles_s(sizes) == expected


def test_a_spread_is_shown_where_there_is_one() -> None:
    assert spread([0.5, 0.5], lambda value: f"{value:.1f}") == "0.5"
    assert spread([0.25, 0.75], lambda value: f"{value:.2f}") == "0.50 (0.25 to 0.75)"


def test_the_page_has_each_verdict_in_its_first_table() -> None:
    section = Section(
        title="A claim, checked",
        claim="c",
        source="s",
        setting="t",
        head=("a", "b"),
        rows=[("1", "2")],
        verdict="partly: some of it",
        why="there is no more.",
    )
    text = page([section], seeds=2, runs=4)
    assert "| [A claim, checked](#a-claim-checked) | partly |" in text
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text
    assert "means over 2 seeds" in text
    assert "**Verdict**: partly: some of it\n\n**Why**: there is no more.\n" in text
    assert "**Why**" not in page([replace(section, verdict="holds: all of it")], seeds=2, runs=4)
    with pytest.raises(AssertionError, match="A claim, checked: a claim that does not hold as it is needs its why"):
        replace(section, why="")


class Known:
    """In place of a bench: the same figures for whatever is asked."""

    seeds = (1,)

    def __init__(self, **summary: float) -> None:
        spans = {"mean": 0.1, "p90": 4.0, "p99": 5.5}
        counts = {"requests": 1000, "gpus_peak": 50, "instances_peak": 50, "scaling_actions": 9, "reversals": 1}
        self._figures = Figures(
            summary={"gpu_hours": 20.0, "sim_s": 3600.0, "attainment_all": 0.9, **counts, **summary}
            | {"ttft_s": {"chat": spans}, "itl_s": {"chat": spans}},
            met={"chat": 0.995, "batch": 1.0},
            batch_sizes=((0.0, 64), (599.0, 20)),
            waits_s=(),
        )

    def figures(self, trials: Iterable[Trial]) -> dict[Trial, Figures]:
        waits = {trial: (*range(trial.seed, trial.seed + 9), 12.0) for trial in trials}
        return {
            trial: replace(self._figures, waits_s=(*waits_s, trial.seed + 12.0)) for trial, waits_s in waits.items()
        }

    def over_seeds(self, texts: Mapping[Any, tuple[str, str]], step_time: float = 1.0) -> dict[Any, list[Figures]]:
        return {key: [self._figures] for key in texts}


def test_each_claim_that_does_not_hold_says_why_by_its_own_figures() -> None:
    sections = {name: claim(cast(Bench, Known())) for name, claim in CLAIMS.items()}
    short = [section for section in sections.values() if not section.holds]
    assert page(list(sections.values()), seeds=1, runs=1).count("**Why**: ") == len(short) > 4
    assert "20 of 50 GPUs in the mean" in sections["gpu-hours"].why
    assert "has 20 of the 50 GPUs of its peak (8B) and 20 of the 50 GPUs" in sections["ablation"].why
    assert "within 5.5 s" in sections["gpu-hours"].why


TEXT = """
duration = "20s"
[classes.chat]
kind = "interactive"
ttft = "2s"
itl = "200ms"
[models.m]
instances = [{ profile = "PROFILE" }]
[[workload]]
model = "m"
class = "chat"
generate = { kind = "poisson", rate = 1, duration = "20s", lengths = "sharegpt-300" }
"""


def test_what_is_in_the_journal_is_not_run_again(tmp_path: Path) -> None:
    """The figures are none that a run has."""
    trial = Trial(text=TEXT.replace("PROFILE", paper.PROFILES[paper.EIGHT]), policy="chiron-paper", seed=2)
    found = Figures(
        summary={"gpu_hours": -1.5, "attainment_all": 1.0},
        met={"chat": 0.25},
        batch_sizes=((0.0, 64), (1.5, 80)),
        waits_s=(0.5, float("inf")),
    )
    journal = tmp_path / "paper.trials.jsonl"
    Journal(journal).add(key_of(trial), "known", asdict(found))
    bench = Bench([2], 1, journal)
    assert bench.figures([trial]) == {trial: found}
    assert bench.runs == 1
    bench.close()
    others = [replace(trial, step_time=1.15), replace(trial, policy="llumnix"), replace(trial, seed=3)]
    assert len({key_of(each) for each in (trial, *others)}) == 4


def test_what_a_trial_reads_from_files_counts_with_it(tmp_path: Path) -> None:
    """As profiles and what tunings found: neither is in its text."""
    profile = json.loads(resources.files("chiron").joinpath("data/profiles/llama-3.1-8b/a100/tp1.json").read_text())
    path = tmp_path / "own.json"
    trial = Trial(text=TEXT.replace("PROFILE", str(path)), policy="static", seed=1)
    keys = []
    for h_ms in (profile["h_ms"], profile["h_ms"], 2 * profile["h_ms"]):
        path.write_text(json.dumps({**profile, "h_ms": h_ms}))
        key_of.cache_clear()
        keys.append(key_of(trial))
    assert keys[0] == keys[1] != keys[2]


def test_an_unknown_claim_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--only", "attainment,speed"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"--only names 'speed'; there are: {', '.join(CLAIMS)}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_claim_runs(tmp_path: Path) -> None:
    out = tmp_path / "paper.md"
    subprocess.run(
        [sys.executable, BENCH, "--only", "convergence", "--seeds", "1", "--jobs", "1", "--out", out],
        check=True,
        capture_output=True,
        timeout=1200,
    )
    assert "| 8B | chiron-paper |" in out.read_text(encoding="utf-8")
