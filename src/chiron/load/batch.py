"""Batch jobs of a plan: upload, submit, watch, fetch what came of them and count it.

The batch API says how many items are done, not when each one was. The n-th result line is taken to have been done when
the count reached n: right for the job as a whole, to within the polling period.
"""

from __future__ import annotations

import asyncio
import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Any

import orjson

from chiron.engines.claims import usage_counts
from chiron.load.body import Bodies, BodySettings, headers_of
from chiron.load.errors import PlanError
from chiron.load.plan import Job, LoadPlan
from chiron.load.probe import refusal, text_headers
from chiron.load.record import Record
from chiron.load.settings import LoadSettings
from chiron.net.client import NetError, Origin

TERMINAL = ("completed", "failed", "expired", "cancelled")
BOUNDARY = "chiron-load-5d1f0a"
ODD = (ValueError, LookupError, TypeError, AttributeError)
"""What reading JSON of another shape than the API's raises."""


@dataclass(slots=True, kw_only=True)
class JobState:
    """A job and what became of it. Seconds since the start of the run; -1: not yet."""

    job: Job
    name: str
    upload: bytes = field(repr=False)
    """The multipart body, until it is sent."""
    id: str = ""
    status: str = "waiting"
    submitted_s: float = -1.0
    ended_s: float = -1.0
    done: int = 0
    """Items that are over, as the server counts them."""
    failed: int = 0
    results: int = 0
    """Lines of the output and the error file."""
    doubled: int = 0
    """Lines for an item that had one already: there must be none."""
    missing: int = 0
    """Items of an ended job without any line: there must be none."""
    error: str = ""
    counts: list[tuple[int, float]] = field(default_factory=list)
    """(items over, when that was seen), growing."""

    def line(self) -> str:
        """For the progress view."""
        total = len(self.job.rows)
        return f"{self.name} {self.status} {self.done:,}/{total:,}" + (f" ({self.error})" if self.error else "")

    def finish_s(self, number: int) -> float:
        """When the ``number``-th item (from 1) was over, as far as the polls saw."""
        at = bisect_left(self.counts, (number, -inf))
        return self.counts[at][1] if at < len(self.counts) else self.ended_s


class JobError(Exception):
    """The job cannot go on; the message says why."""


def prepare_job(job: Job, number: int, plan: LoadPlan, bodies: Bodies, settings: LoadSettings) -> JobState:
    """The job with its input file, made before the run so that making it delays no request."""
    path = json.dumps(settings.body.path)
    lines: list[bytes] = []
    total = 0
    for row in job.rows.tolist():
        body, _ = bodies.body(row, stream=False)
        line = b'{"custom_id":"row-%d","method":"POST","url":%b,"body":%b}\n' % (row, path.encode(), body)
        total += len(line)
        if total > settings.batch.input_max_bytes:
            raise PlanError(
                f"batch job {number}: its input file would exceed input_max_bytes ({settings.batch.input_max_bytes}); "
                "send fewer or shorter requests (--input-max, --input-scale)"
            )
        lines.append(line)
    return JobState(
        job=job, name=f"job {number}", upload=multipart(b"".join(lines), f"load-{plan.seed}-{number}.jsonl")
    )


async def run_job(
    state: JobState, origin: Origin, record: Record, settings: LoadSettings, start_s: float, stop: asyncio.Event
) -> None:
    """One job, from its time to its results. What goes wrong is in ``state.error`` and among the record's errors."""

    def now_s() -> float:
        return perf_counter() - start_s

    if await stopped_within(stop, max(0.0, state.job.at_s - now_s())):
        return
    record.attempted[state.job.rows] = True
    try:
        await submit(state, origin, record, settings, now_s)
        await watch(state, origin, settings, now_s, stop)
        await fetch(state, origin, record, settings)
    except (JobError, NetError, *ODD) as error:
        state.error = f"{type(error).__name__}: {error}"[:200] if isinstance(error, ODD) else str(error)[:200]
        state.status = "trouble" if state.status not in TERMINAL else state.status
        record.fault("batch job", f"{state.name}: {error}")
    finally:
        state.upload = b""
        if state.ended_s < 0:
            state.ended_s = now_s()


async def submit(
    state: JobState, origin: Origin, record: Record, settings: LoadSettings, now_s: Callable[[], float]
) -> None:
    """Upload the file and create the batch."""
    state.status = "uploading"
    form = json_headers(settings.body) | {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    timeout_s = settings.batch.upload_timeout_s
    uploaded = await origin.fetch("POST", "/v1/files", body=state.upload, headers=form, timeout_s=timeout_s)
    state.upload = b""
    if uploaded.status not in (200, 201):
        raise JobError(f"upload: {refusal(uploaded)}")
    order = {
        "input_file_id": read(uploaded.body)["id"],
        "endpoint": settings.body.path,
        "completion_window": window(state.job.window_s),
        "metadata": {"sent_by": "chiron load"},
    }
    created = await origin.fetch(
        "POST", "/v1/batches", body=json.dumps(order).encode(), headers=json_headers(settings.body), timeout_s=timeout_s
    )
    if created.status not in (200, 201):
        raise JobError(f"create: {refusal(created)}")
    state.id = str(read(created.body)["id"])
    state.status = str(read(created.body).get("status", "validating"))
    state.submitted_s = now_s()
    record.sent_s[state.job.rows] = state.submitted_s


async def watch(
    state: JobState, origin: Origin, settings: LoadSettings, now_s: Callable[[], float], stop: asyncio.Event
) -> None:
    """Until the job has ended, or its deadline and the wait after it have passed; a stop cancels it."""
    failures, cancelled = 0, False
    until_s = state.job.at_s + state.job.window_s + settings.batch.wait_s
    while True:
        try:
            await look(state, origin, settings, now_s)
            failures = 0
        except (NetError, JobError, *ODD) as error:
            failures += 1
            if failures > settings.batch.poll_failures_max:
                raise JobError(f"{failures} checks in a row failed, the last: {error}") from error
        if state.status in TERMINAL:
            return
        if now_s() > until_s:
            raise JobError(f"still {state.status}, {settings.batch.wait_s:g} s after its deadline")
        if cancelled:
            await asyncio.sleep(min(settings.batch.poll_s, 0.5))
        elif await stopped_within(stop, settings.batch.poll_s):
            cancelled, until_s = True, now_s() + settings.grace_s
            await origin.fetch("POST", f"/v1/batches/{state.id}/cancel", headers=json_headers(settings.body))


async def look(state: JobState, origin: Origin, settings: LoadSettings, now_s: Callable[[], float]) -> None:
    """Ask once how far the job is."""
    answer = await origin.fetch("GET", f"/v1/batches/{state.id}", headers=json_headers(settings.body))
    if answer.status != 200:
        raise JobError(f"status: {refusal(answer)}")
    batch = read(answer.body)
    counts = batch.get("request_counts") or {}
    done = int(counts.get("completed") or 0) + int(counts.get("failed") or 0)
    state.failed = int(counts.get("failed") or 0)
    at_s = now_s()
    if done > state.done:
        state.counts.append((done, at_s))
        state.done = done
    state.status = str(batch.get("status"))
    if state.status in TERMINAL:
        state.ended_s = at_s
        if state.status == "failed":
            state.error = first_error(batch)


async def fetch(state: JobState, origin: Origin, record: Record, settings: LoadSettings) -> None:
    """Read the result files and count every line."""
    answer = await origin.fetch("GET", f"/v1/batches/{state.id}", headers=json_headers(settings.body))
    batch = read(answer.body)
    seen: set[int] = set()
    members = set(state.job.rows.tolist())

    def take(line: bytes) -> None:
        row = int(str(read(line)["custom_id"]).removeprefix("row-"))
        if row not in members:
            raise JobError(f"a result for an item that was not asked for: row {row}")
        state.results += 1
        if row in seen:
            state.doubled += 1
            return
        seen.add(row)
        note(record, row, read(line), state.finish_s(len(seen)), state.status)

    for name in ("output_file_id", "error_file_id"):
        if batch.get(name):
            lines = _Lines(take, settings.batch.line_max_bytes)
            headers = headers_of(settings.body, None)
            lines.call = origin.send(b"GET", f"/v1/files/{batch[name]}/content".encode(), headers, b"", lines)
            try:
                await asyncio.wait_for(lines.future, settings.batch.upload_timeout_s)
            except TimeoutError:
                raise JobError(f"{name}: no end within {settings.batch.upload_timeout_s:g} s") from None
            finally:
                lines.call.cancel()
    # Of a job that was cancelled or refused, items that never ran have no line.
    state.missing = len(members) - len(seen) if state.status in ("completed", "expired") else 0
    if state.missing or state.doubled:
        record.fault("batch result", f"{state.name}: {state.missing} items without a line, {state.doubled} doubled")
    for row in sorted(members - seen):
        record.item(row, "cancelled" if state.status == "cancelled" else "failed", state.ended_s, None)


def note(record: Record, row: int, result: dict[str, Any], at_s: float, status: str) -> None:
    """One result line."""
    response = result.get("response") or {}
    if response.get("status_code") == 200 and not result.get("error"):
        record.item(row, "finished", at_s, usage_counts((response.get("body") or {}).get("usage")))
        return
    error = result.get("error") or {}
    code = str(error.get("code") or f"http {response.get('status_code')}")
    record.item(row, "cancelled" if status == "cancelled" else "failed", at_s, None, f"batch item: {code}"[:80])


class _Lines:
    """Receives a file and hands on its lines, so that a large result needs no large memory."""

    def __init__(self, take: Callable[[bytes], None], line_max_bytes: int) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.call: Any = None
        self._take = take
        self._line_max_bytes = line_max_bytes
        self._status = 0
        self._tail = b""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        *lines, self._tail = (self._tail + data).split(b"\n")
        if self.future.done() or self._status != 200:
            return
        try:
            for line in lines:
                if line.strip():
                    self._take(line)
            if len(self._tail) > self._line_max_bytes:
                raise JobError(f"a result line of more than {self._line_max_bytes} bytes")
        except (JobError, *ODD) as error:
            self.future.set_exception(error if isinstance(error, JobError) else JobError(f"a bad result line: {error}"))

    def on_end(self) -> None:
        if self._status == 200 and self._tail.strip():
            self.on_data(b"\n")
        if not self.future.done():
            if self._status == 200:
                self.future.set_result(None)
            else:
                self.future.set_exception(JobError(f"results: status {self._status}"))

    def on_error(self, error: NetError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


async def stopped_within(stop: asyncio.Event, delay_s: float) -> bool:
    """Wait, but not beyond a stop; whether there was one."""
    try:
        await asyncio.wait_for(stop.wait(), delay_s)
    except TimeoutError:
        return False
    return True


def multipart(data: bytes, filename: str) -> bytes:
    """A form with the file and its purpose."""
    dashes = f"--{BOUNDARY}\r\ncontent-disposition: form-data; name="
    return b"".join(
        (
            f'{dashes}"purpose"\r\n\r\nbatch\r\n'.encode(),
            f'{dashes}"file"; filename="{filename}"\r\ncontent-type: application/jsonl\r\n\r\n'.encode(),
            data,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        )
    )


def window(seconds: float) -> str:
    """A completion window in the largest unit that holds it exactly: ``24h``, ``25m``, ``90s``."""
    whole = max(1, round(seconds))
    for unit, length in (("h", 3600), ("m", 60)):
        if whole % length == 0:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def json_headers(settings: BodySettings) -> dict[str, str]:
    return text_headers(headers_of(settings, None))


def read(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises JobError for anything else."""
    try:
        value = orjson.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise JobError(f"not a JSON object: {body[:80].decode('utf-8', 'replace')}")
    return value


def first_error(batch: dict[str, Any]) -> str:
    """Why validation failed, in the server's words."""
    errors = (batch.get("errors") or {}).get("data") or [{}]
    return f"line {errors[0].get('line')}: {errors[0].get('message')}"
