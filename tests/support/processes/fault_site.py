"""A gateway in a process of its own with engines that keep a diary, killed and started again at will. For tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from chiron.net.client import NetError, Origin, Response
from chiron.store.jobs.rows import item_index
from chiron.store.port import request_id
from chiron.store.sqlite.database import open_for_reading
from ports import free_port

TESTS = Path(__file__).parent
ENGINE = TESTS / "fault_engine.py"
START_TIMEOUT_S = 60.0
_MARK = "FAULT_SITE"


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What the condition says once it is true."""
    until_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return found


def config(model: str, *, extra: str = "", port: int = 0) -> str:
    """A serve config with one model, quick to notice and to mend what breaks."""
    return f"""
[models.m]
{model}

[server]
port = {port}
grace = "10s"

[batch]
completion_window_min = "1s"

[store]
reserve_bytes = 0

[fleet]
health = {{ health_period = "500ms", health_timeout = "20s", suspect_period = "50ms" }}
backoff = {{ backoff_first = "50ms", backoff_max = "500ms", crash_loop_starts = 100 }}
recovery = {{ recover_checks = 2, recover_first = "100ms", recover_max = "300ms" }}
{extra}
"""


def started_engines(directory: Path, *, seqs: int = 16, speedup: float = 4.0, **keys: object) -> str:
    """Keys of a model whose engines are started by the gateway."""
    command = [sys.executable, str(ENGINE), "--directory", str(directory)]
    command += ["--speedup", str(speedup), "--max-num-seqs", "{max_num_seqs}"]
    profile = "llama-3.1-8b/a100/tp1"
    values = {"engine": "emulated", "profile": profile, "max_num_seqs": seqs, "command": command, **keys}
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


@dataclass(frozen=True, slots=True)
class Diary:
    """What engines wrote about the requests they got."""

    counts: dict[str, Counter[str]]
    """How often what happened to each request id: ``start``, ``resume`` (a start that goes on with an answer),
    ``finish``, ``leave``, ``refuse``."""
    running: dict[int, frozenset[str]]
    """What each engine has not ended, or had not when it died, by process id."""

    def began(self, id: str) -> int:
        """Starts of both kinds."""
        return self.counts["start"][id] + self.counts["resume"][id]


class FaultSite(AbstractContextManager["FaultSite"]):
    """``chiron serve`` on one data directory, over several lives. Nothing it started is left at the end."""

    def __init__(self, directory: Path, text: str, *options: str) -> None:
        """``options`` of ``chiron serve``."""
        self.directory = directory
        self.options = options
        self.config = directory / "chiron.toml"
        self.config.write_text(text)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lives = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = uuid.uuid4().hex
        """In the environment of every process of this site."""

    def __enter__(self) -> FaultSite:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.alive:
                self.stop()
            left = [] if kind else self.await_nobody()
        finally:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        assert not left, f"left behind: {left}"

    # -- the gateway -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> Path:
        return self.directory / f"gateway-{self.lives}.log"

    def spawn(self, preexec: Callable[[], None] | None = None) -> None:
        """Start without waiting."""
        self.lives += 1
        command = [sys.executable, "-c", "from chiron.cli import main; main()", "serve", str(self.config)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *self.options],
                cwd=self.directory,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | {_MARK: self.mark},
                preexec_fn=preexec,
            )

    def start(self, preexec: Callable[[], None] | None = None) -> None:
        self.spawn(preexec)
        wait_for(lambda: self.listens() or not self.alive, "the gateway listens", START_TIMEOUT_S)
        assert self.alive, self.log.read_text()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def kill(self) -> None:
        """kill -9 of the gateway alone."""
        self.stop(signal.SIGKILL)

    def listens(self) -> bool:
        return re.search(r"serves at http\S+/v1", self.log.read_text(errors="replace")) is not None

    # -- processes ---------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Everything that runs because of this site."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def engines(self) -> list[psutil.Process]:
        return self._running(lambda words: _serves(words) and not _keeps(words))

    def supervisors(self) -> list[psutil.Process]:
        return self._running(_keeps)

    def _running(self, wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if wanted(process.cmdline()):
                    found.append(process)
        return found

    def await_nobody(self, timeout_s: float = 60.0) -> list[psutil.Process]:
        """Those that are still there when the time is up."""
        until_s = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < until_s:
            time.sleep(0.05)
        return left

    # -- what is known of items --------------------------------------------------------------------------------

    def diary(self) -> Diary:
        counts: dict[str, Counter[str]] = {what: Counter() for what in ("start", "resume", "finish", "leave", "refuse")}
        running: dict[int, frozenset[str]] = {}
        for path in self.directory.glob("engine-*.log"):
            here: set[str] = set()
            for line in path.read_text().splitlines():
                what, id, *resumed = line.split()
                counts["resume" if resumed not in ([], ["0"]) else what][id] += 1
                (here.add if what == "start" else here.discard)(id)
            running[int(path.stem.rpartition("-")[2])] = frozenset(here)
        return Diary(counts, running)

    def finished_on_disk(self) -> set[str]:
        """Request ids of items whose result the store holds; of a dead gateway."""
        db = open_for_reading(self.directory / "chiron-data")
        try:
            names = {row["no"]: row["id"] for row in db.execute("SELECT no, id FROM batches")}
            keys = [row["key"] for row in db.execute("SELECT key FROM results")]
        finally:
            db.close()
        return {request_id(names[key >> 32], item_index(key)) for key in keys}


def _serves(words: list[str]) -> bool:
    return str(ENGINE) in words or any(word.startswith("chiron.engines.serve.") for word in words)


def _keeps(words: list[str]) -> bool:
    return any("supervisor" in word for word in words[:5])


class Api:
    """A client of the gateway's API. Raises NetError where there is no answer."""

    def __init__(self, url: str) -> None:
        self.origin = Origin(url, keepalive=False, connect_timeout_s=60.0)

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.origin.close()

    async def ask(self, method: str, path: str, body: object = None) -> Response:
        data = b"" if body is None else json.dumps(body).encode()
        return await self.origin.fetch(method, path, body=data, headers={"content-type": "application/json"})

    async def get(self, path: str) -> Any:
        answer = await self.ask("GET", path)
        assert answer.status == 200, (path, answer)
        return json.loads(answer.body)

    async def upload(self, content: bytes) -> str:
        answer = await self.origin.fetch("POST", "/v1/files", body=form(content), headers=FORM)
        assert answer.status == 200, answer
        return str(json.loads(answer.body)["id"])

    async def create(self, file: str, window: str = "1h") -> str:
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": window}
        answer = await self.ask("POST", "/v1/batches", body)
        assert answer.status == 200, answer
        return str(json.loads(answer.body)["id"])

    async def submit(self, lines: Iterable[dict[str, Any]], window: str = "1h") -> str:
        return await self.create(await self.upload(jsonl(lines)), window)

    async def batch(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.get(f"/v1/batches/{id}")
        return found

    async def batches(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.get("/v1/batches?limit=100"))["data"]
        return found

    async def lines(self, batch: dict[str, Any], field: str) -> list[dict[str, Any]]:
        """Of the ``output_file_id`` or the ``error_file_id``."""
        if not batch[field]:
            return []
        answer = await self.ask("GET", f"/v1/files/{batch[field]}/content")
        assert answer.status == 200, answer
        return [json.loads(line) for line in answer.body.splitlines()]


BOUNDARY = b"fault-boundary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}


def form(content: bytes) -> bytes:
    return (
        b'--%b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--%b\r\ncontent-disposition: form-data; name="file"; filename="r.jsonl"\r\n\r\n%b\r\n--%b--\r\n'
        % (BOUNDARY, BOUNDARY, content, BOUNDARY)
    )


def item(custom_id: str, tokens: int = 40, text: str = "hello") -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{custom_id} {text}"}]}
    body |= {"max_tokens": tokens, "ignore_eos": True}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def jsonl(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def chat(text: str = "hello", tokens: int = 20, stream: bool = True) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True}
    return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


class Answer:
    """What came of one interactive request; a ``Receiver``. ``verdict`` is one of: ``complete``, ``refused`` (an error
    status with an error object), ``error event``, ``broken`` (the connection), or what is wrong with the answer."""

    def __init__(self, origin: Origin, body: dict[str, Any]) -> None:

        self.status = 0
        self.text = b""
        self.verdict = ""
        self.retry_after = b""
        self._tokens = body["max_tokens"]
        self._stream = bool(body.get("stream"))
        self.first = asyncio.Event()
        self.over = asyncio.Event()
        headers = [(b"content-type", b"application/json")]
        self.call = origin.send(b"POST", b"/v1/chat/completions", headers, json.dumps(body).encode(), self)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.retry_after = dict(headers).get(b"retry-after", b"")

    def on_data(self, data: bytes) -> None:
        self.text += data
        self.first.set()

    def on_end(self) -> None:
        self.verdict = self._judge()
        self.over.set()
        self.first.set()

    def on_error(self, error: NetError) -> None:
        self.verdict = "broken"
        self.over.set()
        self.first.set()

    async def end(self, timeout_s: float = 60.0) -> str:
        async with asyncio.timeout(timeout_s):
            await self.over.wait()
        return self.verdict

    def _judge(self) -> str:
        try:
            if self.status != 200:
                return "refused" if json.loads(self.text)["error"]["message"] else "an error without a message"
            if not self._stream:
                tokens = json.loads(self.text)["usage"]["completion_tokens"]
                return "complete" if tokens == self._tokens else f"{tokens} tokens"
            events = [part.removeprefix(b"data: ") for part in self.text.split(b"\n\n") if part.strip()]
            if events and b'"error"' in events[-1]:
                return "error event" if json.loads(events[-1])["error"]["message"] else "an event without a message"
            if not events or events[-1] != b"[DONE]":
                return "a part, and silence"
            tokens = json.loads(events[-2])["usage"]["completion_tokens"]
            return "complete" if tokens == self._tokens else f"{tokens} tokens"
        except (ValueError, KeyError, IndexError) as error:
            return f"not understood: {error!r}: {self.text[-300:]!r}"


FINE = frozenset({"complete", "refused", "error event", "broken"})
