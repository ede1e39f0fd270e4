"""The demo's gateway: ``chiron serve`` in a process of its own that does not outlive this one.

A supervisor stands between, as between a gateway and its engines: when this process ends, however it ends, the kernel
closes the supervisor's standard input, and the supervisor ends the gateway, which ends its engines.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 60.0
GRACE_S = 20.0
"""Between SIGTERM and SIGKILL."""
LOG_BYTES_MAX = 8 << 20
_URL = re.compile(r"chiron serves at (\S+)/v1")
_POLL_S = 0.05
_LINES_SHOWN = 8


class GatewayError(Exception):
    """The gateway did not start, or it ended by itself. The message holds the end of its log."""


class Gateway:
    """A running ``chiron serve`` in ``directory``, as a context; use ``url`` inside."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "gateway.log"
        self.url = ""
        self._directory = directory

    def __enter__(self) -> Gateway:
        self.log.unlink(missing_ok=True)
        serve = [sys.executable, "-m", "chiron", "serve", "chiron.toml"]
        keep = ["--grace-s", str(GRACE_S), "--log", self.log.name, "--log-bytes-max", str(LOG_BYTES_MAX), "--"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chiron.fleet.process.supervisor", *keep, *serve],
            cwd=self._directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # The terminal's ctrl-C is for this process alone: the gateway is still needed for the verdict.
            start_new_session=True,
        )
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end, and wait for it; at most somewhat longer than its grace."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(GRACE_S + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def error(self, what: str) -> GatewayError:
        lines = self._read().splitlines()[-_LINES_SHOWN:]
        return GatewayError("\n".join([f"{what}; {self.log} ends with:", *lines]))

    def _wait_for_url(self) -> str:
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s:
            found = _URL.search(self._read())
            if found:
                return found[1]
            if self.ended:
                raise self.error("the gateway did not start")
            time.sleep(_POLL_S)
        raise self.error(f"the gateway did not start within {START_TIMEOUT_S:g} s")

    def _read(self) -> str:
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
