"""The emulated engine over real sockets: a profile's timing, answers that survive interruption, limits that hold."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import pytest

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind, Request, RequestClass
from chiron.engines.metrics import parse_metrics, read_row
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.engines.profile_store import load_profile
from chiron.engines.rows import ENGINES
from chiron.engines.serve.emulated import parse_options
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings, at_speed
from chiron.engines.serve.http import EngineServer
from chiron.net.client import Call, NetError, Origin, Response
from chiron.net.clock import LiveClock
from chiron.net.server import serve

PROFILE = load_profile("llama-3.1-8b/a100/tp1")
MODEL = PROFILE.model


@dataclass(kw_only=True)
class Stream:
    """A streaming client: what came, and when."""

    data: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    status: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    call: Call | None = None

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        self.data += data
        *whole, self.data = self.data.split(b"\n\n")
        for event in whole:
            assert event.startswith(b"data: ")
            if event != b"data: [DONE]":
                self.events.append(json.loads(event[6:]))
                self.times_s.append(time.monotonic())
        self.news.set()

    def on_end(self) -> None:
        self.over.set()
        self.news.set()

    def on_error(self, error: NetError) -> None:
        self.on_end()

    async def tokens(self, count: int) -> None:
        """Until this many events came."""
        async with asyncio.timeout(60):
            while len(self.events) < count:
                self.news.clear()
                await self.news.wait()

    async def end(self) -> Stream:
        await asyncio.wait_for(self.over.wait(), 60)
        return self

    def choices(self) -> list[dict[str, Any]]:
        return [event["choices"][0] for event in self.events if event["choices"]]

    def text(self) -> str:
        return "".join(choice["text"] for choice in self.choices())

    def ids(self) -> list[int]:
        return [id for choice in self.choices() for id in choice["token_ids"]]


class Client:
    """Talks to one instance."""

    def __init__(self, port: int, engine: EmulatedEngine | None = None) -> None:
        self.origin = Origin(f"http://127.0.0.1:{port}", connect_timeout_s=60.0)
        self.engine = engine

    def stream(self, **fields: Any) -> Stream:
        stream = Stream()
        body = json.dumps(request(stream=True, return_token_ids=True, **fields)).encode()
        stream.call = self.origin.send(b"POST", b"/v1/completions", [], body, stream)
        return stream

    async def post(self, path: str = "/v1/completions", **fields: Any) -> Response:
        return await self.origin.fetch("POST", path, body=json.dumps(request(**fields)).encode())

    async def whole(self, **fields: Any) -> dict[str, Any]:
        response = await self.post(**fields)
        assert response.status == 200, response.body
        return json.loads(response.body)

    async def limits(self, limit: int | None = None) -> dict[str, Any]:
        method, body = ("GET", b"") if limit is None else ("PUT", json.dumps({"limit": limit}).encode())
        response = await self.origin.fetch(method, "/chiron/limits", body=body)
        assert response.status == 200, response.body
        return json.loads(response.body)

    async def read(self) -> dict[str, float]:
        response = await self.origin.fetch("GET", "/metrics")
        return read_row(ENGINES["emulated"], response.body.decode())

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not holds(limits := await self.limits()):
                await asyncio.sleep(0.005)
        return limits


def request(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": [5, 6, 7], **fields}


@asynccontextmanager
async def emulated(
    count: int = 1, *, speedup: float = 1.0, profile: Profile = PROFILE, settings: EmulatedSettings | None = None
) -> AsyncIterator[list[Client]]:
    """Instances in this process, on real sockets."""
    clock = LiveClock(asyncio.get_running_loop())
    fast = at_speed(profile, speedup)
    times = StepTable(fast)
    clients, servers = [], []
    for number in range(count):
        engine = EmulatedEngine(
            clock=clock,
            number=number,
            name=MODEL,
            profile=fast,
            times=times,
            settings=settings or EmulatedSettings(),
            speedup=speedup,
        )
        servers.append(await serve(EngineServer(engine, [MODEL], {}).handle))
        clients.append(Client(servers[-1].port, engine))
    try:
        yield clients
    finally:
        for client in clients:
            await client.origin.close()
        for server in servers:
            await server.close(0)
        clock.stop()


class Modelled:
    """The same requests under virtual time, at once or at their times: when each token is due."""

    def __init__(self, profile: Profile, prompts: Sequence[int], tokens: int, arrivals_s: Sequence[float] = ()) -> None:
        kind = InstanceKind(
            name="k",
            gpu="g",
            gpus=1,
            price_per_gpu_hour=1.0,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            max_num_seqs=profile.max_num_seqs,
        )
        self.clock = VirtualClock()
        self.times_s: dict[int, list[float]] = {id: [] for id in range(len(prompts))}
        self.finished_ids: list[int] = []
        engine = EngineModel(
            clock=self.clock,
            instance=Instance(0, MODEL, kind, "mixed", 0.0),
            profile=profile,
            times=StepTable(profile),
            listener=self,
            step_mode=True,
            stepped=self.stepped,
        )
        cls = RequestClass(name="c", kind="batch")
        for id, prompt in enumerate(prompts):
            request = Request(id, MODEL, cls, 0.0, prompt, payload=tokens)
            if arrivals_s:
                self.clock.call_at(arrivals_s[id], partial(engine.start, request))
            else:
                engine.start(request)
        while self.clock.step():
            pass

    def stepped(self, ids: Iterable[int]) -> None:
        for id in ids:
            self.times_s[id].append(self.clock.now_s)

    def first_token(self, request: Request) -> None:
        self.times_s[request.id].append(self.clock.now_s)

    def finished(self, request: Request) -> None:
        self.finished_ids.append(request.id)

    def evicted(self, request: Request) -> None: ...
    def refused(self, request: Request, reason: str) -> None: ...


def test_the_model_tells_of_every_token_once_and_in_order() -> None:
    # The second preempts and prefills again.
    for profile in (PROFILE, replace(PROFILE, kv_capacity_tokens=900)):
        modelled = Modelled(profile, [100, 200, 300, 50, 10], 60)
        assert sorted(modelled.finished_ids) == [0, 1, 2, 3, 4]
        for times_s in modelled.times_s.values():
            assert len(times_s) == 60
            assert times_s == sorted(set(times_s))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_times_over_sockets_are_those_of_the_model(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own times are the model's to the nanosecond, however busy the machine is. A client gets a token when
    it is due or later; how late is the machine's doing, so the best of several tries counts."""
    tokens = 60
    start = EngineModel.start

    async def run() -> tuple[float, float]:
        """By how much the first client of a step was late, in the median step, and a step's mean duration."""
        arrivals_s: list[float] = []

        def started(model: EngineModel, request: Request) -> None:
            arrivals_s.append(model._clock.now_s)
            start(model, request)

        async with emulated() as [client]:
            assert client.engine is not None
            with monkeypatch.context() as patch:
                patch.setattr(EngineModel, "start", started)
                streams = [client.stream(prompt=[n] * 60, max_tokens=tokens, ignore_eos=True) for n in range(batch)]
                for stream in streams:
                    assert len((await stream.end()).events) == tokens, "one event a step"
            metrics = await client.read()
            origin_s = client.engine._clock._origin_s
        due_s = Modelled(PROFILE, [60] * batch, tokens, arrivals_s).times_s
        between_s = sum(times[-1] - times[0] for times in due_s.values()) / batch / (tokens - 1)
        assert metrics["itl_sum_s"] / metrics["itl_count"] == pytest.approx(between_s, rel=1e-6)
        assert metrics["generation_tokens"] == batch * tokens
        assert metrics["prefill_tokens"] == 60 * batch
        late_s = []
        for stream in streams:
            arrival = int(stream.events[0]["id"].rpartition("-")[2]) - 1
            late_s.append([came - origin_s - due for came, due in zip(stream.times_s, due_s[arrival], strict=True)])
        firsts_s = [min(step) for step in zip(*late_s, strict=True)]
        assert min(firsts_s) > -1e-6, "no token comes before it is due"
        return median(firsts_s), between_s

    tries = []
    for _ in range(10):
        late_s, between_s = asyncio.run(run())
        if late_s < between_s / 2:
            return
        tries.append(late_s)
    pytest.fail(f"each time half of the steps came late by more than half a step: {tries}")


def test_an_answer_is_the_same_streamed_or_whole_here_or_on_another_instance() -> None:
    async def run() -> None:
        async with emulated(2, speedup=50) as [one, other]:
            stream = await one.stream(max_tokens=20, stream_options={"include_usage": True}).end()
            whole = await other.whole(max_tokens=20, return_token_ids=True)
            choice = whole["choices"][0]
            assert (choice["text"], choice["token_ids"]) == (stream.text(), stream.ids())
            assert len(choice["text"].split()) == len(choice["token_ids"]) == 20
            assert stream.events[-1]["usage"] == whole["usage"]
            assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
            assert stream.choices()[-1]["finish_reason"] == choice["finish_reason"] == "length"
            assert (await one.whole(max_tokens=20, seed=1))["choices"][0]["text"] != choice["text"]
            assert (await one.whole(max_tokens=20))["id"] != (await one.whole(max_tokens=20))["id"]
            said = json.loads(
                (await one.post("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 79}])).body
            )
            assert said["usage"]["prompt_tokens"] == 20, "text counts four bytes a token"
            assert said["choices"][0]["message"]["content"]

    asyncio.run(run())


def test_lengths_are_drawn_around_the_mean_and_bounded_by_max_tokens() -> None:
    async def run() -> None:
        async with emulated(speedup=500) as [client]:
            answers = [client.whole(prompt=[n], max_tokens=4000) for n in range(150)]
            lengths = [(await answer)["usage"]["completion_tokens"] for answer in answers]
            assert 140 < sum(lengths) / len(lengths) < 270
            assert len(set(lengths)) > 50
            short = await client.whole(prompt=[lengths.index(max(lengths))], max_tokens=7)
            assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (7, "length")
            stopped = await client.whole(prompt=[lengths.index(min(lengths))], max_tokens=4000)
            assert stopped["choices"][0]["finish_reason"] == "stop"

    asyncio.run(run())


def test_a_stop_string_ends_the_answer_before_itself() -> None:
    async def run() -> None:
        async with emulated(speedup=50) as [client]:
            full = (await client.whole(max_tokens=40))["choices"][0]["text"]
            words = full.split()
            stop = f"{words[9][-1:]} {words[10]}"  # Across two tokens.
            wanted = full[: full.index(stop)]
            whole = await client.whole(max_tokens=40, stop=["never said", stop])
            stream = await client.stream(max_tokens=40, stop=stop).end()
            assert whole["choices"][0]["text"] == stream.text() == wanted
            assert whole["choices"][0]["finish_reason"] == stream.choices()[-1]["finish_reason"] == "stop"
            half = len(stream.ids()) // 2
            rest = await client.stream(max_tokens=40, stop=stop, resume_token_ids=stream.ids()[:half]).end()
            assert "".join(c["text"] for c in stream.choices()[:half]) + rest.text() == wanted

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_place_and_may_come_back_without_prefill() -> None:
    fields: dict[str, Any] = {"prompt": list(range(3000)), "max_tokens": 60, "ignore_eos": True}

    async def run() -> None:
        async with emulated(2, speedup=5) as [one, other]:
            uninterrupted = await one.stream(**fields).end()
            before = await one.read()
            stream = one.stream(**{**fields, "max_tokens": 5000})
            await stream.tokens(10)
            assert stream.call is not None
            stream.call.cancel()
            await one.until(lambda limits: limits["running"] == limits["kv_used_tokens"] == 0)
            figures = parse_metrics((await one.origin.fetch("GET", "/metrics")).body.decode())
            assert figures["chiron:engine_cancelled_requests_total"] == 1, "it did not run to its end"
            got = stream.ids()[:10]
            text = "".join(choice["text"] for choice in stream.choices()[:10])

            foreign = await one.stream(**fields, resume_token_ids=[1] * 10).end()
            assert len(foreign.ids()) == 50
            between = await one.read()
            assert between["prefill_tokens"] - before["prefill_tokens"] == 3000 + 3010, "no KV of other tokens"

            resumed = await one.stream(**fields, resume_token_ids=got, stream_options={"include_usage": True}).end()
            assert text + resumed.text() == uninterrupted.text()
            assert got + resumed.ids() == uninterrupted.ids()
            assert resumed.events[-1]["usage"]["completion_tokens"] == 60
            assert (await one.read())["prefill_tokens"] == between["prefill_tokens"], "its KV was copied back in"

            elsewhere = await other.stream(**fields, resume_token_ids=got).end()
            assert text + elsewhere.text() == uninterrupted.text()
            assert (await other.read())["prefill_tokens"] == 3000 + len(got)

            done = await one.stream(**fields, resume_token_ids=uninterrupted.ids()).end()
            assert (done.text(), done.choices()[-1]["finish_reason"]) == ("", "length")

    asyncio.run(run())


def test_saved_kv_is_bounded() -> None:
    async def run() -> None:
        async with emulated(speedup=20, settings=EmulatedSettings(kv_saved_tokens_max=15_000)) as [client]:
            for n in range(3):
                # Two of them do not fit, and one does even if seconds pass before it is cancelled.
                stream = client.stream(prompt=[n] * 8000, max_tokens=30_000, ignore_eos=True)
                await stream.tokens(2)
                assert stream.call is not None
                stream.call.cancel()
                await client.until(lambda limits: limits["running"] == 0)
            assert client.engine is not None
            assert 0 < client.engine._saved.tokens <= 15_000
            assert len(client.engine._saved) == 1

    asyncio.run(run())


def test_the_limit_is_live_and_the_queue_inside_is_bounded() -> None:
    async def run() -> None:
        async with emulated(speedup=2, settings=EmulatedSettings(queue_max=6)) as [client]:
            assert (await client.limits(2))["limit"] == 2
            streams = [client.stream(prompt=[n], max_tokens=4000, ignore_eos=True) for n in range(8)]
            await client.until(lambda limits: (limits["running"], limits["waiting"]) == (2, 6))
            refused = await client.post(max_tokens=1)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert "allowed: 6" in json.loads(refused.body)["error"]["message"]
            await client.limits(8)
            assert (await client.until(lambda limits: limits["running"] == 8))["waiting"] == 0
            await client.limits(1)
            for stream in streams:  # A lower limit lets those that run go on.
                await stream.tokens(len(stream.events) + 2)
                assert stream.call is not None
                stream.call.cancel()
            await client.until(lambda limits: limits["running"] == 0)
            assert (await client.limits(10**9))["limit"] == PROFILE.max_num_seqs

    asyncio.run(run())


@pytest.mark.slow
def test_a_client_that_does_not_read_costs_little_and_misses_nothing() -> None:
    tokens = 40_000

    async def run() -> None:
        async with emulated(speedup=1000) as [client]:
            stream = client.stream(max_tokens=tokens, ignore_eos=True)
            await stream.tokens(1)
            assert stream.call is not None
            stream.call.pause()
            async with asyncio.timeout(60):
                while (await client.limits())["running"]:
                    await asyncio.sleep(0.01)
            stream.call.resume()
            await stream.end()
            assert len(stream.ids()) == tokens
            assert len(stream.events) < tokens, "what it did not take in time came together"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "other"}, 404, "other"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000_000}, 400, "131072"),
        ({"prompt": [1] * 131_072}, 400, "prompt"),
        ({"n": 129}, 400, "n"),
        ({"resume_token_ids": "x"}, 400, "resume_token_ids"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(fields: dict[str, Any], status: int, named: str) -> None:
    async def run() -> None:
        async with emulated() as [client]:
            response = await client.post(**fields)
            assert response.status == status
            assert named in json.loads(response.body)["error"]["message"]
            for method, path, expected in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
                assert (await client.origin.fetch(method, path)).status == expected
            assert (await client.origin.fetch("GET", "/health")).status == 200

    asyncio.run(run())


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "chiron.engines.serve.emulated", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_process_serves_a_fleet_and_stops_when_told() -> None:
    process = launch("--fleet", "3", "--speedup", "2", "--served-model-name", "a", "b", "--max-num-seqs", "4")
    try:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert line[:2] == ["chiron-engine", "ready"]
        ports = [int(port) for port in line[2].removeprefix("port=").split(",")]
        assert len(set(ports)) == 3

        async def run() -> None:
            clients = [Client(port) for port in ports]
            streams = [c.stream(model="b", max_tokens=50_000, ignore_eos=True) for c in clients[:2]]
            for stream in streams:
                await stream.tokens(3)
            running = [(await client.limits())["running"] for client in clients]
            assert running == [1, 1, 0], "instances are on their own"
            assert (await clients[0].limits())["max_num_seqs"] == 4
            process.send_signal(signal.SIGTERM)
            for stream in streams:
                await stream.end()
            for client in clients:
                await client.origin.close()

        asyncio.run(run())
        process.communicate(timeout=60)  # The answers would take minutes.
        assert process.returncode == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--profile", "llama-3.1-8b/a100/tp9"), "tp9"),
        (("--speedup", "0"), "--speedup: '0'"),
        (("--speedup", "nan"), "--speedup"),
        (("--fleet", "0"), "from 1 to 1000"),
        (("--port", "65530", "--fleet", "10"), "65535"),
        (("--max-num-seqs", "many"), "--max-num-seqs: 'many'"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_wrong(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(arguments)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
