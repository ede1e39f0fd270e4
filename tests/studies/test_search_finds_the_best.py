"""The search of ``chiron tune`` on rules whose best settings are known."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from random import Random
from typing import Any

import pytest

from chiron.config.policies import PolicyChoice
from chiron.config.scenario import parse_scenario
from chiron.policies.ranges import tunables, value_of, with_values
from chiron.policies.registry import POLICIES
from chiron.policies.rivals.schedulers.llumnix import LlumnixSettings
from chiron.policies.starts import STARTS
from chiron.sim.setup import Setup
from chiron.studies.calibration import Calibration
from chiron.studies.journal import Journal
from chiron.studies.objective import FAILED, score
from chiron.studies.runner import Runner
from chiron.studies.search import best_of, halton
from chiron.studies.tune import Budget, Tuned, starts_of, tune, workloads
from study_factory import TRACED, Ruled, figures

SCENARIO = parse_scenario(TRACED, directory=Path())
ON = workloads([Calibration(scenario=SCENARIO, part="judged")], None)
LLUMNIX = PolicyChoice(policy="llumnix", settings=LlumnixSettings())


def rule(setup: Setup) -> dict[str, Any]:
    """Best at 300 blocks: fewer miss SLOs, more cost GPU-hours."""
    blocks = setup.settings.scale_up_blocks
    return figures(1.0 if blocks >= 300 else 0.9, 1.0 + blocks / 1000)


def searched(executor: Any, journal: Path | None = None, **budget: Any) -> Tuned:
    return tune("llumnix", LLUMNIX, ON, Budget(**budget), Runner(executor, Journal(journal)))


def test_it_comes_close_to_the_best_and_never_leaves_what_the_settings_allow() -> None:
    found = searched(Ruled(rule), trials=60)
    assert 300 <= found.values["scale_up_blocks"] < 330  # type: ignore[operator]
    assert len(found.candidates) == 60
    assert len({tuple(each.values.items()) for each in found.candidates}) == 60
    assert all(each.values["scale_up_blocks"] < each.values["scale_down_blocks"] for each in found.candidates)  # type: ignore[operator]


def test_steps_around_the_best_come_closer() -> None:
    def bowl(setup: Setup) -> dict[str, Any]:
        off = log(setup.settings.scale_up_blocks / 300) ** 2 + log(setup.settings.max_num_seqs / 100) ** 2
        return figures(1.0, 1.0 + off)

    found = searched(Ruled(bowl), trials=60)
    costs = [each.score.gpu_hours - 1.0 for each in found.candidates if each.score is not None]
    assert min(costs[30:]) < min(costs[:30]) / 4


def test_the_first_candidate_is_the_policy_as_it_is_and_one_trial_finds_nothing_else() -> None:
    found = searched(Ruled(rule), trials=1)
    assert dict(found.values) == {"scale_up_blocks": 10.0, "scale_down_blocks": 60.0, "max_num_seqs": 256}


def test_it_starts_from_the_present_settings_the_published_ones_and_those_that_were_found_before() -> None:
    present = PolicyChoice(policy="llumnix", settings=replace(LlumnixSettings(), max_num_seqs=77))
    found = tune("llumnix", present, ON, Budget(trials=20), Runner(Ruled(rule), Journal(None)))
    before = [{"scale_up_blocks": 10.0, "scale_down_blocks": 60.0, "max_num_seqs": n} for n in (77, 256)]
    expected = [*before, *STARTS["llumnix"]]
    assert [dict(each.values) for each in found.candidates[: len(expected)]] == expected
    assert list(found.starts) == expected
    assert len(found.candidates) == 20


def test_a_search_is_never_worse_than_what_was_found_before() -> None:
    narrow = {tuple(start.values()) for start in STARTS["llumnix"][:1]}

    def hidden(setup: Setup) -> dict[str, Any]:
        own = setup.settings
        hit = (own.scale_up_blocks, own.scale_down_blocks, own.max_num_seqs) in narrow
        return figures(1.0 if hit else 0.9, 1.0)

    assert dict(searched(Ruled(hidden), trials=20).values) == STARTS["llumnix"][0]


def test_every_start_is_of_a_policy_and_within_the_ranges_of_its_settings() -> None:
    for name, starts in STARTS.items():
        space = {each.name: each for each in tunables(POLICIES[name].settings)}
        for values in starts:
            with_values(POLICIES[name].settings(), values)
            ends = [(space[key].value(0.0), value, space[key].value(1.0)) for key, value in values.items()]
            assert all(least <= value <= most for least, value, most in ends), (name, values)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llumnix-tuned", "hpa-kv-tuned"])
def test_a_tuned_policy_starts_from_what_was_published_too(name: str) -> None:
    choice = PolicyChoice(policy=name, settings=POLICIES[name].settings())
    space = tunables(POLICIES[name].settings)
    published = POLICIES[name.removesuffix("-tuned")].settings()
    assert {each.name: value_of(published, each.name) for each in space} in starts_of(choice, space)[:2]


def test_the_order_in_which_trials_end_changes_nothing_and_another_seed_does() -> None:
    forwards, backwards = searched(Ruled(rule), trials=24), searched(Ruled(rule, order=-1), trials=24)
    assert forwards == backwards
    assert searched(Ruled(rule), trials=24, seed=2).candidates != forwards.candidates


@pytest.mark.parametrize("stopped_after", [1, 7, 20])
def test_a_search_that_was_killed_goes_on_and_finds_the_same(stopped_after: int, tmp_path: Path) -> None:
    left = stopped_after

    def until_killed(setup: Setup) -> dict[str, Any]:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return rule(setup)

    journal = tmp_path / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        searched(Ruled(until_killed), journal, trials=24)
    with journal.open("ab") as file:
        file.write(b'{"key": "torn by a kill')
    resumed = Ruled(rule)
    assert searched(resumed, journal, trials=24) == searched(Ruled(rule), trials=24)
    assert len(resumed.names) == 24 - stopped_after


def test_a_damaged_line_of_the_journal_is_simulated_again(tmp_path: Path) -> None:
    journal = tmp_path / "trials.jsonl"
    searched(Ruled(rule), journal, trials=4)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0].replace('"gpu_hours": 1.01', '"gpu_hours": 0.01'), *lines[1:]]))
    again = Ruled(rule)
    assert searched(again, journal, trials=4).values == searched(Ruled(rule), trials=4).values
    assert len(again.names) == 1


def test_a_candidate_that_fails_is_the_last_and_is_told() -> None:
    def broken(setup: Setup) -> dict[str, Any] | Exception:
        return ValueError("no") if setup.settings.max_num_seqs > 100 else rule(setup)

    found = searched(Ruled(broken), trials=24)
    assert found.errors == ("no",)
    assert found.values["max_num_seqs"] <= 100  # type: ignore[operator]


def test_a_target_kept_comes_first_then_steps_of_shortfall_then_gpu_hours_then_attainment() -> None:
    runs = [(0.99, 9.0), (1.0, 9.0), (0.9899, 1.0), (0.986, 0.9), (0.95, 0.1)]
    scores = [score([figures(*run)], [1.0], 0.99) for run in runs]
    ranked = sorted([*scores, FAILED], key=lambda each: each.rank)
    expected = [(1.0, 9.0), (0.99, 9.0), (0.986, 0.9), (0.9899, 1.0), (0.95, 0.1)]
    assert [(each.attainment, each.cost) for each in ranked[:-1]] == expected
    assert ranked[-1] == FAILED
    both = score([figures(1.0, 2.0), figures(0.97, 8.0)], [1.0, 2.0], 0.99)
    assert (both.cost, both.gpu_hours, both.shortfall) == (3.0, 10.0, pytest.approx(0.01))


def test_the_worst_run_comes_before_the_mean() -> None:
    even = score([figures(0.95, 9.0), figures(0.95, 9.0)], [1.0, 1.0], 0.99)
    uneven = score([figures(0.99, 1.0), figures(0.93, 1.0)], [1.0, 1.0], 0.99)
    assert uneven.shortfall < even.shortfall
    assert even.rank < uneven.rank


def test_what_gives_a_workload_up_that_the_published_settings_serve_is_not_chosen() -> None:
    both = workloads([Calibration(scenario=SCENARIO, part="judged")], [1, 2])
    published = LlumnixSettings().scale_up_blocks

    def uneven(setup: Setup) -> dict[str, Any]:
        """Published settings serve one seed of two; all others have a little less of both, for less."""
        if setup.settings.scale_up_blocks == published:
            return figures(1.0 if setup.seed == 1 else 0.5, 5.0)
        return figures(0.97, 1.0)

    found = tune("llumnix", LLUMNIX, both, Budget(trials=8), Runner(Ruled(uneven), Journal(None)))
    assert len(found.candidates) == 8
    assert found.values["scale_up_blocks"] == published


@pytest.mark.parametrize("draw", [pytest.param(n, marks=pytest.mark.slow if n % 4 else ()) for n in range(12)])
def test_a_race_stops_only_candidates_that_could_not_have_become_the_best(draw: int) -> None:
    """Against all of them on all workloads."""
    on = workloads([Calibration(scenario=SCENARIO, part="judged")], [1, 2, 3, 4])

    def drawn(setup: Setup) -> dict[str, Any]:
        own = setup.settings
        random = Random(f"{draw} {setup.seed} {own.scale_up_blocks} {own.max_num_seqs}")
        return figures(min(1.0, random.uniform(0.9 + 0.01 * draw, 1.02)), random.uniform(1.0, 3.0))

    executor = Ruled(drawn)
    runner = Runner(executor, Journal(None))
    runner.total = 4 * 20
    found = tune("llumnix", LLUMNIX, on, Budget(trials=20), runner)
    whole = []
    for each in found.candidates:
        settings = with_values(LlumnixSettings(), each.values)
        summaries = [drawn(replace(setup, policy="llumnix", settings=settings)) for setup in on.setups]
        whole.append(replace(each, score=score(summaries, on.bounds, 0.99)))
    published = whole[0].score
    assert published is not None
    ranked = [replace(each, score=each.score.against(published.shortfalls)) for each in whole if each.score is not None]
    assert found.best == best_of(ranked)
    kept = [each for each in found.candidates if each.score is not None and not each.score.stopped]
    assert all(each in ranked for each in kept)
    assert found.stopped == 20 - len(kept) > 0
    assert len(executor.names) == runner.total < 4 * 20


def test_the_best_that_is_still_possible_is_no_worse_than_what_comes_when_nothing_else_lacks() -> None:
    """Shortfalls of 5 and 9 points in seven runs are four steps on the mean, however sums are rounded."""
    shares = [0.94, 0.9, 1.0, 1.0, 1.0]
    part = score([figures(share, 2.0) for share in shares], [1.0] * 5, 0.99)
    whole = score([figures(share, 2.0) for share in [*shares, 1.0, 1.0]], [1.0] * 7, 0.99)
    assert part.best_possible(7) <= whole.rank


def test_a_candidate_that_fails_on_one_workload_runs_on_no_more() -> None:
    on = workloads([Calibration(scenario=SCENARIO, part="judged")], list(range(1, 13)))

    def broken(setup: Setup) -> dict[str, Any] | Exception:
        return rule(setup) if setup.settings.max_num_seqs == 256 else ValueError("no")

    executor = Ruled(broken)
    found = tune("llumnix", LLUMNIX, on, Budget(trials=8), Runner(executor, Journal(None)))
    failed = [each for each in found.candidates if each.values["max_num_seqs"] != 256]
    assert failed
    assert all(each.score is FAILED for each in failed)
    assert sum(f"candidate {failed[-1].number + 1}," in name for name in executor.names) == 1


def test_halton_mirrors_digits() -> None:
    assert [halton(n, 2) for n in range(1, 5)] == [0.5, 0.25, 0.75, 0.125]
    assert [round(halton(n, 3), 6) for n in range(1, 4)] == [0.333333, 0.666667, 0.111111]
