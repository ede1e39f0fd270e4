"""Studies without simulations: outcomes from a rule, and a scenario that is done in a moment."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from chiron.sim.setup import Setup
from chiron.studies.trial import Outcome, Trial

TRACED = """
name = "traced"
seeds = [1]
compare = ["hpa-queue"]
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 4
initial = 1
[[workload]]
trace = "azure-2023-conv"
model = "llama"
class = "chat"
duration = "3m"
"""

GENERATED = (
    TRACED.replace('trace = "azure-2023-conv"', "").replace('duration = "3m"', "").replace("traced", "generated")
    + """
generate = { kind = "poisson", rate = 4, duration = "30s", lengths = { input = 200, output = 20 } }
"""
)


class Ruled:
    """An executor whose outcomes follow a rule. ``order`` says in which order a wave of trials ends."""

    def __init__(self, rule: Callable[[Setup], dict[str, Any] | Exception], order: int = 1) -> None:
        self._rule = rule
        self._order = order
        self.names: list[str] = []
        self.with_bound: list[str] = []
        """Those of ``names`` that were to have the lower bound."""

    def run(self, trials: Iterable[Trial]) -> Generator[tuple[int, Outcome], None, None]:
        for number, each in list(enumerate(trials))[:: self._order]:
            self.names.append(each.name)
            self.with_bound += [each.name] * each.with_bound
            found = self._rule(each.setup)
            yield number, Outcome(error=str(found)) if isinstance(found, Exception) else Outcome(summary=found)

    def close(self) -> None:
        """Nothing was started."""


def figures(attainment: float, gpu_hours: float) -> dict[str, Any]:
    return {
        "attainment": {"chat": attainment},
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * 2,
        "gpus_peak": 4,
        "gpu_hours_bound_full": 0.5,
    }
