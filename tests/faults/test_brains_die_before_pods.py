"""A gateway before pods whose brain is killed: its next one counts what runs on them, so that none has too much."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chiron.fleet.kubernetes.testing.kubelet import Container
from chiron.net.server import Incoming, serve
from fault_site import Api, FaultSite, chat
from gateway_pair import Pair, until_ready
from kubernetes_site import PORT, LoopContainer, cluster, workload

pytestmark = pytest.mark.slow
SLOTS, PODS, STREAM_S, CHUNKS = 3, 2, 12.0, 400


class Engines:
    """Of all pods: streams of some seconds, and how many run at a time."""

    def __init__(self) -> None:
        self.running = Counter[str]()
        self.most = 0

    async def run(self, pod: Mapping[str, Any], address: str) -> Container:
        def handle(incoming: Incoming) -> None:
            if incoming.method != b"POST":
                incoming.respond(200, b"{}")
                return
            self.running[address] += 1
            self.most = max(self.most, self.running[address])
            incoming.start(200, [(b"content-type", b"text/event-stream")])
            loop = asyncio.get_running_loop()

            def over() -> None:
                self.running[address] -= 1
                incoming.on_close = None

            def write(number: int) -> None:
                if incoming.closed:
                    return
                if number == CHUNKS:
                    usage = {"prompt_tokens": 1, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 1}
                    incoming.write(
                        b"data: " + json.dumps({"id": "c", "choices": [], "usage": usage}).encode() + b"\n\n"
                    )
                    incoming.write(b"data: [DONE]\n\n")
                    over()
                    incoming.finish()
                    return
                finish = "stop" if number == CHUNKS - 1 else None
                choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": finish}
                head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
                incoming.write(b"data: " + json.dumps(head).encode() + b"\n\n")
                loop.call_later(STREAM_S / CHUNKS, write, number + 1)

            incoming.on_close = over
            write(0)

        return LoopContainer(await serve(handle, host=address, port=PORT))


def test_no_pod_runs_more_than_it_may_and_every_stream_is_whole(tmp_path: Path) -> None:
    engines = Engines()

    async def counted(site: FaultSite) -> dict[int, int]:
        """What runs, by instance."""
        async with Api(site.url) as api:
            status = await api.get("/chiron/status")
        (model,) = status["models"]
        return {each["id"]: each["running_interactive"] for each in model["instances"]}

    async def main(site: FaultSite) -> None:
        pair = Pair({"one": site})
        await until_ready(pair, "one")
        async with Api(site.url) as api, asyncio.timeout(300):
            full = SLOTS * PODS
            answers = [asyncio.create_task(pair.ask(api, "one", chat(f"{number}", CHUNKS))) for number in range(full)]
            while engines.running.total() < full:
                await asyncio.sleep(0.05)
            before = await counted(site)
            assert sum(before.values()) == full
            _, brain = await asyncio.to_thread(pair.leader)
            brain.kill()
            later = [
                asyncio.create_task(pair.ask(api, "one", chat(f"later {number}", CHUNKS))) for number in range(full)
            ]
            await asyncio.to_thread(pair.leader, brain)
            await until_ready(pair, "one")
            after = await counted(site)
            assert after == before or engines.running.total() < full, "the same instances, with the same streams"
            for answer in await asyncio.gather(*answers, *later):
                assert answer.verdict == "complete"
        assert engines.most == SLOTS

    def run(kubeconfig: Path) -> None:
        text = f"""
[relays]
fall_back = "60s"
hold = "60s"
[models.m]
engine = "openai"
min_instances = {PODS}
max_instances = {PODS}
max_num_seqs = {SLOTS}
[models.m.kubernetes]
deployment = "engine"
port = {PORT}
kubeconfig = "{kubeconfig}"
"""
        with FaultSite(tmp_path, text, "--workers", "2") as site:
            asyncio.run(main(site))

    async def story() -> None:
        async with cluster("fake", tmp_path / "cluster", run=engines.run) as here:
            await here.apply(workload(replicas=PODS))
            await here.until_ready(PODS)
            await asyncio.to_thread(run, here.kubeconfig)

    (tmp_path / "cluster").mkdir()
    asyncio.run(story())
