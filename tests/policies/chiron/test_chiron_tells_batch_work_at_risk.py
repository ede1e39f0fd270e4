"""When ``chiron`` says that batch work is at risk, so that it goes before requests that are lost already."""

from __future__ import annotations

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.settings import ChironSettings
from policy_factory import fleet, group, instance, model

OURS = ChironSettings()
SOON_S, LATE_S = 200.0, 86_400.0


class Day:
    """What is planned, tick by tick, for two instances."""

    def __init__(self) -> None:
        self.now_s, self.state = 0.0, None

    def at_risk(self, requests: int, due_s: float, *, ready: bool = True, running: int = 0) -> bool:
        self.now_s += OURS.tick_s
        live = model(
            [instance(id=i, state="ready" if ready else "starting") for i in range(2)],
            groups=(group(due_s, requests),) if requests else (),
            running_batch=running,
        )
        plans, self.state = decide_fleet(OURS, self.state, fleet(live, now_s=self.now_s, since_s=OURS.tick_s))
        return plans["llama"].batch_at_risk


def test_a_deadline_that_the_fleet_cannot_keep_is_at_risk() -> None:
    assert Day().at_risk(50_000, SOON_S)


def test_a_day_is_enough_for_ten_requests_also_while_the_first_engines_load() -> None:
    day = Day()
    assert [day.at_risk(10, LATE_S, ready=False) for _ in range(12)] == [False] * 12
    assert not day.at_risk(10, LATE_S)


def test_it_stays_so_while_it_runs() -> None:
    day = Day()
    assert day.at_risk(50_000, SOON_S)
    assert day.at_risk(10, SOON_S, running=100)
    assert day.at_risk(0, SOON_S, running=100)


def test_what_comes_after_it_is_judged_by_itself() -> None:
    day = Day()
    assert day.at_risk(50_000, SOON_S)
    assert not day.at_risk(0, SOON_S)
    assert not day.at_risk(10, SOON_S, running=10)
