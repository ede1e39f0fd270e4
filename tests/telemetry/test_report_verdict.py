"""The sentence at the top of a report, for each situation that a reader can meet."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.telemetry.errors import ReportError
from chiron.telemetry.format import percent
from chiron.telemetry.result import Result
from chiron.telemetry.verdict import verdict
from result_factory import small, unseen


def run(policy: str, gpu_hours: float, met: float = 1.0, seed: int | None = 0, **changes: Any) -> Result:
    return small(policy, gpu_hours=gpu_hours, met=met, seed=seed, **changes)


def test_the_cheapest_that_attains_wins_and_is_compared_with_the_next() -> None:
    found = verdict([run("llumnix", 16.0), run("chiron", 10.0), run("static", 20.0)])
    assert found.headline == (
        "chiron attains at least 99 % in every class with the fewest GPU-hours: 10.00, 37.5 % fewer than llumnix "
        "(16.00), the next that attains it; chiron takes 2.00 times the lower bound for what it delivered."
    )
    assert found.winner == "chiron"
    assert [p.policy for p in found.ranking] == ["chiron", "llumnix", "static"]
    assert found.notes == ("One seed: the spread between seeds is not known.",)


def test_a_cheaper_policy_that_misses_does_not_win_and_is_named() -> None:
    found = verdict([run("cheap", 6.0, met=0.9), run("chiron", 10.0), run("llumnix", 16.0)])
    assert found.winner == "chiron"
    assert (
        "cheap takes fewer GPU-hours but misses the target: 90 % in its worst class (chat) with 6.00" in found.notes[0]
    )


def test_the_only_one_that_attains_says_how_close_the_others_come() -> None:
    found = verdict([run("a", 6.0, met=0.5), run("b", 8.0, met=0.95), run("chiron", 10.0)])
    assert found.headline == (
        "chiron is the only one of 3 policies that attains at least 99 % in every class: it takes 10.00 GPU-hours; "
        "chiron takes 2.00 times the lower bound for what it delivered. Next closest is b: 95 % in its worst class "
        "(chat) with 8.00 GPU-hours."
    )


def test_if_none_attains_the_closest_is_named() -> None:
    found = verdict([run("a", 6.0, met=0.5), run("b", 8.0, met=0.985)])
    assert found.winner is None
    assert found.headline.startswith(
        "No policy attains 99 % in every class. b comes closest: 98.5 % in its worst class"
    )
    assert [p.policy for p in found.ranking] == ["b", "a"]


def test_one_policy_alone_is_not_called_the_best() -> None:
    assert "No other policy ran, so nothing is compared" in verdict([run("chiron", 10.0)]).headline
    missed = verdict([run("chiron", 10.0, met=0.7)]).headline
    assert missed.startswith("chiron, the only policy that ran, falls short of 99 %: 70 % in its worst class (chat)")


def test_several_seeds_give_mean_and_range_and_a_count_of_wins() -> None:
    results = [run("chiron", 9.0 + s, seed=s) for s in range(3)] + [run("rival", 12.5 - s, seed=s) for s in range(3)]
    found = verdict(results)
    assert "10.00 (mean of 3 seeds, 9.00 to 11.00), 13 % fewer than rival (11.50)" in found.headline
    assert "2.00 times the lower bound" in found.headline
    assert found.notes == ("chiron takes fewer GPU-hours than rival in 2 of 3 seeds.",)


def test_one_bad_seed_is_a_miss() -> None:
    results = [
        run("chiron", 9.0, seed=0),
        run("chiron", 9.0, met=0.9, seed=1),
        *(run("b", 20.0, seed=s) for s in (0, 1)),
    ]
    assert verdict(results).winner == "b"


def test_only_seeds_that_all_ran_are_compared() -> None:
    found = verdict([run("chiron", 10.0, seed=0), run("chiron", 30.0, seed=1), run("rival", 12.0, seed=0)])
    assert "10.00, 16.6 % fewer than rival" in found.headline
    assert found.notes[0] == "Only seeds that every policy ran are compared: 0."


def test_different_seeds_are_said_to_be_different() -> None:
    found = verdict([run("chiron", 10.0, seed=0), run("rival", 12.0, seed=1)])
    assert found.notes[0].startswith("The policies ran different seeds")


def test_equal_gpu_hours_are_called_the_same() -> None:
    assert "the same as b (10.00), which also attains it" in verdict([run("a", 10.0), run("b", 10.0)]).headline


def test_without_a_bound_none_is_mentioned() -> None:
    assert "bound" not in verdict([run("a", 10.0, gpu_hours_bound=0.0), run("b", 11.0)]).headline


def test_no_request_is_said_plainly() -> None:
    assert verdict([run("a", 1.0, attainment={})]).headline == "No request was made, so there is nothing to attain."


def test_exactly_the_target_attains_it() -> None:
    assert verdict([run("a", 6.0, met=0.99), run("b", 10.0)]).winner == "a"


def test_the_target_decides() -> None:
    results = [run("a", 6.0, met=0.95), run("b", 10.0)]
    assert verdict(results, target=0.9).winner == "a"
    assert "at least 99.9 %" in verdict(results, target=0.999).headline
    with pytest.raises(ReportError, match="target is 99"):
        verdict(results, target=99)


def test_per_cent_never_rounds_a_miss_up() -> None:
    shares = (0.98999, 0.99, 0.9999, 1.0, 0.0, 0.29, 0.897, 0.9999613, 0.99999951, 1 - 1e-12)
    assert [percent(x) for x in shares] == [
        "98.99 %",
        "99 %",
        "99.99 %",
        "100 %",
        "0 %",
        "29 %",
        "89.7 %",
        "99.996 %",
        "99.99995 %",
        "99.999999 %",
    ]


def test_live_runs_are_compared_without_a_word_about_seeds() -> None:
    found = verdict([run("chiron", 10.0, seed=None), run("rival", 12.0, seed=None)])
    assert found.notes == ("One run each: the spread between runs is not known.",)
    assert "seed" not in found.headline


def test_what_cannot_be_compared_is_refused() -> None:
    from dataclasses import replace

    for results, message in (
        ([], "no result"),
        ([run("a", 1.0), replace(run("b", 1.0), scenario="other")], "different scenarios.*lunch, other"),
        ([run("a", 1.0), run("a", 2.0)], "'a' has two results for seed 0"),
        ([run("a", 1.0, seed=None), run("a", 2.0, seed=None)], "'a' has two results$"),
        ([run("a", 1.0), replace(run("b", 1.0), classes=())], "different request classes"),
    ):
        with pytest.raises(ReportError, match=message):
            verdict(results)


def test_figures_that_nobody_can_see_are_not_ranked_and_not_shown_as_zero() -> None:
    alone = verdict([unseen("gateway")])
    assert alone.headline == "gateway attains at least 99 % in every class."
    assert alone.ranking[0].over_bound is None
    both = verdict([unseen("gateway"), unseen("direct"), run("chiron", 10.0)])
    assert both.headline.startswith("chiron attains at least 99 % in every class with the fewest GPU-hours: 10.00, ")
    assert "gateway also attains it, with GPU-hours that are not known" in both.headline
    two = verdict([unseen("gateway"), unseen("direct")])
    assert two.headline == "gateway and direct attain at least 99 % in every class."
    missed = verdict([unseen("gateway", met=0.9)])
    assert missed.headline.endswith("falls short of 99 %: 90 % in its worst class (chat).")


def test_one_that_knows_the_future_wins_nothing_and_says_how_much_is_knowledge() -> None:
    found = verdict([run("clairvoyant", 8.0), run("chiron", 10.0), run("llumnix", 16.0)])
    assert found.winner == "chiron"
    assert [p.policy for p in found.ranking] == ["chiron", "llumnix", "clairvoyant"]
    assert found.notes[-1] == (
        "chiron takes 1.25 times the GPU-hours of a schedule that knows the future (8.00): of its distance to the "
        "lower bound, 40 % is knowledge."
    )
    missed = verdict([run("clairvoyant", 8.0, met=0.97), run("chiron", 10.0)])
    assert missed.notes[-1].startswith("No schedule was found that attains 99 % with the future known: 97 %")
    assert verdict([run("clairvoyant", 8.0)]).winner == "clairvoyant", "alone it is what ran"
