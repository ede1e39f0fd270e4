"""A head and stages on real sockets: many sequences at once, replicas that come, go and die."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged import service  # noqa: E402
from chiron.engines.staged.head_engine import HeadSettings  # noqa: E402
from chiron.engines.staged.messages import Ping  # noqa: E402
from chiron.engines.staged.micro_batches import StageTimes, micro_batches  # noqa: E402
from chiron.engines.staged.pipeline import PipelineSettings  # noqa: E402
from chiron.engines.staged.sequence import Sequence  # noqa: E402
from chiron.engines.staged.service import Pace  # noqa: E402
from chiron.engines.staged.stage import StageHttp  # noqa: E402
from staged_site import PATIENT, StagedSite, staged_site, start_replica, until  # noqa: E402

TOKENS = 12
GIVEN = prompts(3, seed=0)
SPLIT = ("0-0", "1-2", "3-3")


async def ask_all(site: StagedSite, times: int = 1) -> None:
    """All prompts at once; each is answered as transformers would."""
    answers = await asyncio.gather(*(site.complete(prompt, TOKENS) for prompt in GIVEN * times))
    assert answers == [tokens[:TOKENS] for tokens in recorded("llama")] * times


class Nobody:
    """Sequences of it run no step."""

    def token(self, logits: memoryview, ids: memoryview, mass: float) -> int | None:
        raise AssertionError

    def preempted(self) -> None:
        raise AssertionError

    def failed(self, why: str) -> None:
        raise AssertionError(why)


def placed(site: StagedSite, count: int) -> set[str]:
    """The first stage's replicas that so many new sequences would go through."""
    pipeline = site.engine.pipeline
    new = [Sequence(id=10_000 + i, tokens=[1], want=1, listener=Nobody()) for i in range(count)]
    assert all(pipeline.add(sequence) for sequence in new)
    found = {sequence.path[0].address for sequence in new if sequence.path[0] is not None}
    for sequence in new:
        pipeline.remove(sequence)
    return found


def test_many_sequences_are_answered_as_transformers_would() -> None:
    async def main() -> None:
        small = PipelineSettings(link=PATIENT, max_num_batched_tokens=16, micro_batches=3)
        async with staged_site(tiny(), SPLIT, replicas=(1, 2, 1), pipeline=small) as site:
            await ask_all(site, 2)
            assert all(replica.service.totals.steps for replica in site.replicas[1])
            await until(lambda: not any(r.service.kv.sequences for rs in site.replicas for r in rs))

    asyncio.run(main())


def test_the_time_of_a_step_is_taken_once_its_result_has_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it is what waits for a GPU."""
    whole = service._body
    threads = set()

    def slow(answer: Any) -> list[memoryview]:
        threads.add(threading.current_thread())
        time.sleep(0.02)
        return whole(answer)

    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3")) as site:
            await site.complete([1, 2, 3], 4)
            for (replica,) in site.replicas:
                totals = replica.service.totals
                assert totals.busy_s >= 0.02 * totals.steps > 0.0

    monkeypatch.setattr(service, "_body", slow)
    asyncio.run(main())
    assert threading.main_thread() not in threads, "pings would not be answered meanwhile"


def test_greedy_and_sampled_requests_share_steps_and_the_limit_falls_meanwhile() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pace=Pace(fixed_s=0.004)) as site:
            sampled = [site.complete(prompt, TOKENS, temperature=1, seed=1) for prompt in GIVEN]
            asking = asyncio.gather(ask_all(site, 2), *sampled)
            last = site.replicas[2][0].service
            await until(lambda: last.totals.steps > 4)
            last.limit = 1
            async with asyncio.timeout(60.0):
                await asking
            assert site.engine.pipeline.losses == 0

    asyncio.run(main())


def test_a_request_with_penalties_costs_the_others_no_vocabulary() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), pace=Pace(fixed_s=0.004)) as site:
            service, vocabulary = site.replicas[0][0].service, site.files.architecture.vocabulary
            penalised = site.complete(GIVEN[0], TOKENS, frequency_penalty=0.5)
            await asyncio.gather(penalised, *(site.complete(GIVEN[1], TOKENS) for _ in range(8)))
            assert service.totals.steps < 9 * TOKENS, "they shared steps"
            greedy, all_of_it = 8 * TOKENS * 12, TOKENS * (8 * vocabulary + 4)
            assert service.totals.sent_bytes == greedy + all_of_it

    asyncio.run(main())


@pytest.mark.slow
def test_a_micro_batch_goes_to_one_replica_of_the_stage_that_has_most() -> None:
    async def main() -> None:
        several = PipelineSettings(link=PATIENT, micro_batches=2)
        async with staged_site(tiny(), SPLIT, replicas=(1, 2, 1), pipeline=several, pace=Pace(fixed_s=0.004)) as site:
            await asyncio.gather(*(site.complete(GIVEN[0], 48) for _ in range(8)))
            totals = [replica.service.totals for replica in site.replicas[1]]
            assert [each.sequences for each in totals] == [4 * (48)] * 2, "four sequences each"
            # Of two micro-batches either replica has one whole, with four sequences, and not halves of both.
            assert all(each.sequences / each.calls > 3 for each in totals)

    asyncio.run(main())


def test_micro_batches_are_a_multiple_of_the_replicas() -> None:
    even = StageTimes(fixed_s=0.01, sequence_s=0.0, hop_s=0.001, replicas=1)
    slow = StageTimes(fixed_s=0.02, sequence_s=0.005, hop_s=0.001, replicas=3)
    assert micro_batches([even, slow, even, even], 24, 64) % 3 == 0
    assert micro_batches([even, slow, even, even], 2, 64) <= 2


def test_a_head_learns_a_new_limit_of_a_stage() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            site.replicas[0][0].service.limit = 5
            await until(lambda: site.engine.pipeline.replicas[0][0].limit == 5)

    asyncio.run(main())


def test_a_stage_tells_the_hop_time_that_its_heads_measure() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3")) as site:
            assert all(replica.service.hop_s == 0.0 for (replica,) in site.replicas)
            await site.complete(GIVEN[0], 4)
            for stage, (replica,) in zip(site.ranges, site.replicas, strict=True):
                service = replica.service
                measured = site.engine.pipeline.replicas[site.ranges.index(stage)][0].figures.hop_s
                assert measured > 0.0
                await until(lambda s=service, m=measured: s.hop_s == m)
                text = StageHttp(service, stage, lambda: None).metrics_text()
                assert f'chiron_stage_hop_seconds{{layers="{stage}"}} {measured}\n' in text
                for told in (float("nan"), -1.0, float("inf"), 1e9):
                    service._received(service._heads[0], Ping(1, told), memoryview(b""))
                    assert service.hop_s == 0.0

    asyncio.run(main())


class Once:
    """A sequence of it ends with its first token."""

    def token(self, logits: memoryview, ids: memoryview, mass: float) -> int | None:
        return None

    def preempted(self) -> None:
        raise AssertionError

    def failed(self, why: str) -> None:
        raise AssertionError(why)


def test_one_that_leaves_while_its_step_waits_holds_no_kv() -> None:
    async def main() -> None:
        several = PipelineSettings(link=PATIENT, micro_batches=3)
        async with staged_site(tiny(), ("0-3",), pipeline=several) as site:
            pipeline, service = site.engine.pipeline, site.replicas[0][0].service
            computing, waiting = (Sequence(id=i, tokens=[1, 2], want=1, listener=Once()) for i in (1, 2))
            release = threading.Event()
            service._thread.submit(release.wait)
            pipeline.add(computing)
            pipeline.pump()
            pipeline.add(waiting)
            pipeline.pump()
            await until(lambda: service.queued == 1)
            pipeline.remove(waiting)
            await until(lambda: bool(service._frees) or any(c.after for h in service._heads for c in h.calls))
            release.set()
            await until(lambda: service.totals.calls == 2)
            await until(lambda: service.kv.sequences == 0)

    asyncio.run(main())


def test_a_replica_that_dies_costs_a_pause() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(ask_all(site, 2))
            stage = 1
            await until(lambda: site.replicas[stage][0].service.totals.steps > 4)
            victim = site.replicas[stage].pop()
            victim.hold()  # Or all might be answered before it dies.
            await site.add(stage)
            site.tell()
            await until(lambda: site.engine.pipeline.replicas[stage][-1].up)
            await victim.die()
            await asking
            assert site.engine.pipeline.losses == 1
            assert site.engine.pipeline.replayed_tokens > 0
            # Nothing was taken for held there that was lost.
            assert not any(replica.service.totals.refused for replicas in site.replicas for replica in replicas)

    asyncio.run(main())


def test_without_a_replica_sequences_wait_for_the_next_one() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(ask_all(site))
            await until(lambda: site.replicas[2][0].service.totals.steps > 4)
            await site.replicas[2].pop().die()
            await until(lambda: site.engine.pipeline.losses == 1)
            await site.add(2)
            site.tell()
            await asking

    asyncio.run(main())


def test_a_replica_that_is_taken_out_is_left_in_good_time() -> None:
    async def main() -> None:
        quick = PipelineSettings(link=PATIENT, drain_s=0.0)
        async with staged_site(tiny(), SPLIT, replicas=(2, 1, 1), pipeline=quick, pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(ask_all(site, 2))
            await until(lambda: site.replicas[0][0].service.totals.steps > 4)
            await until(lambda: all(replica.up for replica in site.engine.pipeline.replicas[0]))
            old = site.replicas[0].pop(0)
            site.tell()
            assert old.address not in placed(site, 20)
            await until(lambda: len(site.engine.pipeline.replicas[0]) == 1)
            await asking
            await until(lambda: old.service.heads == 0 and old.service.kv.sequences == 0)
            assert site.engine.pipeline.losses == 0

    asyncio.run(main())


def test_sequences_that_do_not_fit_wait_for_kv() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, kv_tokens=192) as site:
            await ask_all(site)
            status, said = await site.post("/v1/completions", {"model": "tiny", "prompt": [1] * 300, "max_tokens": 4})
            assert status == 503
            assert json.loads(said)["error"]["code"] == "kv_cache_full"

    asyncio.run(main())


def test_requests_of_many_kinds() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), head=HeadSettings(name="tiny", model_len_max=128)) as site:
            chat: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "bada"}], "max_tokens": 8}
            drawn = {
                **chat,
                "seed": 5,
                "temperature": 1.0,
                "top_p": 0.9,
                "top_k": 50,
                "logprobs": True,
                "top_logprobs": 2,
            }
            first, again = [json.loads((await site.post("/v1/chat/completions", drawn))[1]) for _ in range(2)]
            assert first["choices"] == again["choices"]
            assert first["usage"]["completion_tokens"] == 8
            assert len(first["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
            streamed = {**chat, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
            status, events = await site.post("/v1/chat/completions", streamed)
            assert (status, events.count(b"data: ")) == (200, 8 + 1 + 1)
            whole = json.loads((await site.post("/v1/chat/completions", {**chat, "temperature": 0}))[1])
            text = whole["choices"][0]["message"]["content"]
            stop = {**chat, "temperature": 0, "stop": text[3:5]}
            cut = json.loads((await site.post("/v1/chat/completions", stop))[1])["choices"][0]
            assert (cut["message"]["content"], cut["finish_reason"]) == (text[: text.index(text[3:5])], "stop")
            rest = await site.complete(GIVEN[0], TOKENS, resume_token_ids=recorded("llama")[0][:10])
            assert rest == recorded("llama")[0][10:TOKENS]
            plain = {"model": "tiny", "prompt": GIVEN[0], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
            said = json.loads(
                (await site.post("/v1/completions", {**plain, "frequency_penalty": 2.0, "return_token_ids": True}))[1]
            )
            tokens = said["choices"][0]["token_ids"]
            assert len(set(tokens)) == len(tokens)
            status, said = await site.post("/v1/completions", {"model": "tiny", "prompt": [1] * 120, "max_tokens": 20})
            assert (status, json.loads(said)["error"]["code"]) == (400, "context_length_exceeded")
            status, text = await site.post("/metrics", {}, "GET")
            assert b"chiron_head_stage_hop_seconds{" in text
            status, said = await site.post("/chiron/stages", {"replicas": [[], []]}, "PUT")
            assert b"replicas is [[], []]; it must be a list of 1 lists" in said

    asyncio.run(main())


@pytest.mark.parametrize(
    ("model", "layers", "said"),
    [("other", "0-3", "it has another model"), ("same", "0-2", "it has layers 0-2; here they are 0-3")],
)
def test_another_model_or_split_at_the_other_end_is_refused(model: str, layers: str, said: str) -> None:
    from chiron.engines.staged.split import read_range
    from chiron.engines.staged.weights import read_model_files

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(0,)) as site:
            files = read_model_files(tiny() if model == "same" else tiny("qwen2"))
            wrong = await start_replica(files, read_range(layers))
            site.replicas[0].append(wrong)
            site._all.append(wrong)
            site.tell()
            await until(lambda: site.engine.pipeline.replicas[0][0].trouble)
            assert said in site.engine.pipeline.replicas[0][0].trouble
            assert not site.engine.pipeline.replicas[0][0].up

    asyncio.run(main())
