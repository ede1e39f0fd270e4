"""A gateway in front of which relays take requests: to clients it is one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from chiron.engines.metrics import parse_metrics
from chiron.gateway.relay.keys import hash_secret
from chiron.net.client import Origin
from chiron.net.server import Incoming
from live_gateway import RELAYS, until
from scripted_engine import CHAT, SSE, Reader, ScriptedEngine, before, body, chunk

PATH = CHAT.decode()
STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
DONE = b"data: [DONE]\n\n"
KEYS = f"""
[[keys]]
name = "a"
hash = "{hash_secret(b"secret")}"
requests_per_minute = 3
"""
FORM = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\nContent-Disposition: form-data; '
JSONL = b'{"line": "' + b"y" * 300_000 + b'"}\n'


def upload() -> bytes:
    return FORM + b'name="file"; filename="f.jsonl"\r\n\r\n' + JSONL + b"\r\n--x--\r\n"


def test_limits_hold_over_all_relays(tmp_path: Path) -> None:
    """Each request comes on a connection of its own, so that any relay may get it."""

    async def main() -> None:
        answers = []
        engine = ScriptedEngine(lambda incoming: incoming.respond(200, b"{}"))
        async with before(tmp_path, engine, extra=KEYS, relays=3) as (service, _):
            for _ in range(5):
                origin = Origin(service.url, keepalive=False, connect_timeout_s=60.0)
                headers = {"authorization": "Bearer secret"}
                answers.append(await origin.fetch("POST", PATH, body=body(), headers=headers, timeout_s=60.0))
                await origin.close()
        assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
        assert "3 requests per minute" in json.loads(answers[-1].body)["error"]["message"]

    asyncio.run(main())


def test_what_is_no_completion_reaches_the_brain(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(lambda incoming: incoming.respond(200, b"{}"))
        async with before(tmp_path, engine, relays=2) as (service, origin):
            form = {"content-type": "multipart/form-data; boundary=x"}
            file = json.loads((await origin.fetch("POST", "/v1/files", body=upload(), headers=form)).body)
            content = await origin.fetch("GET", f"/v1/files/{file['id']}/content")
            assert content.body == JSONL
            models = json.loads((await origin.fetch("GET", "/v1/models")).body)
            assert [model["id"] for model in models["data"]] == ["m"]
            assert (await origin.fetch("HEAD", "/health")).status in (200, 405)
            assert (await origin.fetch("GET", "/nothing")).status == 404
            page = {"sec-fetch-site": "cross-site"}
            assert (await origin.fetch("GET", "/v1/models", headers=page)).status == 403

            assert (await origin.fetch("POST", PATH, body=body())).status == 200
            assert (await origin.fetch("POST", PATH, body=b"{")).status == 400

            async def counted() -> dict[str, float]:
                page = parse_metrics((await origin.fetch("GET", "/metrics")).body.decode())
                return {key: value for key, value in page.items() if "http_responses" in key or "relays" in key}

            end_s = asyncio.get_running_loop().time() + 60.0
            while sum(counts := [v for k, v in (await counted()).items() if "responses" in k]) < 2:
                assert asyncio.get_running_loop().time() < end_s, counts
                await asyncio.sleep(0.05)
            status = json.loads((await origin.fetch("GET", "/chiron/status")).body)
            assert len(status["relays"]) == 2

            await origin.fetch("POST", "/chiron/drain")
            refused = await origin.fetch("POST", PATH, body=body())
            assert (refused.status, service.plane.open_requests) == (503, 0)

    asyncio.run(main())


def streams(count: int, url: str) -> list[tuple[Origin, Reader]]:
    found = []
    for _ in range(count):
        origin = Origin(url, connect_timeout_s=60.0)
        found.append((origin, Reader(origin, body(stream=True))))
    return found


def test_a_relay_that_dies_takes_its_own_requests_with_it_and_no_others(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, relays=2, model="max_instances = 1") as (service, _):
            relays = RELAYS[tmp_path]
            dying, other = relays.running
            clients: list[tuple[Origin, Reader]] = []
            while not (dying.relay.uplink.held and other.relay.uplink.held and len(clients) >= 5):
                clients += streams(1, service.url)
                count = len(clients)
                await until(lambda: len(service.desk.open) == count, "it is there")  # noqa: B023
            await until(lambda: len(engine.seen) == 4, "four run")
            for incoming in engine.seen:
                incoming.start(200, SSE)
                incoming.write(chunk("one"))
            await until(lambda: sum(bool(reader.data) for _, reader in clients) == 4, "four have a token")
            lives = len(other.relay.uplink.held)
            relays.die(dying)
            await until(lambda: len(service.desk.open) == lives, "its requests are over")
            await until(lambda: len(relays.running) == 2 and len(service.gateway.relays.links) == 2, "another is there")
            await until(_all_run(service, lives), "what waited has the places")
            there = min(4, lives)
            await until(lambda: sum(not each.closed for each in engine.seen) == there, "the engine has those alone")

            def answer(incoming: Incoming) -> None:
                if not incoming.closed:
                    if not incoming.started:
                        incoming.start(200, SSE)
                    incoming.write(chunk("two") + DONE)
                    incoming.finish()

            engine.act = answer  # Of those that had no place yet: the kernel may have given one relay nearly all.
            for incoming in list(engine.seen):
                answer(incoming)
            await until(lambda: not service.desk.open, "all are over")
            whole = [reader for _, reader in clients if reader.data.endswith(DONE)]
            assert len(whole) == lives
            (live,) = service.engines.live.values()
            assert (live.runs, live.observer.inside, live.instance.sequences) == ({}, 0, 0)
            assert live.instance.requests == live.instance.evicting == {}
            for origin, _ in clients:
                await origin.close()

    asyncio.run(main())


def items(count: int) -> bytes:
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [{"custom_id": str(i), "method": "POST", "url": PATH, "body": asked} for i in range(count)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_batch_items_run_on_relays_and_again_where_one_dies(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, relays=2, model="max_instances = 1") as (service, _):
            relays = RELAYS[tmp_path]
            origin = Origin(service.url, keepalive=False, connect_timeout_s=60.0)
            form = {"content-type": "multipart/form-data; boundary=x"}
            data = FORM + b'name="file"; filename="f.jsonl"\r\n\r\n' + items(8) + b"\r\n--x--\r\n"
            file = json.loads((await origin.fetch("POST", "/v1/files", body=data, headers=form)).body)["id"]
            job = {"input_file_id": file, "endpoint": PATH, "completion_window": "24h"}
            asked = json.dumps(job).encode()
            header = {"content-type": "application/json"}
            batch = json.loads((await origin.fetch("POST", "/v1/batches", body=asked, headers=header)).body)
            await until(lambda: len(engine.seen) == 4, "four run")
            assert not any(upstream.runs for upstream in service.engines._upstreams.values()), "none in the brain"
            dying = max(relays.running, key=lambda relay: len(relay.relay.uplink.runs))
            mine = len(dying.relay.uplink.runs)
            assert mine > 0
            relays.die(dying)
            await until(lambda: len(engine.left) == mine, "its items were stopped")
            done = 0
            answered: set[int] = set()

            def answer() -> bool:
                nonlocal done
                for incoming in engine.seen:
                    if not incoming.closed and id(incoming) not in answered:
                        answered.add(id(incoming))
                        incoming.start(200, SSE)
                        incoming.write(chunk("fine") + chunk("", choices=[STOP]) + DONE)
                        incoming.finish()
                        done += 1
                return done == 8

            await until(answer, "each item is answered once")

            async def ended() -> dict[str, object]:
                found: dict[str, object] = json.loads((await origin.fetch("GET", f"/v1/batches/{batch['id']}")).body)
                return found

            end_s = asyncio.get_running_loop().time() + 60.0
            while (found := await ended())["status"] != "completed":
                assert asyncio.get_running_loop().time() < end_s, found
                await asyncio.sleep(0.05)
            assert found["request_counts"] == {"total": 8, "completed": 8, "failed": 0}
            lines = (await origin.fetch("GET", f"/v1/files/{found['output_file_id']}/content")).body.splitlines()
            results = [json.loads(line) for line in lines]
            assert sorted(int(result["custom_id"]) for result in results) == list(range(8))
            bodies = [result["response"]["body"] for result in results]
            assert all(body["choices"][0]["message"]["content"] == "fine" for body in bodies)
            await until(lambda: not any(relay.relay.uplink.held for relay in relays.running), "nothing is held")
            assert not any(link.items or link.runs for link in service.gateway.relays.links)
            await origin.close()

    asyncio.run(main())


def _all_run(service: object, count: int) -> Callable[[], bool]:
    def found() -> bool:
        (live,) = service.engines.live.values()  # type: ignore[attr-defined]
        return len(live.runs) == min(4, count)

    return found
