"""The demo while it runs: the screen of ``chiron top`` below a caption, or lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from chiron.cli.demo.stage_watch import StageWatch
from chiron.cli.top.view import one_line, screen, tell
from chiron.telemetry.decision_text import show_moment
from chiron.telemetry.format import counted

PERIOD_S = 0.5
PLAIN_PERIOD_S = 5.0
"""Between two lines where there is no terminal."""
Status = Mapping[str, Any]


class DemoView:
    """Shows one status after the other, as a context."""

    def __init__(self, console: Console, caption: Sequence[str], watch: StageWatch | None = None) -> None:
        """``watch``: of a pipeline, whose stages are shown too."""
        self.period_s = PERIOD_S
        self._console = console
        self._caption = caption
        self._watch = watch
        self._live = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else None
        self._told_s = -1.0
        self._line_at_s = 0.0

    def __enter__(self) -> DemoView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Status, elapsed_s: float, total_s: float, stopping: bool) -> None:
        """``elapsed_s`` of the traffic's ``total_s``."""
        if self._live is not None:
            size = self._console.size
            head = captions(self._caption, elapsed_s, total_s, stopping, status["evictions"], size.width)
            head += self._watch.lines() if self._watch is not None else []
            rest = screen(status, size.width, size.height - len(head))
            self._live.update(Group(*head, *rest), refresh=True)
            return
        for line in news(status, self._told_s):
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        self._told_s = max([self._told_s, *(d["t_s"] for d in status["decisions"])])
        if elapsed_s >= self._line_at_s:
            self._line_at_s = elapsed_s + PLAIN_PERIOD_S
            more = self._watch.brief() if self._watch is not None else ""
            self._console.print(plain(status) + more, soft_wrap=True, markup=False, highlight=False)


def captions(
    caption: Sequence[str], elapsed_s: float, total_s: float, stopping: bool, evictions: int, width: int
) -> list[Text]:
    """The lines above the gateway's screen, cut to ``width``."""
    now_s = min(max(0.0, elapsed_s), total_s)
    state = "stopping" if stopping else "the last requests end" if elapsed_s > total_s else "ctrl-C ends it"
    head = f"demo {show_moment(now_s)} of {show_moment(total_s)} · {counted(evictions, 'eviction')} · {state}"
    lines = [Text(head, style="bold yellow")]
    lines += [Text(line, style="yellow") for line in caption]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
        line.truncate(width, overflow="ellipsis")
    return lines


def news(status: Status, since_s: float) -> list[str]:
    """Decisions on the fleet and its stages after ``since_s`` of the gateway's clock, in words."""
    return [
        f"{show_moment(d['t_s'])} {tell(d)}"
        for d in status["decisions"]
        if d["t_s"] > since_s and d["kind"] in ("fleet", "stage") and d["before"] != d["after"]
    ]


def plain(status: Status) -> str:
    """The status in a line, with the max batch sizes of what runs."""
    sizes = [str(i["max_batch_size"]) for m in status["models"] for i in m["instances"] if i["state"] == "ready"]
    return f"{one_line(status)}; max batch sizes {' '.join(sizes) or '-'}; {counted(status['evictions'], 'eviction')}"
