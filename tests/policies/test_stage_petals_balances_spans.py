"""``stage-petals``: replicas are as many as there were, and move to where the pipeline is weakest, as Petals' do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from chiron.policies.stages.petals import (
    PetalsState,
    Places,
    StagePetalsSettings,
    better_place,
    decide_stages,
    delay_s,
    joined,
    route,
)
from chiron.policies.views import PipelineView, ReplicaView
from pipelines import pipeline_view, stage_kind, stage_view


def places(*layers: int, least: int = 1, most: int = 8) -> Places:
    return Places(layers=layers, least=(least,) * len(layers), most=(most,) * len(layers))


def view_of(layers: list[int], planned: list[int], now_s: float = 0.0, most: int = 12) -> PipelineView:
    first = 0
    stages = []
    for number, (count, replicas) in enumerate(zip(layers, planned, strict=True)):
        kind = stage_kind(number, layers=(first, first + count - 1), max_replicas=most)
        stages.append(stage_view(kind, replicas))
        first += count
    return replace(pipeline_view(stages), now_s=now_s)


def planned(view: PipelineView, state: PetalsState | None, **settings: object) -> tuple[list[int], PetalsState]:
    plans, state = decide_stages(StagePetalsSettings(**settings), state, view)  # type: ignore[arg-type]
    return [plan.replicas for plan in plans], state


@pytest.mark.parametrize(
    ("counts", "stage", "target"),
    [
        ((3, 1), 0, 1),  # Least throughput 1 of 2: half of what it could be.
        ((2, 1), 0, -1),  # It would only be the other way round.
        ((4, 2, 2), 0, -1),  # (3, 3, 2) is no better than before.
        ((5, 2, 2), 0, 1),  # Others would follow, to (3, 3, 3): 2 of 3 is below 0.75.
        ((5, 4, 3), 0, -1),  # (4, 4, 4): 3 of 4 is not.
        ((5, 2, 2), 1, -1),  # It is at its best place already.
        ((9, 1), 1, -1),  # Nobody leaves layers alone.
    ],
)
def test_a_replica_moves_if_all_would_find_enough_after_it(counts: tuple[int, ...], stage: int, target: int) -> None:
    assert better_place(places(*(10,) * len(counts), most=12), counts, stage, 0.75) == target


def test_a_replica_of_many_layers_is_worth_less() -> None:
    uneven = places(8, 8, 16, 8, most=24)
    assert [uneven.throughput(stage) for stage in (0, 2)] == [pytest.approx(2 / 9), pytest.approx(2 / 17)]
    assert better_place(uneven, (6, 6, 6, 6), 0, 0.75) == 2
    assert joined(uneven, (1, 1, 1, 1), 24) == [5, 5, 9, 5]
    assert joined(places(10, 10, most=3), (1, 1), 9) == [3, 3]
    assert joined(places(10, 10), (5, 2), 5) == [3, 2]


def test_machines_look_in_turn_once_in_two_minutes_until_all_are_well() -> None:
    counts, state = planned(view_of([8, 8, 16, 8], [6, 6, 6, 6]), None)
    assert counts == [6, 6, 6, 6]
    seen = [counts]
    for tick in range(1, 49):
        counts, state = planned(view_of([8, 8, 16, 8], counts, 5.0 * tick), state)
        assert sum(counts) == 24
        seen.append(counts)
    assert seen[1] == [5, 6, 7, 6]  # Five seconds are one look of 24 machines.
    assert max(sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(seen)) == 2
    assert seen[24] == seen[-1]
    least = min(places(8, 8, 16, 8, most=24).throughputs(seen[-1]))
    assert 0.749 * min(places(8, 8, 16, 8, most=24).throughputs([5, 5, 9, 5])) <= least


def test_with_a_number_of_servers_they_join_where_it_is_weakest() -> None:
    counts, state = planned(view_of([10, 10, 10], [1, 1, 1]), None, servers=7)
    assert (counts, state.servers) == ([3, 2, 2], 7)
    assert planned(view_of([10, 10, 10], [3, 1, 2], 1.0), state, servers=7)[0] == [3, 2, 2]  # One is brought back.


def test_routes_have_the_least_delay_whatever_the_load() -> None:
    def replica(**changes: object) -> ReplicaView:
        return replace(ReplicaView(layers=10, hop_s=0.0002, sequences=0, kv_left_tokens=1000), **changes)  # type: ignore[arg-type]

    settings = StagePetalsSettings()
    busy, free, far = replica(sequences=200), replica(), replica(hop_s=0.1)
    assert delay_s(busy, 1000) == pytest.approx(0.0002 + 0.018 + 10 / 300)
    assert delay_s(busy, 1001) == pytest.approx(delay_s(busy, 1000) + 10.0)
    assert route(settings, [busy, free], 100, 1) == 0
    assert route(settings, [far, free], 100, 1) == 1
    assert route(settings, [replica(kv_left_tokens=99), far], 100, 1) == 1
    even = StagePetalsSettings(route="max_throughput")
    taken = [route(even, [busy, free, far], 100, number) for number in range(300)]
    assert [taken.count(index) for index in range(3)] == [pytest.approx(100, abs=2)] * 3


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="servers is -1"):
        StagePetalsSettings(servers=-1)
    with pytest.raises(ValueError, match="check_s is 0"):
        StagePetalsSettings(check_s=0)
