"""vLLM's sleep mode, as the emulated engine has it: its routes, and what each call takes.

``POST /sleep?level=1`` copies the weights to host memory and drops the KV, level 2 drops both; ``POST /wake_up`` takes
the GPU again; ``GET /is_sleeping`` tells. One that has slept at level 2 has no weights when it is awake, until ``POST
/collective_rpc`` with ``{"method": "reload_weights"}``. A call is answered once it has been done, and calls are done
one after the other, as in vLLM (``vllm/entrypoints/serve/dev/sleep``, whose routes need ``VLLM_SERVER_DEV_MODE=1``);
``/health`` is good throughout. What runs when an engine falls asleep breaks off (``mode=abort``, vLLM's default and the
only one here), requests to one that sleeps are refused with 503, and all of it wakes at once (no ``tags``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from chiron.engines.layers import weight_bytes
from chiron.engines.profile import Profile
from chiron.engines.serve.request_error import RequestError
from chiron.net.clock import LiveClock
from chiron.net.server import Incoming

_GB_PER_S = 20.0
"""Of one GPU to and from pinned host memory, over PCIe 4.0 with 16 lanes; the GPUs of an instance copy side by side."""
_UNKNOWN_S = 5.0
"""Where a model's weights are not known: the longest that vLLM's users report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepTimes:
    """Seconds that calls take."""

    sleep_s: float
    """Weights to host memory. Level 2 takes no time."""
    wake_s: float
    """Weights back to the GPUs."""
    reload_s: float = 0.0
    """Weights from disk, after level 2."""


def copy_s(profile: Profile) -> float:
    """Copying a profile's weights between GPUs and host memory, seconds."""
    weights = weight_bytes(profile)
    return weights / (profile.tp * _GB_PER_S * 1e9) if weights else _UNKNOWN_S


class SleepMode:
    """Whether one engine sleeps. ``routes`` are for its server; times are the clock's."""

    def __init__(self, *, clock: LiveClock, times: SleepTimes, drop: Callable[[], None]) -> None:
        """``drop``: all that runs breaks off, and the KV is gone."""
        self._clock = clock
        self._times = times
        self._drop = drop
        self._level = 0
        """Of the last call that has been done; 0: awake."""
        self._level_next = 0
        """Once the calls under way have been done."""
        self._weights = True
        self._free_s = 0.0
        """When the last call under way will have been done."""

    @property
    def routes(self) -> Mapping[str, Mapping[bytes, Callable[[Incoming], None]]]:
        return {
            "/sleep": {b"POST": self._sleep},
            "/wake_up": {b"POST": self._wake_up},
            "/is_sleeping": {b"GET": self._is_sleeping},
            "/collective_rpc": {b"POST": self._reload},
        }

    def check_awake(self) -> None:
        """Raises RequestError (503) while it cannot take requests."""
        if self._level or self._level_next:
            raise RequestError("This engine sleeps.", status=503, type="server_error", code="sleeping")
        if not self._weights:
            why = "This engine has no weights since it slept at level 2: POST /collective_rpc reload_weights."
            raise RequestError(why, status=503, type="server_error", code="no_weights")

    def _sleep(self, incoming: Incoming) -> None:
        query = _query(incoming, "level", "mode")
        level, mode = query.get("level", "1"), query.get("mode", "abort")
        if level not in ("1", "2"):
            raise RequestError(f"level is {level!r}; it must be 1 or 2.", param="level")
        if mode != "abort":
            raise RequestError(f"mode is {mode!r}; it must be abort.", param="mode")
        awake, self._level_next = self._level_next == 0, int(level)
        if awake:
            self._drop()

        def done() -> None:
            self._level = int(level)
            self._weights = self._weights and level == "1"

        self._after(self._times.sleep_s if awake and level == "1" else 0.0, done, incoming)

    def _wake_up(self, incoming: Incoming) -> None:
        _query(incoming)
        asleep, self._level_next = self._level_next > 0, 0

        def done() -> None:
            self._level = 0

        self._after(self._times.wake_s if asleep else 0.0, done, incoming)

    def _reload(self, incoming: Incoming) -> None:
        try:
            method = json.loads(incoming.body)["method"]
        except (ValueError, TypeError, KeyError, RecursionError):
            method = None
        if method != "reload_weights":
            raise RequestError(f"method is {method!r}; it must be reload_weights.", param="method")
        if self._level_next:
            raise RequestError("This engine sleeps; wake it before its weights are loaded.", code="sleeping")

        def done() -> None:
            self._weights = True

        self._after(self._times.reload_s, done, incoming)

    def _is_sleeping(self, incoming: Incoming) -> None:
        incoming.respond(200, json.dumps({"is_sleeping": self._level > 0}).encode())

    def _after(self, took_s: float, done: Callable[[], None], incoming: Incoming) -> None:
        """Answer once it has been done, after those that came before."""

        def over() -> None:
            done()
            incoming.respond(200)

        def begin() -> None:
            self._free_s = max(self._free_s, self._clock.now_s) + took_s
            self._clock.call_at(self._free_s, over)

        self._clock.post(begin)


def _query(incoming: Incoming, *known: str) -> dict[str, str]:
    """The last value of each parameter. Raises RequestError for one that is not known."""
    given = parse_qs(incoming.query.decode(errors="replace"), keep_blank_values=True)
    for name in given:
        if name not in known:
            allowed = " and ".join(known) or "none"
            raise RequestError(f"{name}: unknown parameter of {incoming.path}; known: {allowed}.", param=name)
    return {name: values[-1] for name, values in given.items()}
