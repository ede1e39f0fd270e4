"""Between a client and engines that refuse, die, stall or flood; clients that leave, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Batch

from chiron.engines.metrics import parse_metrics
from chiron.net.client import Origin
from chiron.net.server import Incoming, serve
from chiron.telemetry.event_log import read_event_log
from live_gateway import serving, until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk, whole


def refuses(status: int) -> Any:
    error = {"error": {"message": f"engine says {status}", "type": "x", "param": None, "code": None}}
    return lambda incoming: incoming.respond(status, json.dumps(error).encode())


def hangs_up(incoming: Incoming) -> None:
    incoming.abort()


def dies_in_the_middle(incoming: Incoming) -> None:
    incoming.start(200, SSE)
    incoming.write(chunk("one"))
    asyncio.get_running_loop().call_later(0.02, incoming.abort)


@pytest.mark.parametrize("bad", [refuses(503), refuses(500), refuses(522), refuses(429), hangs_up])
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_byte_another_engine_has_a_try(tmp_path: Path, bad: Any, stream: bool) -> None:
    async def main() -> None:
        tries: list[str] = []

        def first_fails(incoming: Incoming) -> None:
            tries.append(incoming.header(b"x-request-id").decode())  # type: ignore[union-attr]
            if len(tries) == 1:
                bad(incoming)
            elif stream:
                incoming.start(200, SSE)
                incoming.write(chunk("fine") + b"data: [DONE]\n\n")
                incoming.finish()
            else:
                whole(incoming)

        engines = ScriptedEngine(first_fails), ScriptedEngine(first_fails)
        async with before(tmp_path, *engines, model="min_instances = 2") as (_, origin):
            reader = await Reader(origin, body(stream=stream)).end()
            assert (reader.status, reader.over) == (200, "end")
            assert b"fine" in reader.data
        assert len(tries) == 2
        assert len(set(tries)) == 1

    asyncio.run(main())


def test_after_the_first_byte_a_stream_ends_with_an_error_event(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(dies_in_the_middle)
        async with before(tmp_path, engine) as (_, origin):
            reader = await Reader(origin, body(stream=True)).end()
            assert (reader.status, reader.over) == (200, "end")
            assert b"one" in reader.data
            assert (reader.error["type"], reader.error["code"]) == ("server_error", "engine_lost")
            assert b"[DONE]" not in reader.data
        assert len(engine.seen) == 1

    asyncio.run(main())


def test_a_stream_of_a_told_length_that_breaks_off_is_cut(tmp_path: Path) -> None:
    async def main() -> None:
        def breaks_off(incoming: Incoming) -> None:
            incoming.start(400, length=10)
            incoming.write(b"{")
            asyncio.get_running_loop().call_later(0.02, incoming.abort)

        async with before(tmp_path, ScriptedEngine(breaks_off)) as (_, origin):
            reader = await Reader(origin, body(stream=True)).end()
            assert (reader.status, reader.data, reader.over) == (400, b"{", "ConnectionLostError")

    asyncio.run(main())


def test_a_stream_whose_instance_the_fleet_gives_up_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine) as (service, origin):
            reader = Reader(origin, body(stream=True))
            await until(lambda: engine.seen, "it runs")
            engine.seen[0].start(200, SSE)
            engine.seen[0].write(chunk("one"))
            await until(lambda: reader.data, "it has a token")
            (instance,) = service.plane.instances.values()
            service.clock.post(lambda: service.engines.instance_failed(instance, "gone"))
            assert (await reader.end()).error["code"] == "engine_lost"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        (refuses(400), 400, None),
        (refuses(404), 404, None),
        (refuses(429), 429, None),
        (refuses(501), 501, None),
        (refuses(505), 505, None),
        (refuses(503), 503, None),
        (refuses(520), 502, "bad_gateway"),
        (refuses(529), 502, "bad_gateway"),
        (hangs_up, 502, "bad_gateway"),
    ],
)
def test_what_no_engine_does_is_said(tmp_path: Path, act: Any, status: int, code: str | None) -> None:
    async def main() -> None:
        engine = ScriptedEngine(act)
        async with before(tmp_path, engine) as (_, origin):
            reader = await Reader(origin, body()).end()
            assert (reader.status, reader.over) == (status, "end")
            error = json.loads(reader.data)["error"]
            assert error["code"] == code, "the engine's own words have none"
            assert error["message"].startswith("engine says") == (code is None)
            assert engine.url not in error["message"]
            answer = await origin.fetch("POST", "/v1/chat/completions", body=body())
            assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert len(engine.seen) == 2 * (1 if status in (400, 404, 501, 505) else 4)

    asyncio.run(main())


def test_a_flex_client_hears_what_an_engine_said_in_the_middle_of_its_stream(tmp_path: Path) -> None:
    async def main() -> None:
        def fails(incoming: Incoming) -> None:
            incoming.start(200, SSE)
            incoming.write(chunk("one") + b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')
            incoming.finish()

        async with before(tmp_path, ScriptedEngine(fails)) as (_, origin):
            reader = await Reader(origin, body(service_tier="flex")).end()
            error = json.loads(reader.data)["error"]
            assert (reader.status, error["code"]) == (502, "bad_gateway")
            assert "out of memory" in error["message"]

    asyncio.run(main())


@pytest.mark.parametrize("tier", ["auto", "flex"])
@pytest.mark.parametrize("text", [b"", b"moved"])
def test_a_redirect_is_no_answer_and_its_target_does_not_reach_the_client(
    tmp_path: Path, tier: str, text: bytes
) -> None:
    async def main() -> None:
        def redirects(incoming: Incoming) -> None:
            incoming.respond(307, text, headers=[(b"location", b"https://127.0.0.1/")])

        engine = ScriptedEngine(redirects)
        async with before(tmp_path, engine) as (_, origin):
            answer = await origin.fetch("POST", "/v1/chat/completions", body=body(service_tier=tier))
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, "bad_gateway")
            assert b"307" in answer.body
            assert "location" not in answer.headers
        assert len(engine.seen) == 4

    asyncio.run(main())


def test_strange_headers_of_an_engine_do_not_reach_the_client(tmp_path: Path) -> None:
    async def main() -> None:
        def odd(incoming: Incoming) -> None:
            headers = [(b"upgrade", b"x"), (b"trailer", b"y"), (b"proxy-authenticate", b"z"), (b"x-engine", b"kept")]
            incoming.respond(200, b"{}", b"application/json", headers)

        async with before(tmp_path, ScriptedEngine(odd)) as (_, origin):
            answer = await origin.fetch("POST", "/v1/chat/completions", body=body())
            assert answer.headers["x-engine"] == "kept"
            assert not {"upgrade", "trailer", "proxy-authenticate"} & set(answer.headers)

    asyncio.run(main())


def test_the_whole_body_goes_to_the_engine_as_it_came(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(whole)
        async with before(tmp_path, engine, model='aliases = ["other"]') as (_, origin):
            sent = body(unheard_of={"a": [1, 2.5, None]}, seed=1)
            spaced = b" \n" + sent.replace(b": ", b" :\t")
            await Reader(origin, spaced).end()
            await Reader(origin, sent.replace(b'"m"', b'"other"')).end()
            deep = b'{"model":"other","messages":[{"role":"user","content":"x"}],"a":' + b"[" * 300 + b"]" * 300 + b"}"
            assert (await Reader(origin, deep).end()).status == 400
        assert engine.seen[0].body == spaced
        assert json.loads(engine.seen[1].body) == json.loads(sent)
        assert engine.seen[0].header(b"authorization") is None
        assert len(engine.seen) == 2

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_at_once(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine) as (service, origin):
            readers = [Reader(origin, body(stream=stream)) for _ in range(6)]
            await until(lambda: len(engine.seen) == 4, "four run")
            for incoming in engine.seen if stream else ():
                incoming.start(200, SSE)
                incoming.write(chunk("one"))
            state = service.plane.models["m"]
            assert state.waiting.count == 2
            for reader in (readers[0], readers[5]):  # One runs, the other waits.
                reader.call.cancel()
            await until(lambda: len(engine.left) == 1 and len(engine.seen) == 5, "one left and the next one is there")
            assert state.waiting.count == 0
            for incoming in engine.seen:
                if not incoming.closed and not incoming.started:
                    whole(incoming)
                elif not incoming.closed:
                    incoming.write(b"data: [DONE]\n\n")
                    incoming.finish()
            await until(lambda: not service.desk.open, "all have ended")
            assert [reader.over for reader in readers] == ["", "end", "end", "end", "end", ""]

    asyncio.run(main())


@pytest.mark.parametrize("patient", [True, False])
def test_limits_on_waiting(tmp_path: Path, patient: bool) -> None:
    async def main() -> None:
        wait = "10m" if patient else "1s"
        limits = f'[limits]\nqueue_max = 2\nqueue_wait_max = "{wait}"\nretry_after = "3s"\n'
        engine = ScriptedEngine()
        async with before(tmp_path, engine, extra=limits) as (service, origin):
            readers = [Reader(origin, body(stream=number % 2 == 1)) for number in range(6)]
            if patient:
                await until(lambda: len(service.desk.open) == 6, "six are there")
                refused = await origin.fetch("POST", "/v1/chat/completions", body=body())
                assert (refused.status, refused.headers["retry-after"]) == (429, "3")
                assert json.loads(refused.body)["error"]["code"] == "rate_limit_exceeded"
                return
            for reader in readers[4:]:
                await reader.end()
                assert (reader.status, json.loads(reader.data)["error"]["code"]) == (503, "service_unavailable")
            assert len(engine.seen) == 4
            for incoming in engine.seen:
                whole(incoming)
            for reader in readers[:4]:
                assert (await reader.end()).status == 200

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["chiron", "hpa-queue"])
def test_without_an_engine_each_kind_of_client_has_its_limit_under_any_policy(tmp_path: Path, policy: str) -> None:
    model = f'policy = "{policy}"\n[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:PORT"]\n'
    # It says neither that it can serve nor that it cannot: clients wait.
    model += '[limits]\nqueue_max = 2\n[fleet.health]\nhealth_timeout = "10m"\n'

    async def main() -> None:
        silent = await serve(lambda incoming: None)
        async with serving(tmp_path, model.replace("PORT", str(silent.port))) as service:
            origin = Origin(service.url)
            waiting = [Reader(origin, body(service_tier=tier)) for tier in ("flex", "default") * 2]
            await until(lambda: len(service.desk.open) == len(waiting), "four wait")
            for tier, kind in (("flex", "requests of the batch class"), ("default", "requests")):
                refused = await origin.fetch("POST", "/v1/chat/completions", body=body(service_tier=tier))
                assert refused.status == 429
                assert json.loads(refused.body)["error"]["message"].startswith(f"2 {kind} wait for 'm'")
            await origin.close()
        await silent.close(0.0)

    asyncio.run(main())


def test_items_of_batches_do_not_use_up_the_clients_limit_on_waiting(tmp_path: Path) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": request} for n in range(6)]
    part = b'--x\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    text = "\n".join(map(json.dumps, lines)).encode()
    form = part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="f"', text) + b"--x--\r\n"

    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, extra="[limits]\nqueue_max = 2\n") as (service, origin):
            busy = [Reader(origin, body()) for _ in range(4)]
            await until(lambda: len(engine.seen) == len(busy), "the engine is full")
            kind = {"content-type": "multipart/form-data; boundary=x"}
            file = json.loads((await origin.fetch("POST", "/v1/files", body=form, headers=kind)).body)
            job = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "1h"}
            assert (await origin.fetch("POST", "/v1/batches", body=json.dumps(job).encode())).status == 200
            state = service.plane.models["m"]
            await until(lambda: state.waiting.count + state.batch.count == len(lines), "its items wait")
            clients = [Reader(origin, body(service_tier=tier)) for tier in ("flex", "default") * 2]
            await until(lambda: state.waiting.count + state.batch.count == len(lines) + len(clients), "so do clients")
            refused = await origin.fetch("POST", "/v1/chat/completions", body=body(service_tier="flex"))
            assert refused.status == 429
            assert json.loads(refused.body)["error"]["message"].startswith("2 requests of the batch class wait for 'm'")
            refused = await origin.fetch("POST", "/v1/chat/completions", body=body())
            assert refused.status == 429
            assert json.loads(refused.body)["error"]["message"].startswith("2 requests wait for 'm'")

    asyncio.run(main())


def test_the_limit_on_waiting_also_holds_for_who_lost_its_engine(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, extra='[limits]\nqueue_wait_max = "1s"\n') as (_, origin):
            reader = Reader(origin, body())
            await until(lambda: engine.seen, "it runs")
            await engine.server.close(0.0)
            await reader.end()
            assert (reader.status, json.loads(reader.data)["error"]["code"]) == (503, "service_unavailable")

    asyncio.run(main())


def test_a_request_that_takes_too_long_is_504_or_an_error_event_and_its_engine_is_told(tmp_path: Path) -> None:
    def begins(incoming: Incoming) -> None:
        if json.loads(incoming.body).get("stream"):
            incoming.start(200, SSE)
            incoming.write(chunk("one"))

    async def main() -> None:
        engine = ScriptedEngine(begins)
        async with before(tmp_path, engine, extra='[limits]\nrequest_timeout = "2s"\n') as (service, origin):
            plain = Reader(origin, body())
            await plain.end()
            assert (plain.status, json.loads(plain.data)["error"]["code"]) == (504, "timeout")
            for _ in range(5):  # Again if the machine stalled for all of the time, and nothing had begun.
                stream = Reader(origin, body(stream=True))
                await stream.end()
                if stream.status == 200:
                    break
            assert (stream.status, stream.error["type"], b"one" in stream.data) == (200, "timeout_error", True)
            await until(lambda: len(engine.left) == len(engine.seen) > 1, "the engine is free")
            assert not service.desk.open

    asyncio.run(main())


def test_a_client_that_does_not_read_holds_its_engine_back(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine) as (service, origin):
            reader = Reader(origin, body(stream=True))
            await until(lambda: engine.seen, "it runs")
            incoming = engine.seen[0]
            incoming.start(200, SSE)
            reader.call.pause()
            written, event = 0, chunk("x" * 60_000)
            paused: list[bool] = []
            incoming.on_pause = lambda: paused.append(True)
            while not paused:
                incoming.write(event)
                written += len(event)
                await asyncio.sleep(0)
                assert written < 64 << 20, "it all goes into memory"
            (connection,) = (c for c in service._server.connections if c._serving is not None)  # type: ignore[union-attr]
            assert connection._transport.get_write_buffer_size() < 2 << 20
            reader.call.resume()
            incoming.finish()
            await reader.end()
            assert len(reader.data) == written

    asyncio.run(main())


def test_tokens_in_the_metrics_are_those_of_the_usage(tmp_path: Path) -> None:
    async def main() -> None:
        def acts(incoming: Incoming) -> None:
            asked = json.loads(incoming.body)
            if not asked.get("stream"):
                whole(incoming)
                return
            incoming.start(200, SSE)
            role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            incoming.write(chunk("", **role) + chunk("data: data: {") + chunk('"completion_tokens": 99'))
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            incoming.write(chunk("three") + chunk("", **last))
            if (asked.get("stream_options") or {}).get("include_usage"):
                incoming.write(chunk("", choices=[], usage={"prompt_tokens": 3, "completion_tokens": 30}))
            incoming.write(b"data: [DONE]\n\n")
            incoming.finish()

        async with before(tmp_path, ScriptedEngine(acts)) as (_, origin):

            async def tokens() -> tuple[float, float]:
                page = parse_metrics((await origin.fetch("GET", "/metrics")).body.decode())
                return page["chiron_prompt_tokens_total"], page["chiron_generation_tokens_total"]

            await Reader(origin, body()).end()
            assert await tokens() == (3, 7)
            await Reader(origin, body(stream=True)).end()
            guess, made = await tokens()
            assert made == 7 + 3
            assert guess > 3  # Without usage the prompt has the length that was guessed.
            await Reader(origin, body(stream=True, stream_options={"include_usage": True})).end()
            assert await tokens() == (guess + 3, 7 + 3 + 30)
        ended = [line for line in read_event_log(tmp_path / "chiron-data" / "events.jsonl") if line["event"] == "ended"]
        assert [(line["input_tokens"], line["output_tokens"]) for line in ended] == [(3, 7), (guess - 3, 3), (3, 30)]

    asyncio.run(main())


def test_a_client_that_cannot_be_told_is_cut_off_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        def acts(incoming: Incoming) -> None:
            incoming.start(200, SSE)
            incoming.write(chunk("fine") + b"data: [DONE]\n\n")
            incoming.finish()

        def fails(*_: Any) -> None:
            raise RuntimeError("a mistake of ours")

        async with before(tmp_path, ScriptedEngine(acts)) as (service, origin):
            service.desk.ended = fails  # type: ignore[method-assign]
            reader = await Reader(origin, body(service_tier="flex")).end()
            assert (reader.status, reader.over) == (0, "ConnectionLostError")

    asyncio.run(main())


def test_flex_waits_for_room_and_comes_in_one_piece(tmp_path: Path) -> None:
    async def main() -> None:
        def acts(incoming: Incoming) -> None:
            incoming.start(200, SSE)
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
            incoming.write(chunk("fi") + chunk("ne") + chunk("", **last) + chunk("", choices=[], usage=usage))
            incoming.write(b"data: [DONE]\n\n")
            incoming.finish()

        engine = ScriptedEngine(acts)
        async with before(tmp_path, engine) as (_, origin):
            plain = await Reader(origin, body(service_tier="flex")).end()
            answer = json.loads(plain.data)
            assert (answer["choices"][0]["message"]["content"], answer["service_tier"]) == ("fine", "flex")
            assert answer["usage"]["completion_tokens"] == 2
            stream = await Reader(origin, body(service_tier="flex", stream=True)).end()
            assert stream.data.count(b"data: ") == 2
            assert stream.data.endswith(b"data: [DONE]\n\n")
            assert b"usage" not in stream.data
            for options in ("x", [1], 5):
                odd = await Reader(origin, body(service_tier="flex", stream=True, stream_options=options)).end()
                assert (odd.status, json.loads(odd.data)["error"]["param"]) == (400, "stream_options")
        assert all(json.loads(incoming.body)["stream"] for incoming in engine.seen)

    asyncio.run(main())


def test_an_engine_that_knows_no_such_model_or_route_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(refuses(404))) as (_, origin):
            for _ in range(3):
                assert (await origin.fetch("POST", "/v1/chat/completions", body=body())).status == 404

    asyncio.run(main())
    (said,) = [record.getMessage() for record in caplog.records if "answers 404" in record.getMessage()]
    assert "served_model_name" in said
    assert "Chiron adds /v1" in said


def test_a_batch_says_what_tokens_it_took(tmp_path: Path) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": request} for n in range(4)]
    part = b'--x\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    text = "\n".join(map(json.dumps, lines)).encode()
    form = part % (b"purpose", b"", b"batch") + part % (b"file", b'; filename="f"', text) + b"--x--\r\n"
    answered = []

    def act(incoming: Incoming) -> None:
        answered.append(incoming)
        if len(answered) == 4:
            incoming.respond(400, b'{"error": {"message": "no"}}')
            return
        details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 99}}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, **details}
        end = chunk("", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        incoming.start(200, SSE)
        incoming.write(chunk("one") + end + chunk("", choices=[], usage=usage) + b"data: [DONE]\n\n")
        incoming.finish()

    async def main() -> dict[str, Any]:
        async with before(tmp_path, ScriptedEngine(act)) as (_, origin):
            kind = {"content-type": "multipart/form-data; boundary=x"}
            file = json.loads((await origin.fetch("POST", "/v1/files", body=form, headers=kind)).body)
            job = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "1h"}
            batch = json.loads((await origin.fetch("POST", "/v1/batches", body=json.dumps(job).encode())).body)
            assert batch["usage"]["total_tokens"] == 0
            while batch["status"] != "completed":
                await asyncio.sleep(0.05)
                batch = json.loads((await origin.fetch("GET", f"/v1/batches/{batch['id']}")).body)
            found: dict[str, Any] = batch
            return found

    batch = asyncio.run(main())
    assert (batch["request_counts"]["completed"], batch["request_counts"]["failed"]) == (3, 1)
    assert Batch.model_validate(batch).usage is not None
    assert batch["usage"] == {
        "input_tokens": 15,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 9},
        "total_tokens": 24,
    }
