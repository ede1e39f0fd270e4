"""A cascade: the small model answers where it is sure, the large one where it is not; the client sees one answer."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_site import CONFIG, cascade, close, entry, event, post, say, tally, tally_with, text_of, token
from chiron.config.read import ConfigError
from chiron.config.serve import parse_serve
from chiron.gateway.relay.keys import hash_secret
from chiron.net.server import Incoming
from live_gateway import RELAYS, until
from scripted_engine import SSE, Reader, ScriptedEngine, body, whole

SURE, UNSURE = -0.1, -0.9
KEYS = "".join(
    f'[[keys]]\nname = "{name}"\nhash = "{hash_secret(name.encode())}"\n{more}\n'
    for name, more in (("only", 'models = ["chat"]\nrequests_per_minute = 2'), ("tokens", "tokens_per_minute = 20"))
)


PART = b"--x\r\nContent-Disposition: form-data; name="
FORM = PART + b'"purpose"\r\n\r\nbatch\r\n' + PART + b'"file"; filename="f.jsonl"\r\n\r\n'


def asked(incoming: Incoming) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(incoming.body)
    return found


def answers(*logprobs: float | None) -> Callable[[Incoming], None]:
    return lambda incoming: say(incoming, *logprobs)


def tell(incoming: Incoming, data: bytes) -> None:
    incoming.start(200, SSE)
    incoming.write(data)
    incoming.finish()


def refuses(status: int) -> Callable[[Incoming], None]:
    return lambda incoming: incoming.respond(status, b'{"error": {"message": "no", "code": null}}')


def breaks_off(incoming: Incoming) -> None:
    incoming.start(200, SSE)
    incoming.write(token("w0 ", SURE))
    incoming.abort()


async def stream_of(origin: Any, **fields: Any) -> Reader:
    return await Reader(origin, body(stream=True, **{"model": "chat"} | fields)).end()


def all_at_once(incoming: Incoming) -> None:
    """Tokens in one event: the last ones are not judged."""
    content = [entry(SURE)] * 3 + [entry(-9.0)] * 3
    choice = {"index": 0, "delta": {"content": "w0 w1 w2"}, "logprobs": {"content": content}, "finish_reason": None}
    tell(incoming, event(choice) + close(6))


CASES: list[tuple[Callable[[Incoming], None], dict[str, Any], str, int]] = [
    (answers(SURE, SURE, SURE, UNSURE, UNSURE), {}, "", 1),
    (answers(SURE), {}, "", 1),  # Shorter than what is judged.
    (all_at_once, {}, "", 1),
    (answers(SURE, UNSURE, UNSURE, SURE, SURE, SURE), {}, "unsure", 1),
    (answers(UNSURE), {}, "unsure", 1),
    (answers(SURE, SURE, SURE), {"response_format": {"type": "json_object"}}, "", 1),
    (answers(SURE, SURE, SURE), {"tools": [{"type": "function"}], "tool_choice": "none"}, "", 1),
    (answers(None, None, None), {}, "unjudged", 1),
    (answers(SURE, SURE, SURE), {"tools": [{"type": "function", "function": {"name": "f"}}]}, "unjudged", 0),
    (answers(SURE, SURE, SURE), {"n": 2}, "unjudged", 0),
    (answers(SURE, SURE, SURE), {"messages": [{"role": "user", "content": "x" * 200_000}]}, "too_long", 0),
    (refuses(400), {}, "failed", 1),
    (refuses(501), {}, "failed", 1),
    (breaks_off, {}, "failed", 1),
]


@pytest.mark.parametrize("relays", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_answer_whoever_gives_it(tmp_path: Path, relays: int) -> None:
    """Each case as a stream and in one piece: who answers, whether the small model was asked, what is counted."""

    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large, relays=relays) as (service, origin):
            fronts = [each.relay.front for each in RELAYS[tmp_path].running] if relays else [service.front]
            known = [front._models.by_name["small"] for front in fronts]
            await until(lambda: all(each.context_tokens for each in known), "how long prompts may be is known")
            for act, fields, reason, times in CASES:
                small.act = act
                for streams in (False, True):
                    small.seen.clear()
                    large.seen.clear()
                    large.act = (lambda incoming: say(incoming, None)) if streams else whole
                    if streams:
                        reader = await stream_of(origin, **fields)
                        assert reader.status == 200
                        data = reader.data
                        assert (b"logprobs" in data) == bool(reason)  # Of the large one it is as it says.
                        assert b"[DONE]" in data
                        assert b'"usage":{' not in data or reason
                    else:
                        answer = await post(origin, fields)
                        assert answer.status == 200
                        data = json.loads(answer.body)
                        assert data["choices"][0].get("logprobs") is None
                        assert data["usage"]["completion_tokens"] > 0
                    assert (bool(small.seen), len(large.seen)) == (bool(times), 1 if reason else 0), (fields, reason)
                    if reason and not streams:
                        assert data["choices"][0]["message"]["content"] == "fine"
                    if large.seen:
                        ids = {each.header(b"x-request-id") for each in (*small.seen, *large.seen)}
                        assert len(ids) == times + 1  # One engine may be both models, and know requests by it.
                        assert "logprobs" not in asked(large.seen[0])
                        assert asked(large.seen[0])["model"] == "large"
            sure = 2 * sum(not case[2] for case in CASES)
            found = await tally_with(origin, answered_first=sure, answered_then=2 * len(CASES) - sure)
            assert found["requests"] == 2 * len(CASES)
            escalated = {name: 2 * sum(case[2] == name for case in CASES) for name in found["escalated"]}
            assert found["escalated"] == escalated
            assert found["escalated_share"] == sum(escalated.values()) / found["requests"]
            page = (await origin.fetch("GET", "/metrics")).body.decode()
            assert 'chiron_cascade_escalated_total{class="chat",model="chat",reason="unsure"} 4.0' in page

    asyncio.run(main())


def test_an_answer_lost_before_anything_of_it_was_sent_is_given_by_the_large_model(tmp_path: Path) -> None:
    """Five sure tokens, of which three decide: of a stream they are at its client, of an answer in one piece nothing
    is."""

    def say_in_part(incoming: Incoming, end: bytes) -> None:
        incoming.start(200, SSE)
        incoming.write(token("w ", SURE) * 5 + end)
        if end:
            incoming.finish()
        else:
            incoming.abort()

    aborted = event({"index": 0, "delta": {}, "finish_reason": "abort"})

    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large) as (_, origin):
            for end in (b"", aborted):
                small.act = lambda incoming, end=end: say_in_part(incoming, end)
                answer = await post(origin, {})
                assert answer.status == 200
                assert json.loads(answer.body)["choices"][0]["message"]["content"] == "fine"
            assert len(large.seen) == 2
            reader = await stream_of(origin)
            assert (text_of(reader.data), len(large.seen)) == ("w " * 5, 2)
            assert b'"error"' in reader.data
            await tally_with(origin, escalated={"failed": 2}, answered_first=0, answered_then=2)

    asyncio.run(main())


def test_nothing_is_shown_before_it_will_do(tmp_path: Path) -> None:
    """The stream begins with the third token; its TTFT is what the client waited, whichever model answers."""

    async def main() -> None:
        small, large = ScriptedEngine(lambda incoming: incoming.start(200, SSE)), ScriptedEngine()
        async with cascade(tmp_path, small, large) as (service, origin):
            reader = Reader(origin, body(stream=True, model="chat"))
            await until(lambda: small.seen, "the small model is asked")
            small.seen[0].write(token("w0 ", SURE) + token("w1 ", SURE))
            first = next(iter(service.gateway.desk.open.values()))
            await until(lambda: first.first_token_s >= 0, "the engine's first token")
            assert not reader.status
            small.seen[0].write(token("w2 ", SURE))
            await until(lambda: text_of(reader.data) == "w0 w1 w2 ", "all of it at once")
            small.seen[0].write(token("w3 ", UNSURE))
            await until(lambda: text_of(reader.data).endswith("w3 "), "the rest as it comes")
            assert not large.seen
            small.seen[0].write(close(4))
            small.seen[0].finish()
            await reader.end()
            found = service.gateway.desk.cascades.tallies["chat", "chat"]
            ttft_s = found.ttft.sum
            assert ttft_s > first.first_token_s - first.arrival_s

            reader = Reader(origin, body(stream=True, model="chat"))
            await until(lambda: len(small.seen) == 2, "the small model is asked")
            small.seen[1].write(token("w", UNSURE) * 3)
            await until(lambda: large.seen, "the large one is asked")
            await until(lambda: small.left, "the small one is told to stop")
            second = next(iter(service.gateway.desk.open.values()))
            assert second.model == "large"
            assert second.cls.ttft_s < 2.0  # What the first call has left of it.
            say(large.seen[0], None, None)
            await reader.end()
            assert text_of(reader.data) == "w0 w1 "
            waited_s = found.ttft.sum - ttft_s
            assert waited_s > second.first_token_s - second.arrival_s

    asyncio.run(main())


def test_log_probabilities_are_those_that_were_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine(whole)
        rule = ', test = "margin", threshold = 0.1'
        async with cascade(tmp_path, small, large, rule=rule) as (_, origin):
            for fields, seen, top in (
                ({}, 3, None),
                ({"logprobs": True}, 3, 0),
                ({"logprobs": True, "top_logprobs": 1}, 3, 1),
                ({"logprobs": True, "top_logprobs": 4}, 4, 3),  # All that it has.
            ):
                small.seen.clear()
                small.act = answers(SURE, SURE, SURE)
                (choice,) = json.loads((await post(origin, fields)).body)["choices"]
                sent = asked(small.seen[0])
                assert small.seen[0].body.count(b"logprobs") == 2  # Each once: some engines refuse a field given twice.
                assert (sent["logprobs"], sent["top_logprobs"], sent["stream"]) == (True, seen, True)
                if top is None:
                    assert choice["logprobs"] is None
                else:
                    assert [len(each["top_logprobs"]) for each in choice["logprobs"]["content"]] == [top] * 3
            assert not large.seen
            near = event({"index": 0, "delta": {"content": "w"}, "logprobs": {"content": [entry(-0.7, -0.71)]}})
            small.act = lambda incoming: tell(incoming, near * 3 + close(3))
            await post(origin, {})
            assert len(large.seen) == 1  # The two likeliest tokens are too near.

    asyncio.run(main())


@pytest.mark.slow
def test_a_busy_small_model_is_not_waited_for(tmp_path: Path) -> None:
    """Two places, both taken: after ``first_wait`` the large model answers."""

    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large, rule=', first_wait = "100ms"') as (_, origin):
            held = [Reader(origin, body(model="small")) for _ in range(2)]
            await until(lambda: len(small.seen) == 2, "its places are taken")
            assert (await post(origin, {})).status == 200
            assert (len(small.seen), (await tally(origin))["escalated"]) == (2, {"failed": 1})
            for incoming in small.seen:
                whole(incoming)
            for reader in held:
                await reader.end()

    asyncio.run(main())


@pytest.mark.parametrize("relays", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_keys_batches_and_names(tmp_path: Path, relays: int) -> None:
    async def main() -> None:
        small, large = ScriptedEngine(answers(UNSURE, UNSURE, UNSURE)), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large, relays=relays, extra=KEYS) as (_, origin):
            key = {"authorization": "Bearer only"}
            assert (await post(origin, {"model": "small"}, key)).status == 403
            statuses = [(await post(origin, {"model": name}, key)).status for name in ("chat", "gpt", "chat")]
            assert statuses == [200, 200, 429]  # Two calls each, of which the key's limit counts one.
            assert (len(small.seen), len(large.seen)) == (2, 2)
            refused = await post(origin, {"service_tier": "flex"}, key)
            assert (refused.status, "'flex' is not offered for 'chat'" in refused.body.decode()) == (400, True)
            tokens = {"authorization": "Bearer tokens"}
            assert [(await post(origin, {}, tokens)).status for _ in range(2)] == [200, 429]  # Both calls are paid for.
            models = json.loads((await origin.fetch("GET", "/v1/models", headers=key)).body)["data"]
            assert {each["id"] for each in models} == {"chat", "gpt"}
            ready = await origin.fetch("GET", "/ready?model=chat")
            assert ready.status == 200

    asyncio.run(main())


def test_a_client_that_leaves_stops_whichever_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine()
        async with cascade(tmp_path, small, large) as (service, origin):
            for unsure in (False, True):
                reader = Reader(origin, body(stream=True, model="chat"))
                await until(lambda: small.seen, "the small model is asked")
                if unsure:
                    say(small.seen[0], UNSURE)
                    await until(lambda: large.seen, "the large one is asked")
                reader.call.cancel()
                await until(lambda: (large if unsure else small).left, "its engine is told")  # noqa: B023
                await until(lambda: not service.gateway.desk.open, "nothing is left")
                small.seen.clear()
            assert not service.plane.open_requests

    asyncio.run(main())


def test_batch_items_name_one_of_its_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with cascade(tmp_path, ScriptedEngine(), ScriptedEngine()) as (_, origin):
            asks = json.loads(body(model="chat"))
            line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": asks}
            data = FORM + json.dumps(line).encode() + b"\n\r\n--x--\r\n"
            headers = {"content-type": "multipart/form-data; boundary=x"}
            file = json.loads((await origin.fetch("POST", "/v1/files", body=data, headers=headers)).body)
            job = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "1h"}
            answer = await origin.fetch(
                "POST", "/v1/batches", body=json.dumps(job).encode(), headers={"content-type": "application/json"}
            )
            made = json.loads(answer.body)
            end_s = asyncio.get_running_loop().time() + 60.0
            while made["status"] == "validating" and asyncio.get_running_loop().time() < end_s:
                await asyncio.sleep(0.05)
                made = json.loads((await origin.fetch("GET", f"/v1/batches/{made['id']}")).body)
            (error,) = made["errors"]["data"]
            assert "cascade" in error["message"]
            assert "'small' or 'large'" in error["message"]

    asyncio.run(main())


def test_the_config_names_what_is_wrong(tmp_path: Path) -> None:
    good = CONFIG.format(small="http://127.0.0.1:1", large="http://127.0.0.1:2", rule="", engine="vllm")
    for old, new, words in (
        ('then = "large"', 'then = "larg"', "models.chat.cascade.then: 'larg' must be a model with instances"),
        ('then = "large"', 'then = "small"', "models.chat.cascade.then: 'small' is the first model, too"),
        ("after_tokens = 3", "after_tokens = -1", "after_tokens is -1"),
        ("after_tokens = 3", 'test = "guess"', "models.chat.cascade.test"),
        ("after_tokens = 3", "threshold = 0.5", "threshold is 0.5; for 'logprob' it must be -1000 to 0"),
        ("aliases", 'engine = "vllm"\naliases', "models.chat: has a cascade and an engine"),
        ("aliases", 'classes = ["batch"]\naliases', "models.chat.classes[0]: 'batch' must be an interactive class"),
        ('["gpt"]', '["small"]', "models: 'small' names both"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_serve(good.replace(old, new), directory=tmp_path)
        assert words in str(error.value), str(error.value)


@pytest.mark.slow
def test_a_request_leaves_nothing_behind_for_the_garbage_collector(tmp_path: Path) -> None:
    """Whoever answers, as a stream and in one piece."""

    async def main() -> None:
        small, large = ScriptedEngine(), ScriptedEngine(whole)
        small.act, large.act = answer_and_forget(small), answer_and_forget(large)
        async with cascade(tmp_path, small, large) as (_, origin):
            for logprob, streams in ((SURE, False), (SURE, True), (UNSURE, False), (UNSURE, True)):

                async def ask(logprob: float = logprob, streams: bool = streams) -> None:
                    answer = await post(origin, {"stream": streams, "logit": logprob})
                    assert answer.status == 200

                await ask()
                gc.collect()
                gc.disable()
                try:
                    for _ in range(20):
                        await ask()
                    assert gc.collect() < 20, (logprob, streams)
                finally:
                    gc.enable()

    def answer_and_forget(engine: ScriptedEngine) -> Callable[[Incoming], None]:
        def act(incoming: Incoming) -> None:
            engine.seen.clear()
            incoming.on_close = None
            fields = asked(incoming)
            if fields.get("stream"):
                say(incoming, *[fields["logit"]] * 4)
            else:
                whole(incoming)

        return act

    asyncio.run(main())
