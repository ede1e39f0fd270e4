"""A stage without a replica: the head says so, requests wait for it, but not for ever."""

from __future__ import annotations

import asyncio
import json
import struct
from contextlib import suppress

import msgspec

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged.messages import MAGIC, VERSION, HeadHello, StageHello, Step, StepEntry  # noqa: E402
from chiron.engines.staged.pipeline import PipelineSettings  # noqa: E402
from chiron.engines.staged.service import Pace  # noqa: E402
from staged_site import PATIENT, WAIT_S, staged_site, until  # noqa: E402

TOKENS = 8
PROMPT = prompts(3, seed=0)[0]
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS}


def frame(message: msgspec.Struct, body: bytes = b"") -> bytes:
    header = msgspec.msgpack.encode(message)
    return struct.pack("<II", len(header), len(body)) + header + body


def test_requests_wait_for_a_stage_for_a_bounded_time() -> None:
    async def main() -> None:
        brief = PipelineSettings(link=PATIENT, absent_s=0.2)
        async with staged_site(tiny(), ("0-1", "2-3"), replicas=(1, 0), pipeline=brief) as site:
            status, said = await site.post("/health", {}, "GET")
            assert (status, json.loads(said)["error"]["code"]) == (503, "stages")
            assert b"no replica of layers 2-3 is ready" in said
            async with asyncio.timeout(WAIT_S):
                status, said = await site.post("/v1/completions", BODY)
            assert (status, json.loads(said)["error"]["code"]) == (503, "stages")
            last = await site.add(1, pace=Pace(fixed_s=0.01))
            site.tell()
            await until(lambda: not site.engine.unready())
            assert (await site.post("/health", {}, "GET"))[0] == 200
            asking = asyncio.ensure_future(site.complete(PROMPT, 1500))
            await until(lambda: last.service.totals.steps > 2)
            await last.die()
            with suppress(AssertionError):
                await asking
            assert not site.engine.pipeline.running
            assert (await site.post("/health", {}, "GET"))[0] == 503

    asyncio.run(main())


def test_a_pipeline_that_lost_a_replica_is_healthy_while_requests_wait_for_the_next() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3")) as site:
            await until(lambda: site.engine.pipeline._complete)
            await site.replicas[1].pop().die()
            await until(lambda: site.engine.pipeline.losses == 1)
            asking = asyncio.ensure_future(site.complete(PROMPT, TOKENS))
            await until(lambda: site.engine.limits()["waiting"] == 1)
            assert (await site.post("/health", {}, "GET"))[0] == 200
            await site.add(1)
            site.tell()
            assert await asking == recorded("llama")[0][:TOKENS]

    asyncio.run(main())


def test_sequences_leave_a_draining_replica_once_there_is_another_one() -> None:
    async def main() -> None:
        quick = PipelineSettings(link=PATIENT, drain_s=0.0)
        async with staged_site(tiny(), ("0-1", "2-3"), pipeline=quick, pace=Pace(fixed_s=0.004)) as site:
            old = site.replicas[1].pop()
            asking = asyncio.ensure_future(site.complete(PROMPT, 150))
            await until(lambda: old.service.totals.steps > 2)
            site.tell()
            (replica,) = site.engine.pipeline.replicas[1]
            await until(lambda: replica.overdue)
            assert replica.sequences
            await site.add(1)
            site.tell()
            await until(lambda: not replica.sequences)
            assert not asking.done()
            assert (await asking)[:24] == recorded("llama")[0]

    asyncio.run(main())


def test_a_broken_frame_behind_the_hello_leaves_no_replica_that_looks_up() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(0,)) as site:
            hello = StageHello(VERSION, site.files.fingerprint, 0, 4, "float32", 1000, 1000, 64, False, 512)
            connections = 0

            async def stage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                nonlocal connections
                connections += 1
                await reader.read(1)
                writer.write(frame(hello) + struct.pack("<II", 1, 0) + b"\xc1")
                await reader.read()
                writer.close()

            server = await asyncio.start_server(stage, "127.0.0.1", 0)
            site.engine.pipeline.set_replicas([[f"127.0.0.1:{server.sockets[0].getsockname()[1]}"]])
            (replica,) = site.engine.pipeline.replicas[0]
            await until(lambda: connections > 2)
            assert not replica.up
            assert "it broke the protocol" in replica.trouble
            assert site.engine.pipeline.losses == 0
            site.engine.pipeline.set_replicas([[]])
            await until(lambda: not site.engine.pipeline.replicas[0])
            server.close()

    asyncio.run(main())


def test_a_stage_frees_what_a_silent_head_holds() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), silent_s=0.5) as site:
            service = site.replicas[0][0].service
            host, _, port = site.replicas[0][0].address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            hello = HeadHello(VERSION, site.files.fingerprint, 0, 4, "float32")
            step = Step(1, [StepEntry(7, 0, 2, 1)])
            writer.write(MAGIC + frame(hello) + frame(step, struct.pack("<ii", 1, 2)))
            await until(lambda: service.kv.sequences == 1)
            async with asyncio.timeout(WAIT_S):
                await reader.read()
            await until(lambda: service.kv.sequences == 0)
            assert service.heads == 1, "the one that asks again and again"
            writer.close()

    asyncio.run(main())
