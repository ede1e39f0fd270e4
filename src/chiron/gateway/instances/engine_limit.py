"""Whether an engine runs fewer requests at once than Chiron believes it can.

Then the rest waits inside the engine, where nobody orders it and batch work holds up interactive requests. No engine
states its limit in its metrics, but it shows: requests wait, KV is free, steps go on, and no more run than before.
"""

from __future__ import annotations

from collections.abc import Mapping

LOOKS = 10
"""Looks at a working engine before it is said: a burst of prompts may take a while to get to its first step."""
KV_FREE_BELOW = 0.85
"""Share of KV in use from which requests may wait for that instead."""


class OwnLimit:
    """Sees one engine's figures (by the names of ``engines.rows``), scrape by scrape."""

    __slots__ = ("_looks", "_most", "_progress", "_said")

    def __init__(self) -> None:
        self._most = 0
        self._looks = 0
        self._progress = 0.0
        self._said = False

    def look(self, figures: Mapping[str, float], max_batch_size: int) -> int:
        """The engine's own limit when it is plain that it is below ``max_batch_size``, once; otherwise 0."""
        running, progress = int(figures.get("running", 0)), figures.get("steps", figures.get("generation_tokens", 0.0))
        worked, self._progress = progress != self._progress, progress
        if not figures.get("waiting") or figures.get("kv_usage", 0.0) > KV_FREE_BELOW or running >= max_batch_size:
            self._looks = self._most = 0
        elif running > self._most:
            self._looks, self._most = 0, running
        elif worked:  # Between two steps an engine shows the same again.
            self._looks += 1
        if self._looks < LOOKS or self._said:
            return 0
        self._said = True
        return self._most
