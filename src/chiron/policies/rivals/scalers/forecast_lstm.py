"""``forecast-lstm``: a fleet for the load that a small LSTM expects.

The fleet is that of ``forecast-arima``; only the forecaster is another: a network of one LSTM layer and a linear one,
which reads the last six values, between 0 and 1 by the least and the greatest so far, and gives the next three. What
is further ahead is forecast from its own forecasts. It is fitted on the past only, by Adam on the mean squared error,
from the same beginning each time, so one series has one forecast on one machine.

Source: rayankrish/CpuUsagePrediction, the notebooks of a paper on CPU usage of clusters, which found LSTMs better than
SARIMA an hour ahead and worse for days. Their values are twenty minutes apart; here a minute, as in ``forecast-arima``.
They fit once on four fifths of their data, 30 days, and define no rule for a fleet. Of a short series an epoch is one
step of Adam; there are as many more epochs as it takes for the steps that theirs have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Annotated, Any

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model
from chiron.policies.rivals.scalers.forecast import Memory, State, follow, read_series, told_series
from chiron.policies.rivals.scalers.forecasters import FEWEST, needs
from chiron.policies.rivals.scalers.past import MOST, read_by, told_by
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class LstmSettings:
    period_s: Annotated[float, Between(15.0, 300.0, log=True)] = 60.0
    """Of a value of the series, and between decisions. Ours: the notebooks have 20 minutes."""
    values: int = 6
    """That are read (the notebooks, as the next five)."""
    ahead: int = 3
    """That are forecast at once."""
    hidden: int = 10
    """Size of the LSTM's state."""
    epochs: int = 20
    """Of a fit, at least; the notebooks have 20 to 100."""
    steps: int = 360
    """Of Adam in a fit, at least: what 20 epochs of the notebooks' 1,720 examples come to."""
    batch: int = 100
    learning_rate: float = 0.01
    refit: int = 10
    """Periods after which it is fitted anew. Ours: they fit once."""
    utilisation: Annotated[float, Between(0.2, 1.0)] = 0.8
    """Share of an instance's capacity that the forecast may take. Ours."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "period_s", "learning_rate", "utilisation")
        at_least(1, self, "values", "ahead", "hidden", "epochs", "steps", "batch", "refit", "max_num_seqs")
        if not self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One that was fitted."""

    weights: tuple[float, ...]
    least: float
    most: float
    """Of the series that it was fitted to: 0 and 1 to the network."""
    age: int = 0
    """Forecasts that it has made."""


def lstm(
    settings: LstmSettings, series: Sequence[float], steps: int, kept: Network | None
) -> tuple[tuple[float, ...], Network | None]:
    """So many steps ahead; the last value, until there are a few examples and two values that differ."""
    last = series[-1] if series else 0.0
    if len(series) < settings.values + settings.ahead + FEWEST - 1 or len(set(series)) == 1:
        return (last,) * steps, kept
    with _repeatable():
        if kept is None or kept.age >= settings.refit:
            kept = _fitted(settings, series)
        values = _continued(settings, kept, series, steps)
    return tuple(max(0.0, value) if isfinite(value) else last for value in values), replace(kept, age=kept.age + 1)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Within it, random numbers begin anew, and torch works in one thread: sums are made in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def _fitted(settings: LstmSettings, series: Sequence[float]) -> Network:
    import torch

    least, most = min(series), max(series)
    scaled = torch.tensor([(value - least) / (most - least) for value in series])
    examples = scaled.unfold(0, settings.values + settings.ahead, 1)
    given, wanted = examples[:, : settings.values], examples[:, settings.values :]
    parts, forecast = _network(settings)
    optimiser = torch.optim.Adam(parts.parameters(), lr=settings.learning_rate)
    batches = range(0, len(examples), settings.batch)
    for _ in range(max(settings.epochs, ceil(settings.steps / len(batches)))):
        for first in batches:
            some = slice(first, first + settings.batch)
            optimiser.zero_grad()
            torch.nn.functional.mse_loss(forecast(given[some]), wanted[some]).backward()
            optimiser.step()
    weights = torch.nn.utils.parameters_to_vector(parts.parameters())
    return Network(weights=tuple(weights.tolist()), least=least, most=most)


def _network(settings: LstmSettings) -> tuple[Any, Callable[[Any], Any]]:
    """Its parts, and how they forecast from rows of values."""
    import torch

    reads = torch.nn.LSTM(1, settings.hidden, batch_first=True)
    tells = torch.nn.Linear(settings.hidden, settings.ahead)

    def forecast(rows: Any) -> Any:
        states, _ = reads(rows.unsqueeze(-1))
        return tells(states[:, -1])

    return torch.nn.ModuleList([reads, tells]), forecast


def _continued(settings: LstmSettings, network: Network, series: Sequence[float], steps: int) -> list[float]:
    import torch

    span = network.most - network.least
    parts, forecast = _network(settings)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(torch.tensor(network.weights), parts.parameters())
        values = [(value - network.least) / span for value in series[-settings.values :]]
        while len(values) < settings.values + steps:
            values += forecast(torch.tensor([values[-settings.values :]]))[0].tolist()
    return [network.least + span * value for value in values[settings.values :][:steps]]


def decide_fleet(settings: LstmSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself."""
    return each_model(_decide_model, lambda: None, settings, state, view)


def _decide_model(
    settings: LstmSettings, memory: Memory | None, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory | None]:
    def forecast(series: Sequence[float], steps: int, kept: Any) -> tuple[tuple[float, ...], Any]:
        return lstm(settings, series, steps, kept)

    return follow(settings, forecast, memory, model)


def _told(settings: LstmSettings, memory: Memory, now_s: float) -> dict[str, Any]:
    network: Network | None = memory.fitted
    if network is None:
        return told_series(settings, memory, {})
    told = {"weights": list(network.weights), "least": network.least, "most": network.most, "age": network.age}
    return told_series(settings, memory, told)


def _read(settings: LstmSettings, kept: Kept, classes: Sequence[RequestClass], now_s: float) -> Memory | None:
    def network(kept: Kept) -> Network | None:
        if "weights" not in kept:
            return None
        size = weights_of(settings)
        weights = kept.numbers("weights", -MOST, MOST, least=size, most=size)
        least, most = kept.number("least", 0.0, MOST), kept.number("most", 0.0, MOST)
        age = kept.whole("age", 0, 10**9)
        if weights is None or least is None or most is None or age is None or not least < most:
            return None
        return Network(weights=tuple(weights), least=least, most=most, age=age)

    return read_series(settings, kept, network)


def weights_of(settings: LstmSettings) -> int:
    """How many weights a network has: four gates with two biases each, and a linear layer."""
    hidden = settings.hidden
    return 4 * hidden * (1 + hidden + 2) + settings.ahead * (hidden + 1)


def make_forecast_lstm(settings: LstmSettings) -> Policy:
    """Raises ImportError where torch is not installed."""
    needs("lstm")
    return Policy(
        name="forecast-lstm",
        settings=settings,
        fleet=decide_fleet,
        learned=told_by(_told),
        restore=read_by(_read),
        fleet_period_s=settings.period_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
