"""A replica that does not keep what it was sent: the sequence goes elsewhere, or its client is told."""

from __future__ import annotations

import asyncio
import json

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged.kv import Entry, KvStore  # noqa: E402
from chiron.engines.staged.pipeline import PipelineSettings  # noqa: E402
from staged_site import PATIENT, WAIT_S, LocalReplica, staged_site, until  # noqa: E402

TOKENS = 6
PROMPT = prompts(3, seed=0)[0]
CHUNKS = PipelineSettings(link=PATIENT, max_num_batched_tokens=16)


class ForgetfulKv(KvStore):
    """It holds nothing from one step to the next."""

    def reserve(self, entry: Entry) -> str:
        self.free([entry.key])
        return super().reserve(entry)


class FatalKv(KvStore):
    """A step with more than eight tokens of a sequence fails."""

    def reserve(self, entry: Entry) -> str:
        if entry.count > 8:
            raise ValueError("more than eight tokens")
        return super().reserve(entry)


def give(replica: LocalReplica, kv: type[KvStore]) -> None:
    layers = replica.service.layers
    replica.service.kv = kv(
        layers.architecture, len(layers.stage), capacity_tokens=50_000, dtype=layers.dtype, device="cpu"
    )


def test_another_replica_goes_on_with_it() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), replicas=(1, 2), pipeline=CHUNKS) as site:
            bad = min(site.replicas[1], key=lambda each: each.address)  # The one that is chosen first.
            give(bad, ForgetfulKv)
            assert len(PROMPT) > 16, "more than one chunk"
            await until(lambda: all(each.up for each in site.engine.pipeline.replicas[1]))
            async with asyncio.timeout(WAIT_S):
                assert await site.complete(PROMPT, TOKENS) == recorded("llama")[0][:TOKENS]
            assert 3 <= bad.service.totals.refused <= 6  # A second call may have been under way each time.

    asyncio.run(main())


def test_without_another_one_the_client_is_told() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), pipeline=CHUNKS) as site:
            give(site.replicas[1][0], ForgetfulKv)
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS}
            async with asyncio.timeout(WAIT_S):
                status, said = await site.post("/v1/completions", body)
            assert (status, json.loads(said)["error"]["code"]) == (503, "stages")
            assert site.replicas[1][0].service.totals.refused <= 18
            assert not site.engine.pipeline.running
            short = await site.complete(PROMPT[:8], 1)  # What it can do it still does.
            assert len(short) == 1

    asyncio.run(main())


def test_a_request_that_ends_every_replica_is_given_up() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), pipeline=CHUNKS) as site:
            give(site.replicas[1][0], FatalKv)
            async with asyncio.timeout(WAIT_S):
                status, said = await site.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 2})
            assert (status, json.loads(said)["error"]["code"]) == (503, "stages")
            assert site.engine.pipeline.losses == 9
            async with asyncio.timeout(WAIT_S):
                assert len(await site.complete(PROMPT[:8], 2)) == 2

    asyncio.run(main())
