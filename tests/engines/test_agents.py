"""What agent libraries ask of engines, before both of ours: several choices and prompts, likelihoods, JSON, tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("openvino_genai")

import openai
from pydantic import BaseModel, Field

from chiron.engines.serve.toy import toy_model
from engine_process import EngineProcess, Stream, connected, limits, metrics, until
from official_client import official_client

pytestmark = pytest.mark.slow
"""Two engines and their model take ten seconds of a core."""

SAY: Any = [{"role": "user", "content": "Order three apples."}]
QUIET = {"role": "system", "content": "x"}
ENGINES = ("emulated", "openvino")


class Item(BaseModel):
    name: str = Field(max_length=20)
    count: int = Field(ge=1, le=12)
    kind: Literal["fruit", "tool"] | None


class Order(BaseModel):
    id: int
    items: list[Item]
    note: str | None = None


TOOLS = [openai.pydantic_function_tool(Order, name="order"), openai.pydantic_function_tool(Item, name="item")]
NAMED: Any = {"type": "function", "function": {"name": "item"}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineProcess]]:
    model: Path = toy_model(directory=tmp_path_factory.mktemp("models"))
    found = {
        "emulated": EngineProcess(
            "chiron.engines.serve.emulated", "--served-model-name", "m", "--speedup", "100", "--output-mean", "20"
        ),
        # Few tokens of KV, so that it runs short.
        "openvino": EngineProcess(
            "chiron.engines.serve.openvino", "--toy-cache", str(model.parent), "--served-model-name", "m",
            "--threads", "1", "--kv-capacity-tokens", "1024", "--max-num-seqs", "8",
        ),
    }  # fmt: skip
    yield found
    for process in found.values():
        _, log = process.stop()
        assert "Traceback" not in log


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, engines: dict[str, EngineProcess]) -> str:
    return engines[request.param].url


@pytest.fixture
def api(url: str) -> Iterator[Any]:
    with official_client(url) as client:
        yield client


def chunks_by_choice(chunks: list[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found.setdefault(choice.index, []).append(choice)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_differ_and_each_ends_for_itself(api: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": SAY, "n": 3, "max_tokens": 6, "seed": 4}
    ignore = {"ignore_eos": True}
    whole = api.chat.completions.create(**asked, extra_body=ignore)
    texts = {choice.index: choice.message.content for choice in whole.choices}
    if stream:
        chunks = list(
            api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}, extra_body=ignore)
        )
        choices = chunks_by_choice(chunks)
        assert {i: "".join(c.delta.content or "" for c in found) for i, found in choices.items()} == texts
        assert [[c.finish_reason for c in choices[i] if c.finish_reason] for i in range(3)] == [["length"]] * 3
        assert [choices[i][0].delta.role for i in range(3)] == ["assistant"] * 3
        assert chunks[-1].usage == whole.usage
    assert list(texts) == [0, 1, 2]
    assert len(set(texts.values())) == 3
    assert whole.usage.completion_tokens == 18, "each choice counts, the prompt once"
    one = api.chat.completions.create(**asked | {"n": 1}, extra_body=ignore)
    assert (one.usage.prompt_tokens, one.choices[0].message.content) == (whole.usage.prompt_tokens, texts[0])


def test_a_list_of_prompts_is_answered_in_order_and_echoed_where_asked(api: Any) -> None:
    asked: dict[str, Any] = {"model": "m", "max_tokens": 3, "temperature": 0, "extra_body": {"ignore_eos": True}}
    prompts: list[Any] = ["one two", "three"]
    both = api.completions.create(prompt=prompts, n=2, echo=True, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(prompts[i // 2]) for i, choice in enumerate(both.choices)] == [True] * 4
    alone = [api.completions.create(prompt=prompt, **asked) for prompt in prompts]
    for i, answer in enumerate(alone):
        assert both.choices[2 * i].text == prompts[i] + answer.choices[0].text
    assert both.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert both.usage.completion_tokens == 12
    streamed = chunks_by_choice(list(api.completions.create(prompt=prompts, n=2, echo=True, stream=True, **asked)))
    assert ["".join(c.text for c in streamed[i]) for i in range(4)] == [choice.text for choice in both.choices]
    ids = api.completions.create(prompt=[[5, 6], [7]], echo=True, **asked)
    assert [bool(choice.text) for choice in ids.choices] == [True, True]


def test_likelihoods_are_those_of_the_tokens_said(api: Any) -> None:
    asked: dict[str, Any] = {"model": "m", "max_tokens": 4, "seed": 1, "extra_body": {"ignore_eos": True}}
    whole = api.chat.completions.create(messages=SAY, logprobs=True, **asked).choices[0]
    said = whole.logprobs.content
    assert (len(said), b"".join(bytes(each.bytes) for each in said).decode()) == (4, whole.message.content)
    assert all(each.logprob <= 0.0 for each in said)
    stream = api.chat.completions.create(messages=SAY, logprobs=True, stream=True, **asked)
    assert [each for chunk in stream for c in chunk.choices if c.logprobs for each in c.logprobs.content] == said
    text = api.completions.create(prompt="a b", logprobs=0, **asked).choices[0]
    assert ("".join(text.logprobs.tokens), len(text.logprobs.token_logprobs)) == (text.text, 4)
    assert text.logprobs.text_offset[0] == 0
    assert api.chat.completions.create(messages=SAY, **asked).choices[0].logprobs is None


def test_json_of_a_schema_parses(api: Any) -> None:
    # The client reads it with pydantic.
    for stream in (False, True):
        asked: dict[str, Any] = {"model": "m", "messages": SAY, "response_format": Order, "max_tokens": 500}
        if stream:
            with api.chat.completions.stream(**asked) as events:
                list(events)
                answer = events.get_final_completion()
        else:
            answer = api.chat.completions.parse(**asked)
        assert isinstance(answer.choices[0].message.parsed, Order)
        assert answer.choices[0].finish_reason == "stop"
    free = api.chat.completions.create(
        model="m", messages=SAY, response_format={"type": "json_object"}, n=2, max_tokens=400
    )
    assert [isinstance(json.loads(choice.message.content), dict) for choice in free.choices] == [True, True]


def test_json_that_is_cut_short_says_so(api: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        api.chat.completions.parse(model="m", messages=SAY, response_format=Order, max_tokens=2)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_that_must_be_called_is_called_with_arguments_that_fit(api: Any, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": SAY, "tools": TOOLS, "tool_choice": choice, "max_tokens": 500}
    whole = api.chat.completions.parse(**asked).choices[0]
    with api.chat.completions.stream(**asked) as events:
        kinds = {event.type for event in events}
        streamed = events.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    for found in (whole, streamed):
        assert (found.finish_reason, found.message.content) == ("tool_calls", None)
        for call in found.message.tool_calls:
            assert call.id
            assert isinstance(call.function.parsed_arguments, {"order": Order, "item": Item}[call.function.name])
    if choice is NAMED:
        assert [call.function.name for call in whole.message.tool_calls] == ["item"]


def test_none_calls_no_tool_and_after_a_result_there_is_text(api: Any) -> None:
    asked: dict[str, Any] = {"model": "m", "tools": [WEATHER], "max_tokens": 20}
    none = api.chat.completions.create(messages=SAY, tool_choice="none", **asked).choices[0]
    assert none.message.tool_calls is None
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *SAY,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    after = api.chat.completions.create(messages=turns, **asked).choices[0]
    assert (after.message.tool_calls, after.finish_reason != "tool_calls") == (None, True)


def test_harmless_fields_are_taken(api: Any) -> None:
    answer = api.chat.completions.create(
        model="m", messages=SAY, max_completion_tokens=3, store=False, metadata={"a": "b"}, user="u", logit_bias={},
        service_tier="auto", reasoning_effort="low", parallel_tool_calls=True, prompt_cache_key="k", verbosity="low",
        safety_identifier="s", top_logprobs=0, n=1, tools=[WEATHER], tool_choice="none",
    )  # fmt: skip
    assert answer.usage.completion_tokens <= 3


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 129}, "n", "from 1 to 128"),
        ({"n": 1 << 70}, "n", "from 1 to 128"),
        ({"response_format": form({"$ref": "#"})}, "response_format", "no finite"),
        ({"response_format": form({"not": {}})}, "response_format", "'not'"),
        ({"tools": [tool(name="f", parameters={"type": "array"})]}, "tools", "an object"),
        ({"response_format": form({"type": "array", "minItems": 9000}), "n": 2}, "n", "smaller for such schemas"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "once more"),
        ({"tools": [WEATHER] * 200}, "tools", "up to 128"),
        ({"tools": [WEATHER], "tool_choice": tool(name="x")}, "tool_choice", "weather"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content", "text parts"),
    ],
)  # fmt: skip
def test_what_no_engine_can_do_is_a_400_that_names_it(api: Any, fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/chat/completions", body={"model": "m", "messages": SAY, **fields}, cast_to=object)
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/chat/completions", {"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ("/completions", {"logprobs": 2}, "logprobs"),
        ("/completions", {"logprobs": 0, "echo": True}, "logprobs"),
        ("/chat/completions", {"response_format": form({}), "resume_token_ids": [1]}, "resume_token_ids"),
        (
            "/chat/completions",
            {"tools": [WEATHER], "tool_choice": "required", "resume_token_ids": [1]},
            "resume_token_ids",
        ),
        ("/chat/completions", {"response_format": form({"type": "integer", "multipleOf": 3})}, "response_format"),
    ],
)  # fmt: skip
def test_what_the_embedded_engine_lacks_is_a_400_that_names_it(
    engines: dict[str, EngineProcess], path: str, fields: dict[str, Any], param: str
) -> None:
    with official_client(engines["openvino"].url) as api:
        prompt = {"messages": SAY} if "chat" in path else {"prompt": "a"}
        with pytest.raises(openai.BadRequestError) as caught:
            api.post(path, body={"model": "m", **prompt, **fields}, cast_to=object)
        assert caught.value.param == param


def test_a_tool_with_a_thousand_properties_is_called_or_refused(engines: dict[str, EngineProcess]) -> None:
    names = [f"p{i}" for i in range(1000)]
    many = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}
    asked: dict[str, Any] = {"model": "m", "messages": SAY, "tool_choice": "required"}
    tools: dict[str, Any] = {
        "required": [tool(name="f", parameters={**many, "required": names})],
        "optional": [tool(name="f", parameters=many)],
    }
    with official_client(engines["emulated"].url) as api:
        for name, each in tools.items():
            choice = api.chat.completions.create(**asked, tools=each).choices[0]
            found = json.loads(choice.message.tool_calls[0].function.arguments)
            assert (len(found) == 1000) == (name == "required")
    with official_client(engines["openvino"].url) as api:
        cut = api.chat.completions.create(**asked, tools=tools["required"], max_tokens=30).choices[0]
        assert cut.finish_reason == "length"
        assert cut.message.tool_calls[0].function.arguments.startswith('{"p0":')
        with pytest.raises(openai.BadRequestError, match="more than 300 optional"):
            api.chat.completions.create(**asked, tools=tools["optional"], max_tokens=30)


def test_the_emulated_engine_makes_up_alternatives_and_tools_by_itself(engines: dict[str, EngineProcess]) -> None:
    with official_client(engines["emulated"].url) as api:
        found = api.chat.completions.create(model="m", messages=SAY, logprobs=True, top_logprobs=3, max_tokens=5)
        for each in found.choices[0].logprobs.content:
            assert each.top_logprobs[0].token == each.token
            assert [top.logprob for top in each.top_logprobs] == sorted(
                (top.logprob for top in each.top_logprobs), reverse=True
            )
        echoed = api.completions.create(model="m", prompt="one two", echo=True, logprobs=2, max_tokens=2).choices[0]
        assert "".join(echoed.logprobs.tokens) == echoed.text
        assert echoed.logprobs.token_logprobs[0] is None
        counts = set()
        for number in range(12):
            asked: Any = [{"role": "user", "content": f"turn {number}"}]
            choice = api.chat.completions.create(model="m", messages=asked, tools=TOOLS).choices[0]
            assert choice.finish_reason == "tool_calls"
            counts.add(len(choice.message.tool_calls))
            single = api.chat.completions.create(model="m", messages=asked, tools=TOOLS, parallel_tool_calls=False)
            assert len(single.choices[0].message.tool_calls) == 1
        assert counts == {1, 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": form(Order.model_json_schema())},
        {"tools": TOOLS, "tool_choice": "required"},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}, "stop": [":"]},
    ],
)
def test_an_interrupted_answer_of_the_emulated_engine_goes_on_where_it_was(
    engines: dict[str, EngineProcess], fields: dict[str, Any]
) -> None:
    async def check() -> None:
        async with connected(engines["emulated"].url) as origin:
            asked = {"model": "m", "messages": SAY, "max_tokens": 12, **fields}

            async def merged(**more: Any) -> tuple[str, str, list[Any], str, list[int]]:
                stream = await Stream(origin, "/v1/chat/completions", asked | more).end()
                deltas = [choice["delta"] for choice in stream.choices]
                calls = [call["function"]["arguments"] for d in deltas for call in d.get("tool_calls", [])]
                likely = [e for c in stream.choices for e in (c.get("logprobs") or {}).get("content", [])]
                text = "".join(d.get("content") or "" for d in deltas)
                return text, "".join(calls), likely, stream.choices[-1]["finish_reason"], stream.token_ids

            whole = await merged()
            ids = whole[4]
            for cut in range(1, len(ids) + 1):
                rest = await merged(resume_token_ids=ids[:cut])
                assert whole[0].endswith(rest[0])
                assert whole[1].endswith(rest[1])
                assert whole[2][len(whole[2]) - len(rest[2]) :] == rest[2]
                assert (rest[3], ids[:cut] + rest[4]) == (whole[3], ids)

    asyncio.run(check())


def test_the_embedded_engine_gives_no_token_ids_that_it_could_not_go_on_with(
    engines: dict[str, EngineProcess],
) -> None:
    async def check() -> None:
        async with connected(engines["openvino"].url) as origin:
            held = {"response_format": {"type": "json_object"}}
            stream = await Stream(origin, "/v1/chat/completions", {"model": "m", "messages": SAY, **held}).end()
            assert (stream.complete, stream.token_ids) == (True, [])
            assert isinstance(json.loads(stream.text), dict)

    asyncio.run(check())


def test_json_survives_a_shortage_of_kv(engines: dict[str, EngineProcess]) -> None:
    """Others are given back to the queue for it; one that a grammar holds could not go on."""
    text = {"type": "string", "minLength": 30, "maxLength": 40}
    held_to = form({"type": "array", "items": text, "minItems": 4, "maxItems": 4})

    async def check() -> None:
        async with connected(engines["openvino"].url) as origin:
            before = (await metrics(origin))["vllm:num_preemptions_total"]
            free = [
                Stream(
                    origin, "/v1/completions",
                    {"model": "m", "prompt": [n] * 40, "max_tokens": 260, "ignore_eos": True, "temperature": 0},
                )
                for n in range(5)
            ]  # fmt: skip
            await free[0].tokens(1)
            held = [
                Stream(
                    origin, "/v1/chat/completions",
                    {"model": "m", "messages": SAY, "max_tokens": 300, "response_format": held_to, "seed": n},
                )
                for n in range(3)
            ]  # fmt: skip
            for stream in [*free, *held]:
                await stream.end()
            assert all(stream.complete for stream in [*free, *held])
            assert [len(stream.token_ids) for stream in free] == [260] * 5
            for stream in held:
                assert stream.choices[-1]["finish_reason"] == "stop"
                assert [30 <= len(text) <= 40 for text in json.loads(stream.text)] == [True] * 4
            assert (await metrics(origin))["vllm:num_preemptions_total"] > before

    asyncio.run(check())


@pytest.mark.parametrize(
    ("engine", "tokens"), [("emulated", 100_000), pytest.param("openvino", 900, marks=pytest.mark.slow)]
)
def test_choices_are_sequences_within_the_limit_and_leave_together(
    engines: dict[str, EngineProcess], engine: str, tokens: int
) -> None:
    def inside(found: dict[str, int]) -> tuple[int, int]:
        return found["running"], found["waiting"]

    async def check() -> None:
        async with connected(engines[engine].url) as origin:
            await limits(origin, 2)
            body = {"model": "m", "prompt": ["a", "b"], "n": 3, "max_tokens": tokens, "ignore_eos": True}
            for _ in range(5):  # Once is enough, unless it runs in an engine while nothing of this process does.
                stream = Stream(origin, "/v1/completions", body)
                found = await until(lambda n: inside(n) == (2, 4) or stream.complete, origin)  # noqa: B023
                if inside(found) == (2, 4):
                    break
            assert inside(found) == (2, 4)
            stream.call.cancel()
            await until(lambda n: n["running"] + n["waiting"] == 0, origin)
            await limits(origin, 8)
            whole = await Stream(origin, "/v1/completions", body | {"max_tokens": 5}).end()
            ended = [(c["index"], c["finish_reason"]) for c in whole.choices if c["finish_reason"]]
            assert sorted(ended) == [(i, "length") for i in range(6)]

    asyncio.run(check())
