"""The stages of a pipeline behind the gateway, as the pipeline itself tells them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.request import ProxyHandler, build_opener

from rich.text import Text

TIMEOUT_S = 2.0
BYTES_MAX = 1 << 20
BAR_COLUMNS = 20


class StageWatch:
    """Asks the first instance that is ready; keeps what was heard last."""

    def __init__(self) -> None:
        self._opener = build_opener(ProxyHandler({}))
        self._stages: Sequence[Mapping[str, Any]] = ()
        self._busy: list[float] = []
        self._busy_s: list[tuple[float, float]] = []

    def look(self, status: Mapping[str, Any]) -> None:
        """Blocks for a moment; leaves what is known where nobody answers."""
        urls = [each["url"] for model in status["models"] for each in model["instances"] if each["state"] == "ready"]
        if not urls:
            return
        try:
            with self._opener.open(f"{urls[0]}/chiron/stages", timeout=TIMEOUT_S) as answer:
                stages = json.loads(answer.read(BYTES_MAX))["stages"]
            self._compare(status["now_s"], stages)
        except (OSError, ValueError, KeyError, TypeError):
            return

    def _compare(self, now_s: float, stages: Sequence[Mapping[str, Any]]) -> None:
        """Shares of the time that replicas worked, since the last look."""
        said = [(now_s, float(stage["busy_s"])) for stage in stages]
        before = self._busy_s if len(self._busy_s) == len(said) else said
        self._busy = [
            _share(busy_s - old_s, (at_s - then_s) * max(1, int(stage["ready"])))
            for (at_s, busy_s), (then_s, old_s), stage in zip(said, before, stages, strict=True)
        ]
        self._busy_s, self._stages = said, stages

    def lines(self) -> list[Text]:
        """One for each stage, below their names."""
        if not self._stages:
            return []
        found = [Text(f"{'layers':<8}{'replicas':<14}{'busy':<{BAR_COLUMNS + 7}}waiting", style="bright_black")]
        for stage, busy in zip(self._stages, self._busy, strict=True):
            line = Text(f"{stage['layers']:<8}")
            for count, mark, style in (
                (stage["ready"], "■", "green"),
                (stage.get("starting", 0), "□", "yellow"),
                (stage["draining"], "▪", "bright_black"),
            ):
                line.append(f"{mark} " * int(count), style=style)
            line.pad_right(max(0, 22 - line.cell_len))
            full = round(busy * BAR_COLUMNS)
            line.append("█" * full, style="red" if busy > 0.8 else "cyan")
            line.append("·" * (BAR_COLUMNS - full), style="bright_black")
            line.append(f" {busy:>4.0%}  {stage['waiting']:>3}")
            found.append(line)
        return [*found, Text("")]

    def brief(self) -> str:
        """In a part of a line."""
        counts = [f"{s['layers']} x{s['ready']} {busy:.0%}" for s, busy in zip(self._stages, self._busy, strict=True)]
        return f"; stages {', '.join(counts)}" if counts else ""


def _share(busy_s: float, whole_s: float) -> float:
    return min(1.0, max(0.0, busy_s / whole_s)) if whole_s > 0 else 0.0
