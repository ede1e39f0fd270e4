"""Whose the replicas of a workload are, without a cluster."""

from __future__ import annotations

from chiron.fleet.kubernetes.replicas import Replicas


def replicas_of(number: int, *, own: int = 0, advise: bool = False, follows: bool = False) -> Replicas:
    replicas = Replicas(advise=advise, follows=follows, yield_s=60.0)
    assert not replicas.observe(number, own=own, holds=own, now_s=0.0), "what is there at the start is nobody's doing"
    return replicas


def test_what_is_there_is_kept_taken_over_and_given_back() -> None:
    replicas = replicas_of(3)
    assert (replicas.wanted(0, 0, 0.0), replicas.found) == (3, 3)
    replicas.take()
    assert (replicas.wanted(1, 0, 0.0), replicas.found) == (3, 2)
    replicas.give_back(0)
    replicas.give_back(0)
    assert (replicas.wanted(0, 0, 0.0), replicas.found) == (3, 3), "there are no more than there are"


def test_what_others_add_is_theirs_and_what_they_cut_is_not_asked_for_until_later() -> None:
    replicas = replicas_of(2, own=2)
    assert replicas.observe(4, own=2, holds=2, now_s=1.0)
    assert (replicas.wanted(2, 0, 1.0), replicas.found) == (4, 0)
    assert replicas.observe(1, own=2, holds=2, now_s=2.0)
    assert replicas.foreign == "somebody else has scaled it from 4 to 1 replicas"
    assert [replicas.wanted(2, 0, now_s) for now_s in (2.0, 61.9, 62.0)] == [1, 1, 2]
    assert replicas.foreign == ""


def test_a_write_whose_answer_never_came_is_not_somebody_elses() -> None:
    replicas = replicas_of(2, own=2)
    replicas.attempted = 5
    assert not replicas.observe(5, own=5, holds=5, now_s=1.0)
    assert replicas.observe(6, own=5, holds=5, now_s=2.0), "it was one write"


def test_for_instances_whose_pods_have_yet_to_be_found_none_is_started() -> None:
    assert replicas_of(2).wanted(3, 3, 0.0) == 2


def test_where_another_scales_only_what_is_to_be_taken_over_counts() -> None:
    replicas = replicas_of(4, own=1, follows=True)
    assert replicas.wanted(1, 0, 0.0) == 4
    replicas.take()
    assert not replicas.observe(9, own=2, holds=2, now_s=1.0)
    assert replicas.wanted(2, 0, 1.0) == 4
