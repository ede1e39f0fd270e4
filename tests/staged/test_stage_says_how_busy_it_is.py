"""The gauge that an autoscaler reads: the share of the time that a stage has worked, of late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from chiron.engines.staged.split import read_range
from chiron.engines.staged.stage import StageHttp


def test_utilisation_is_that_of_the_last_minute_of_scrapes() -> None:
    service: Any = SimpleNamespace(began_s=100.0, totals=SimpleNamespace(busy_s=0.0))
    http = StageHttp(cast(Any, service), read_range("0-1"), lambda: None)
    told = []
    # Idle for 80 s, then always busy; two scrapers, of which one asks again at once.
    for at_s, busy_s in ((140.0, 0.0), (180.0, 0.0), (200.0, 20.0), (200.0, 20.0), (230.0, 50.0), (260.0, 80.0)):
        service.totals.busy_s = busy_s
        told.append(round(http._utilisation(at_s), 2))
    assert told == [0.0, 0.0, 0.33, 0.33, 1.0, 1.0]


def test_before_any_time_has_passed_it_is_nothing() -> None:
    service: Any = SimpleNamespace(began_s=100.0, totals=SimpleNamespace(busy_s=0.0))
    assert StageHttp(cast(Any, service), read_range("0-1"), lambda: None)._utilisation(100.0) == 0.0
