"""Sends mutated requests to a gateway and checks every answer.

    python tools/fuzz_gateway.py --requests 220000

It starts a gateway with API keys before two emulated engines, in a directory of its own, and leaves nothing behind.
A request that is complete by HTTP's rules must be answered: well-formed HTTP, no 5xx but 503 and 504 with a reason
(and 501 and 505, which HTTP has for codings and versions that nobody need know), every error OpenAI's error object,
every stream whole. At the end the gateway must be alive, hold nothing open, have grown little and logged no traceback.
The first failures are written to files; ``--replay FILE`` sends one again to ``--url``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools
import psutil

from fuzz_requests import Wire, request

ANSWER_TIMEOUT_S = 60.0
IGNORED_WAIT_S = 0.05
"""For an answer to what is no complete request: there may be one, and need not be."""
GROWTH_MAX_BYTES = 128 << 20
"""Of the gateway's memory, after a tenth of the requests."""
FAILURES_KEPT = 20
REASONED = {503, 504}
OF_PROTOCOL = {501: "not_implemented", 505: "http_version_not_supported"}
KEYS = {"team": "sk-fuzz-team-0123456789", "admin": "sk-fuzz-admin-0123456789"}

CONFIG = """
admin_key_hash = "{admin}"
[[keys]]
name = "team"
hash = "{team}"
[models.m]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
args = ["--speedup", "1000", "--output-mean", "5", "--max-model-len", "400"]
min_instances = 2
max_instances = 2
aliases = ["gpt"]
[server]
port = {port}
grace = "1s"
[store]
reserve_bytes = 0
[limits]
body_max_bytes = "1MiB"
[telemetry]
event_log = "off"
"""


class WrongError(Exception):
    """An answer is not as it must be."""


class Answer:
    """Reads one, as ``httptools`` sees it."""

    def __init__(self, head_only: bool) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.complete = False
        self.status = 0
        self._head_only = head_only
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self.complete:
                raise WrongError(f"not HTTP: {error}: {data[:200]!r}") from None

    def end(self) -> None:
        """The connection is closed."""
        lengthless = b"content-length" not in self.headers and b"transfer-encoding" not in self.headers
        self.complete = self.complete or (self.status > 0 and lengthless)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:  # What follows answers a second request in the same bytes.
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self.status:
            self.status = status
            self.complete = self._head_only

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.body += data

    def on_message_complete(self) -> None:
        self.complete = self.complete or self.status > 0


class Question:
    """What a request is by HTTP's rules, before it is sent."""

    def __init__(self, data: bytes) -> None:
        self.complete = False
        self.method = b""
        self._announced: list[tuple[bytes, bytes]] = []
        """Headers that say where the body ends."""
        self._got = len(data.partition(b"\r\n\r\n")[2])
        self._parser = httptools.HttpRequestParser(self)
        with suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.method and name.lower() in (b"content-length", b"transfer-encoding"):
            self._announced.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.method = self.method or self._parser.get_method()

    def on_message_complete(self) -> None:
        # Where the client offers another protocol this parser reads no body; a server that stays with HTTP/1.1 does.
        self.complete = self.complete or not self._parser.should_upgrade() or self._has_body()

    def _has_body(self) -> bool:
        return all(name == b"content-length" and value == b"%d" % self._got for name, value in self._announced)


def check(question: Question, answer: Answer) -> None:
    """Raises WrongError."""
    status, body = answer.status, answer.body
    kind = answer.headers.get(b"content-type", b"")
    if not 200 <= status < 600:
        raise WrongError(f"status {status}")
    if question.method == b"HEAD" or answer._head_only:
        if status >= 500 and status not in REASONED and status not in OF_PROTOCOL:
            raise WrongError(f"{status} to HEAD")
        return
    if kind.startswith(b"text/event-stream"):
        check_stream(body)
    elif kind.startswith(b"application/json") and status != 204:
        check_json(status, body, answer.headers)
    elif status >= 400:
        raise WrongError(f"{status} without JSON: {kind!r} {body[:200]!r}")


def check_json(status: int, body: bytes, headers: dict[bytes, bytes]) -> None:
    try:
        value = json.loads(body)
    except ValueError:
        raise WrongError(f"{status}: not JSON: {body[:200]!r}") from None
    if status < 400:
        return
    if set(value) == {"status"} and status == 503:
        return  # /ready
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict) or not set(error) >= {"message", "type", "param", "code"} or not error["message"]:
        raise WrongError(f"{status}: no error object: {body[:300]!r}")
    if status < 500:
        return
    if status in OF_PROTOCOL and error["code"] == OF_PROTOCOL[status]:
        return
    if status not in REASONED:
        raise WrongError(f"{status}: {error}")
    if status == 503 and b"retry-after" not in headers:
        raise WrongError(f"503 without Retry-After: {error}")


def check_stream(body: bytes) -> None:
    lines = [line for line in body.replace(b"\r\n", b"\n").split(b"\n") if line]
    if any(not line.startswith((b"data:", b":", b"event:", b"id:", b"retry:")) for line in lines):
        raise WrongError(f"no stream of events: {body[:300]!r}")
    said = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    for event in said:
        if event != b"[DONE]":
            try:
                json.loads(event)
            except ValueError:
                raise WrongError(f"an event that is not JSON: {event[:200]!r}") from None
    if not said or (said[-1] != b"[DONE]" and "error" not in json.loads(said[-1])):
        raise WrongError(f"a stream that does not end: {body[-200:]!r}")


@dataclass(slots=True)
class Report:
    sent: int = 0
    answered: int = 0
    ignored: int = 0
    """Were no complete requests, and got no answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


async def exchange(address: tuple[str, int], wire: Wire) -> int:
    """Send it, and check what comes. Returns the status, 0 for none; raises WrongError."""
    question = Question(wire.data)
    reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
    # Closed by a reset: a hundred thousand connections would use up the ports for a minute.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer = Answer(head_only=question.method == b"HEAD")
    try:
        sending = asyncio.ensure_future(_send(writer, wire))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S if question.complete else IGNORED_WAIT_S):
                while not answer.complete:
                    data = await reader.read(1 << 16)
                    if not data:
                        answer.end()
                        break
                    answer.feed(data)
        except TimeoutError:
            if question.complete:
                raise WrongError(f"no answer within {ANSWER_TIMEOUT_S:g} s") from None
        except ConnectionError:
            answer.end()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    finally:
        writer.transport.abort()
    if answer.status and answer.complete:
        check(question, answer)
        return answer.status
    if question.complete:
        raise WrongError(f"no whole answer: status {answer.status}, {answer.body[:200]!r}")
    return 0


async def _send(writer: asyncio.StreamWriter, wire: Wire) -> None:
    with suppress(ConnectionError):
        for piece in wire.pieces:
            writer.write(piece)
            await writer.drain()
            if len(wire.pieces) > 1:
                await asyncio.sleep(0.001)


async def fuzz(
    url: str, *, seed: int, first: int, count: int, workers: int, report: Report, out: Path, hear: Any
) -> None:
    """``hear`` is called with the report now and then."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    numbers = iter(range(first, first + count))

    async def work() -> None:
        for number in numbers:
            wire = request(seed, number, keys=tuple(KEYS.values()))
            try:
                status = await exchange(address, wire)
            except (WrongError, OSError) as error:
                report.failures.append(f"request {number} ({wire.what}): {error}")
                if len(report.failures) <= FAILURES_KEPT:
                    (out / f"request-{seed}-{number}.bin").write_bytes(wire.data)
                if len(report.failures) >= 10 * FAILURES_KEPT:
                    return
            else:
                report.answered += status > 0
                report.ignored += status == 0
                if status:
                    report.statuses[status] += 1
            report.sent += 1
            hear(report)

    await asyncio.gather(*(work() for _ in range(workers)))


async def alive(url: str, report: Report) -> None:
    """Health, a good request, and nothing held open."""
    from chiron.net.client import NetError, Origin

    origin = Origin(url)
    admin, team = (
        {"authorization": f"Bearer {KEYS[name]}", "content-type": "application/json"} for name in ("admin", "team")
    )
    try:
        body = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}'
        for method, path, data, headers in (
            ("GET", "/health", b"", {}),
            ("GET", "/ready", b"", {}),
            ("GET", "/metrics", b"", admin),
            ("POST", "/v1/chat/completions", body, team),
        ):
            answer = await origin.fetch(method, path, body=data, headers=headers, timeout_s=60.0)
            if answer.status != 200:
                report.failures.append(f"at the end {path} answers {answer.status}: {answer.body[:300]!r}")
        for _ in range(300):
            status = json.loads((await origin.fetch("GET", "/chiron/status", headers=admin)).body)
            clients = sum(m["queue"]["interactive"] for m in status["models"]) + status["connections"] - 1
            if clients <= 0:
                break
            await asyncio.sleep(0.1)
        else:
            report.failures.append(f"at the end {status['connections']} connections are open, {clients} things wait")
    except (NetError, ValueError, KeyError) as error:
        report.failures.append(f"at the end the gateway is not well: {error!r}")
    finally:
        await origin.close()


@contextmanager
def gateway(directory: Path) -> Iterator[tuple[str, psutil.Process, Path]]:
    """One of our own: its URL, its process, its log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hashes = {name: "sha256:" + sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    config, log = directory / "chiron.toml", directory / "gateway.log"
    config.write_text(CONFIG.format(port=port, **hashes))
    command = [sys.executable, "-m", "chiron", "serve", str(config)]
    with log.open("wb") as output:
        process = psutil.Popen(command, stdout=output, stderr=output, cwd=directory)
    try:
        yield f"http://127.0.0.1:{port}", process, log
    finally:
        if process.is_running():
            process.send_signal(signal.SIGTERM)
            with suppress(psutil.TimeoutExpired):
                process.wait(30)
        if process.is_running():
            process.kill()


async def until_ready(url: str) -> None:
    from chiron.net.client import NetError, Origin

    origin = Origin(url)
    try:
        async with asyncio.timeout(120.0):
            while True:
                with suppress(NetError):
                    if (await origin.fetch("GET", "/ready")).status == 200:
                        return
                await asyncio.sleep(0.1)
    finally:
        await origin.close()


async def run(options: argparse.Namespace) -> Report:
    report, loop = Report(), asyncio.get_running_loop()
    began_s = loop.time()

    def hear(so_far: Report) -> None:
        if so_far.sent % 5000 == 0:
            rate = so_far.sent / (loop.time() - began_s)
            print(f"{so_far.sent} sent, {len(so_far.failures)} failures, {rate:.0f}/s", file=sys.stderr, flush=True)

    given = {"seed": options.seed, "workers": options.workers, "report": report, "out": options.out, "hear": hear}
    if options.url:
        await fuzz(options.url, first=options.first, count=options.requests, **given)
        return report
    with tempfile.TemporaryDirectory() as directory, gateway(Path(directory)) as (url, process, log):
        await until_ready(url)
        began_s = loop.time()
        warm = max(1, options.requests // 10)
        await fuzz(url, first=options.first, count=warm, **given)
        before = process.memory_info().rss
        await fuzz(url, first=options.first + warm, count=options.requests - warm, **given)
        if not process.is_running():
            report.failures.append("the gateway has died")
        else:
            grown = process.memory_info().rss - before
            print(f"memory: {before >> 20} MiB, then {grown >> 20:+d} MiB", file=sys.stderr)
            if grown > GROWTH_MAX_BYTES:
                report.failures.append(f"the gateway has grown by {grown >> 20} MiB")
            await alive(url, report)
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            report.failures.append(
                "the gateway's log has a traceback:\n" + text[text.index("Traceback") - 500 :][:3000]
            )
    seconds = loop.time() - began_s
    print(f"{report.sent} requests in {seconds:.0f} s ({report.sent / seconds:.0f}/s)", file=sys.stderr)
    return report


async def replay(url: str, file: Path) -> None:
    parts = urlsplit(url)
    try:
        status = await exchange((parts.hostname or "", parts.port or 80), Wire((file.read_bytes(),), "replay"))
    except WrongError as error:
        sys.exit(f"failed: {error}")
    print(status or "no answer, as it is no complete request")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--url", default="", help="of a gateway that runs already; default: one of its own")
    parser.add_argument("--out", type=Path, default=Path(), help="directory of requests that failed")
    parser.add_argument("--replay", type=Path, help="send this file to --url instead")
    options = parser.parse_args()
    if options.replay is not None:
        asyncio.run(replay(options.url, options.replay))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    report = asyncio.run(run(options))
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(report.statuses.items()))
    print(f"{report.sent} sent, {report.answered} answered, {report.ignored} no requests at all; {statuses}")
    for failure in report.failures[:FAILURES_KEPT]:
        print(failure)
    if report.failures:
        sys.exit(f"{len(report.failures)} failures")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    main()
