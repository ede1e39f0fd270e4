"""A client is told at once when nothing can serve its model, and is held, knowingly, while something is coming."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, InternalServerError

from chiron.engines.metrics import parse_metrics
from chiron.gateway.gateway import WATCH_S
from chiron.gateway.service import Service
from chiron.net.client import Origin, Response
from chiron.net.server import Incoming, serve
from live_gateway import serving, until
from ports import free_port
from scripted_engine import CHAT, SSE, Reader, ScriptedEngine, before, body, chunk, whole

NEVER = 'engine = "openai"\nendpoints = ["http://127.0.0.1:{port}"]\n'
PATH = CHAT.decode()


@asynccontextmanager
async def gateway(directory: Path, text: str) -> AsyncIterator[tuple[Service, Origin]]:
    async with serving(directory, text) as service:
        origin = Origin(service.url)
        yield service, origin
        await origin.close()


async def post(origin: Origin, headers: dict[str, str] | None = None, **fields: Any) -> Response:
    return await origin.fetch("POST", PATH, body=body(**fields), headers=headers, timeout_s=60.0)


async def state_of(origin: Origin, query: str = "") -> tuple[int, str]:
    answer = await origin.fetch("GET", "/ready" + query)
    return answer.status, json.loads(answer.body)["status"]


def test_an_engine_that_was_never_reachable_is_said_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        port = free_port()
        text = f"[models.m]\naliases = ['n']\n{NEVER.format(port=port)}"
        async with gateway(tmp_path, text) as (service, origin):
            # Both the one that came before anybody knew, and the one after.
            for fields in ({}, {"stream": True}, {"service_tier": "flex"}):
                answer = await post(origin, **fields)
                error = json.loads(answer.body)["error"]
                assert (answer.status, error["code"]) == (503, "service_unavailable")
                assert "'m'" in error["message"]
                assert "does not answer" in error["message"]
                assert "(cannot connect)" in error["message"]
                assert str(port) not in error["message"], "where engines are is nothing to clients"
                assert int(answer.headers["retry-after"]) == 5
            assert (await state_of(origin))[0] == 503
            for query in ("?model=m", "?model=n"):
                status, words = await state_of(origin, query)
                assert (status, "does not answer" in words) == (503, True)
            (model,) = service.status()["models"]
            assert (model["ready"], "does not answer" in model["outage"]) == (False, True)
            page = parse_metrics(service._render_metrics().decode())
            assert (page["chiron_model_ready"], page["chiron_model_outage"]) == (0.0, 1.0)
            unknown = await origin.fetch("GET", "/ready?model=gpt")
            assert (unknown.status, json.loads(unknown.body)["error"]["code"]) == (404, "model_not_found")
            # It comes at last.
            engine = ScriptedEngine(whole)
            engine.server = await serve(engine.handle, port=port)
            await until(lambda: service.engines.live, "it is found")
            assert (await post(origin)).status == 200
            assert await state_of(origin, "?model=m") == (200, "ready")
            await until(lambda: not service.outages.now, "the outage is over")
            assert service.status()["models"][0]["outage"] is None
            await engine.server.close(0.0)

    asyncio.run(main())


def test_a_request_waits_for_an_endpoint_that_is_being_asked_for_the_first_time(tmp_path: Path) -> None:
    async def main() -> None:
        asked: list[Incoming] = []

        def handle(incoming: Incoming) -> None:
            if incoming.method == b"GET":
                asked.append(incoming)
            else:
                whole(incoming)

        server = await serve(handle)
        async with gateway(tmp_path, f"[models.m]\n{NEVER.format(port=server.port)}") as (service, origin):
            reader = Reader(origin, body())
            await until(lambda: asked and service.desk.open, "it is held")
            held_s = service.clock.elapsed_s()
            await until(lambda: service.clock.elapsed_s() > held_s + 1.5 * WATCH_S, "the watch has looked")
            assert not reader.over
            for each in asked:
                each.respond(200, b"{}")
            assert (await reader.end()).status == 200
        await server.close(0.0)

    asyncio.run(main())


@pytest.mark.parametrize("wait_s", [0.5, 120.0])
def test_endpoints_that_have_answered_get_a_while_to_return(tmp_path: Path, wait_s: float) -> None:
    limits = f'[limits]\noutage_wait = "{wait_s}s"\n'
    quick = '[fleet.health]\nhealth_period = "100ms"\nhealth_failures_max = 1\n'
    quick += 'health_timeout = "60s"\n'
    quick += '[fleet.recovery]\nrecover_first = "50ms"\nrecover_max = "50ms"\n'

    async def main() -> None:
        port = free_port()  # It is to have the same when it returns.
        engine = ScriptedEngine(whole, port)
        async with before(tmp_path, engine, extra=limits + quick) as (service, origin):
            assert (await post(origin)).status == 200
            await engine.server.close(0.0)
            await until(lambda: not service.engines.live, "it is lost")
            reader = Reader(origin, body())
            if wait_s < 1.0:
                assert (await reader.end()).status == 503
                assert "does not answer" in json.loads(reader.data)["error"]["message"]
            else:
                await until(lambda: service.desk.open, "it is held")
            engine.server = await serve(engine.handle, port=port)
            await until(lambda: service.engines.live, "it is back")
            if wait_s > 1.0:
                assert (await reader.end()).status == 200

    asyncio.run(main())


DIES = f"""
[models.m]
engine = "command"
command = ["{sys.executable}", "-c", "import sys; sys.exit(7)", "{{port}}"]
MORE
[fleet.backoff]
backoff_first = "10ms"
backoff_max = "30s"
crash_loop_starts = 2
"""


@pytest.mark.parametrize("more", ["", "min_instances = 0"])
def test_starts_that_fail_again_and_again_are_said_at_once(tmp_path: Path, more: str) -> None:
    async def main() -> None:
        async with gateway(tmp_path, DIES.replace("MORE", more)) as (service, origin):
            first = await post(origin)
            error = json.loads(first.body)["error"]
            assert first.status == 503
            assert "its engine keeps failing to start (2 in a row)" in error["message"]
            assert 1 <= int(first.headers["retry-after"]) <= 30
            assert "exit" not in error["message"], "what engines print is nothing to clients"
            assert (await post(origin)).status == 503
            assert (await state_of(origin, "?model=m"))[0] == 503
            assert service.plane.open_requests == 0

    asyncio.run(main())


SLOW = """
[models.m]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
args = ["--start-delay", "{delay}", "--speedup", "100"]
min_instances = 0
max_instances = 1
[limits]
held_notice = "{notice}"
"""


def test_a_held_stream_hears_what_it_waits_for_and_other_clients_do_not_mind(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, SLOW.format(delay=2, notice="200ms")) as (service, origin):
            assert await state_of(origin) == (200, "ready"), "one that is scaled to zero needs no instance"
            status, words = await state_of(origin, "?model=m")
            assert (status, "scaled to zero" in words) == (200, True)
            client = AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
            reader = Reader(origin, body(stream=True, max_tokens=5))
            ask: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            streamed = asyncio.ensure_future(client.chat.completions.create(stream=True, **ask))
            plain = asyncio.ensure_future(client.chat.completions.create(**ask))
            await until(lambda: service.plane.models["m"].waiting.count == 3, "all wait")
            await until(lambda: b": waiting: " in reader.data, "it is told")
            assert reader.status == 200
            assert b"being started" in reader.data
            text = [piece.choices[0].delta.content async for piece in await streamed if piece.choices]
            assert "".join(filter(None, text))
            answer = await plain
            assert answer.choices[0].message.content
            done = (await reader.end()).data
            assert done.endswith(b"data: [DONE]\n\n")
            assert done.startswith(b": waiting: ")
            (cls,) = service.status()["models"][0]["classes"]
            assert (cls["finished"], cls["generation_tokens"]) == (3, 15)
            await client.close()

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_shows_that_a_stream_is_held(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, SLOW.format(delay=2, notice="200ms")) as (service, _):
            data = body(stream=True, max_tokens=5).decode()
            command = ["curl", "-sSN", "--fail", "-d", data, "-H", "content-type: application/json"]
            curl = await asyncio.create_subprocess_exec(*command, service.url + PATH, stdout=asyncio.subprocess.PIPE)
            out, _ = await curl.communicate()
            assert curl.returncode == 0
            assert out.startswith(b": waiting: ")
            assert out.endswith(b"data: [DONE]\n\n")

    asyncio.run(main())


def test_a_client_may_say_how_long_it_waits(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, SLOW.format(delay=60, notice="0s")) as (service, origin):
            kinds: list[dict[str, Any]] = [{}, {"stream": True}, {"service_tier": "flex"}]
            asked = [post(origin, {"prefer": "respond-async, wait=1"}, **fields) for fields in kinds]
            for answer in await asyncio.gather(*asked):
                error = json.loads(answer.body)["error"]
                assert (answer.status, error["code"]) == (503, "service_unavailable")
                assert "1 s" in error["message"]
                assert "being started" in error["message"]
                assert "retry-after" in answer.headers
            assert service.plane.open_requests == 0
            with pytest.raises(InternalServerError, match="being started"):
                async with AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
                    await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": "hi"}], extra_headers={"prefer": "wait=1"}
                    )

    asyncio.run(main())


def busy(first: list[Incoming], act: Any) -> Any:
    """The first four requests fill the engine; what comes then gets ``act``."""

    def handle(incoming: Incoming) -> None:
        if len(first) < 4:
            first.append(incoming)
        else:
            act(incoming)

    return handle


def refuses(incoming: Incoming) -> None:
    incoming.respond(400, b'{"error": {"message": "too long", "type": "invalid_request_error", "code": null}}')


def says_nothing(incoming: Incoming) -> None:
    incoming.respond(404, b"")


def streams(incoming: Incoming) -> None:
    incoming.start(200, SSE)
    incoming.write(chunk("one") + b"data: [DONE]\n\n")
    incoming.finish()


def sick(incoming: Incoming) -> None:
    incoming.respond(503, b'{"error": {"message": "sick", "type": "server_error", "code": null}}')


@pytest.mark.parametrize(
    ("act", "message"), [(streams, ""), (refuses, "too long"), (says_nothing, "404"), (sick, "sick")]
)
def test_what_comes_after_the_notice_is_the_answer_or_an_error_event(tmp_path: Path, act: Any, message: str) -> None:
    async def main() -> None:
        first: list[Incoming] = []
        engine = ScriptedEngine(busy(first, act))
        async with before(tmp_path, engine, extra='[limits]\nheld_notice = "200ms"\n') as (service, origin):
            fill = [Reader(origin, body()) for _ in range(4)]
            await until(lambda: len(first) == 4, "it is full")
            held = Reader(origin, body(stream=True))
            client = AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0)
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            await until(lambda: held.data, "it is told")
            assert b"1 instance is busy" in held.data
            for each in first:
                whole(each)
            for each in fill:
                assert (await each.end()).status == 200
            await held.end()
            assert held.status == 200
            if message:
                assert message in held.error["message"]
                assert len(engine.seen) == 4 + 2 * (4 if act is sick else 1), "it was tried as often as any other"
                with pytest.raises(APIError, match=message):
                    async for _ in stream:
                        pass
            else:
                assert held.data.endswith(chunk("one") + b"data: [DONE]\n\n")
                assert [piece.choices[0].delta.content async for piece in stream] == ["one"]
            await client.close()

    asyncio.run(main())
