"""The gateway's API on a real socket, before a control plane that answers by itself. For tests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chiron.core.clock import VirtualClock
from chiron.core.types import Outcome, Request, RequestClass
from chiron.gateway.api import ApiState, make_app
from chiron.gateway.api.state import ApiLimits
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.batch.runner import BatchRunner
from chiron.gateway.batch.settings import RunnerSettings
from chiron.gateway.relay.admission import Models, ServedModel
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from chiron.gateway.settings import BatchSettings, ModelSettings
from chiron.net.clock import LiveClock
from chiron.net.server import serve
from chiron.store.sqlite.store import SqliteStore

CLASSES = {
    "chat": RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1),
    "batch": RequestClass(name="batch", kind="batch", deadline_s=86_400.0),
}


def hashed(secret: str) -> str:
    return "sha256:" + sha256(secret.encode()).hexdigest()


def served(name: str, *, batch: str = "batch", aliases: tuple[str, ...] = ()) -> ServedModel:
    settings = ModelSettings(
        name=name, kinds=(), classes=tuple(CLASSES), default_class="chat", batch_class=batch, aliases=aliases
    )
    return ServedModel(settings=settings, classes=CLASSES, kv_capacity_tokens=100_000)


def models() -> Models:
    return Models(
        {"m": served("m", aliases=("alias",)), "org/n": served("org/n"), "chat-only": served("chat-only", batch="")}
    )


def stream(text: str) -> bytes:
    """What an engine sends: a token per word."""
    head: dict[str, Any] = {"id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    chunks = [
        head | {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in text.split()
    ]
    chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 1 + len(text.split())}
    chunks.append(head | {"choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


class FakePlane:
    """A control plane whose engines are a function. ``answer`` says what comes of a request's prompt: a text, a
    (status, body) that the engine refuses with, an outcome without an answer, or None: nothing until ``release``."""

    def __init__(self, clock: VirtualClock, answer: Callable[[str], Any]) -> None:
        self.clock = clock
        self.answer = answer
        self.open: dict[int, Request] = {}
        self.submitted: list[str] = []
        self.held: dict[tuple[str, float], list[float]] = {}
        self.most_open = 0

    def submit(self, request: Request) -> None:
        self.open[request.id] = request
        self.most_open = max(self.most_open, len(self.open))
        self.submitted.append(prompt(request))
        self.clock.call_later(0.0, lambda: self.settle(request))

    def settle(self, request: Request) -> None:
        if request.outcome is not None:
            return
        said = self.answer(prompt(request))
        if said is None:
            return
        call: BatchCall = request.payload
        request.instance = SimpleNamespace()  # type: ignore[assignment]
        if said in ("failed", "rejected"):
            self.end(request, said)
            return
        status, body = said if isinstance(said, tuple) else (200, stream(said))
        call.begin(None, status, [(b"content-type", b"text/event-stream")])  # type: ignore[arg-type]
        call.data(body)
        problem = call.end()
        self.end(request, "failed" if problem or status >= 400 else "finished")

    def cancel(self, request: Request) -> None:
        self.end(request, "cancelled")

    def end(self, request: Request, outcome: Outcome) -> None:
        del self.open[request.id]
        request.outcome = outcome
        request.payload.ended(request)

    def announce_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None:
        sums = self.held.setdefault((model, deadline_s), [0, 0, 0.0])
        for i, value in enumerate((requests, input_tokens, input_square)):
            sums[i] += value

    @property
    def held_items(self) -> float:
        return sum(sums[0] for sums in self.held.values())


def prompt(request: Request) -> str:
    fields = json.loads(request.payload.message(SimpleNamespace(resumes=False), "m", request))
    return str(fields["messages"][-1]["content"] if "messages" in fields else fields["prompt"])


def line(custom_id: str, content: str = "hello", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": content}], **body},
    }


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class ApiSite(AbstractContextManager["ApiSite"]):
    """A running API; ``url`` has no trailing slash."""

    def __init__(
        self,
        directory: Path,
        *,
        keys: KeyRing | None = None,
        answer: Callable[[str], Any] = str.upper,
        batch: BatchSettings | None = None,
        limits: ApiLimits | None = None,
        tuning: RunnerSettings | None = None,
    ) -> None:
        self.drained = False
        self._directory = directory
        self._keys = keys or KeyRing(admin_open=True)
        self._answer = answer
        self._batch = batch or BatchSettings(completion_window_min_s=0.1)
        self._limits = limits or ApiLimits()
        self._tuning = tuning or RunnerSettings(poll_s=0.05)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._error: BaseException | None = None

    def __enter__(self) -> ApiSite:
        self._thread.start()
        self._up.wait(60)
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def pass_time(self, seconds: float) -> None:
        """By the wall clock."""
        self._clock.wall_origin_s += seconds

    def release(self) -> None:
        """Ask again for answers to what has none."""
        requests = list(self.plane.open.values())
        self._loop.call_soon_threadsafe(lambda: [self.plane.settle(request) for request in requests])

    def drain(self) -> None:
        self.drained = True

    async def _serve(self) -> None:
        try:
            await self._run()
        except BaseException as error:
            self._error = error
            self._up.set()
            raise

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._clock = clock = LiveClock(self._loop)

        def wall_s() -> float:
            return clock.wall_s(clock.elapsed_s())

        store = SqliteStore(self._directory, wall=wall_s)
        await store.open()
        self.plane = FakePlane(clock, self._answer)
        ids = iter(range(1, 1 << 40))
        served_models = models()
        runner = BatchRunner(
            store=store,
            clock=clock,
            completions=self.plane,
            announcements=self.plane,
            models=served_models,
            keys=self._keys,
            next_id=lambda: next(ids),
            settings=self._batch,
            tuning=self._tuning,
        )
        await runner.start()
        self.state = state = ApiState(
            store=store,
            keys=self._keys,
            models=served_models,
            work=runner,
            wall_s=wall_s,
            started_s=wall_s(),
            ready=lambda: "draining" if self.drained else "",
            status=lambda: {"runner": runner.summary(), "instances": {1: "int keys are fine"}},
            drain=self.drain,
            metrics=lambda: b"up 1\n",
            batch=self._batch,
            limits=self._limits,
        )
        server = await serve(lambda incoming: None, app=make_app(state), is_app=lambda incoming: True)
        self.url = f"http://127.0.0.1:{server.port}"
        self._up.set()
        await self._stop.wait()
        await runner.close()
        await server.close(0.2)
        clock.stop()
        await store.close()


def two_keys() -> KeyRing:
    return KeyRing(
        [Key(name="a", hash=hashed("sk-a"), models=("m",)), Key(name="b", hash=hashed("sk-b"))], hashed("sk-admin")
    )
