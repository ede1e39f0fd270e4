"""Plans and settings for tests of the load generator."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np

from chiron.core.types import RequestClass
from chiron.load.body import BodySettings
from chiron.load.plan import JobKey, LoadPlan, make_plan
from chiron.load.settings import BatchSettings, LoadSettings
from chiron.workload.types import Workload

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=0.5, itl_s=0.1)
FLEX = RequestClass(name="flex", kind="batch", deadline_s=60.0)


def workload(
    arrival_s: Sequence[float],
    *,
    model: str = "m",
    tokens: int = 4,
    cls: int | Sequence[int] = 0,
    chat: RequestClass = CHAT,
) -> Workload:
    count = len(arrival_s)
    classes = np.broadcast_to(np.array(cls, dtype=np.int64), count).copy()
    arrivals = np.array(arrival_s, dtype=np.float64)
    return Workload(
        arrival_s=arrivals,
        input_tokens=np.full(count, 100, dtype=np.int64),
        output_tokens=np.full(count, tokens, dtype=np.int64),
        model=np.zeros(count, dtype=np.int64),
        cls=classes,
        deadline_s=arrivals + np.array([inf, 60.0])[classes],
        models=(model,),
        classes=(chat, FLEX),
    )


def plan_of(arrival_s: Sequence[float], *, jobs: Sequence[JobKey] = (), **changes: Any) -> LoadPlan:
    return make_plan(workload(arrival_s, **changes), name="test", seed=1, jobs=jobs)


def settings_of(url: str, *, body: BodySettings | None = None, **changes: Any) -> LoadSettings:
    given: dict[str, Any] = {"grace_s": 0.2, "batch": BatchSettings(poll_s=0.05, wait_s=1.0)}
    return LoadSettings(url=url, body=body or BodySettings(), **(given | changes))
