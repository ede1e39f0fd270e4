"""What scalers keep of the past for the next run: plain data, of two weeks at the most (see ``core.kept``).

Kept are the series that forecasts are made from, what was fitted to them, and windows of what came lately. Plans, holds
and the fleet are not: the next run has a fleet of its own. Times are kept as seconds before the moment of keeping, and
count from the next run's beginning: the past goes on as if no time had passed. After more than an hour without anybody
who counted (``LOAD_AGE_MAX_S``) all begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.policy import LOAD_AGE_MAX_S, ClassesOf, LearnedHook, RestoreHook
from chiron.policies.rivals.scalers.forecasters import Fitted

MOST = 1e30
"""What is more is no figure of a load, nor a parameter of its forecast."""

Tell = Callable[[Any, Any, float], Mapping[str, Any]]
"""(settings, memory of one model, now) to what is kept of it."""
Read = Callable[[Any, Kept, Sequence[RequestClass], float], Any]
"""(settings, what was kept of one model, its classes, now) to its memory; None: all begins anew."""


def told_by(tell: Tell) -> LearnedHook:
    """The ``learned`` hook of a scaler with a memory for each model."""

    def learned(settings: Any, state: Any, classes: ClassesOf, now_s: float) -> dict[str, Mapping[str, Any]]:
        return {name: tell(settings, memory, now_s) for name, memory in (state or {}).items() if memory is not None}

    return learned


def read_by(read: Read) -> RestoreHook:
    """Its ``restore`` hook."""

    def restore(
        settings: Any, kept: Mapping[str, Kept], classes: ClassesOf, now_s: float, age_s: float
    ) -> dict[str, Any]:
        if age_s > LOAD_AGE_MAX_S:
            return {}
        found = {name: read(settings, part, classes[name], now_s) for name, part in kept.items()}
        return {name: memory for name, memory in found.items() if memory is not None}

    return restore


def of_period(kept: Kept, name: str, period_s: float) -> bool:
    """Whether its series are of this period; those of another say nothing. A part that holds nothing is of none."""
    if name not in kept:
        return False
    before_s = kept.number(name, 0.0, MOST)
    if before_s is not None and before_s != period_s:
        kept.drop(f"its series are of {before_s:g} s, and now of {period_s:g} s", name)
    return before_s == period_s


def series(kept: Kept, name: str, most: int) -> tuple[float, ...]:
    """Up to ``most`` values, none below 0; none of them where one is unsound."""
    return tuple(kept.numbers(name, 0.0, MOST, least=0, most=most) or ())


def pairs(kept: Kept, name: str, most: int) -> list[list[float]]:
    """(seconds before now, value), up to ``most`` of them; none where one is unsound."""
    return kept.rows(name, -1.0, MOST, width=2, most=most) or []


def of_fitted(fitted: Fitted | None) -> dict[str, Any]:
    """What ARIMA keeps, as plain data."""
    if fitted is None:
        return {}
    parameters = list(fitted.parameters)
    return {"order": list(fitted.order), "parameters": parameters, "logarithm": int(fitted.logarithm)}


def fitted_of(kept: Kept) -> Fitted | None:
    """None: its order is chosen anew."""
    if "order" not in kept:
        return None
    order = kept.numbers("order", 0, 2, least=3, most=3)
    parameters = kept.numbers("parameters", -MOST, MOST, least=1, most=6)
    logarithm = kept.whole("logarithm", 0, 1)
    if order is None or parameters is None or logarithm is None:
        return None
    p, d, q = (round(each) for each in order)
    if len(parameters) != p + q + (d == 0) + 1:  # And a variance; a mean where nothing is differenced.
        kept.drop(f"{len(parameters)} parameters are not those of ARIMA({p}, {d}, {q})", "parameters")
        return None
    return Fitted(order=(p, d, q), parameters=tuple(parameters), logarithm=logarithm == 1)
