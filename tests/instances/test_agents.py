"""What agent libraries ask for comes through the gateway whole: streamed, in one piece, as flex and as batch items."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edge_site import SECRETS, ask, edge_site, text
from fault_site import FaultSite, wait_for
from official_client import official_client

openai = pytest.importorskip("openai")

SAY: Any = [{"role": "user", "content": "What is the weather in Rome and in Oslo?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "array", "items": SCHEMA, "minItems": 3}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "?", "parameters": SCHEMA}}
    for name in ("weather", "forecast")
]
ASKED: dict[str, dict[str, Any]] = {
    "choices": {"n": 3, "max_tokens": 9},
    "tools": {"tools": TOOLS, "tool_choice": "required"},
    "tools of choices": {"tools": TOOLS, "n": 4},
    "json": {"response_format": FORM},
    "likelihoods": {"logprobs": True, "top_logprobs": 2, "max_tokens": 6, "n": 2},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    with edge_site(tmp_path_factory.mktemp("agents")) as running:
        yield running


@pytest.fixture
def api(site: FaultSite) -> Iterator[Any]:
    with official_client(site.url, SECRETS["all"]) as found:
        yield found


def said(answer: Any) -> list[Any]:
    """All that an answer holds for its client, choice by choice."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [choice.model_dump(include={"index", "message", "text", "logprobs", "finish_reason"}) for choice in choices]


def streamed(api: Any, **asked: Any) -> list[Any]:
    """The choices of a stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in api.chat.completions.create(model="big", messages=SAY, stream=True, **asked):
        for part in chunk.choices:
            choice = choices.setdefault(part.index, {"message": {}})
            message, delta = choice["message"], part.delta
            message["role"] = delta.role or message.get("role")
            if delta.content is not None:
                message["content"] = message.get("content", "") + delta.content
            for call in delta.tool_calls or ():
                calls = message.setdefault("tool_calls", [])
                if call.index == len(calls):
                    calls.append({"id": call.id, "type": call.type, "function": {"name": call.function.name}})
                function = calls[call.index]["function"]
                function["arguments"] = function.get("arguments", "") + (call.function.arguments or "")
            if part.logprobs is not None:
                content = choice.setdefault("logprobs", {"content": []})["content"]
                content += [each.model_dump() for each in part.logprobs.content]
            choice["finish_reason"] = part.finish_reason
    return [choices[index] for index in sorted(choices)]


def known(choices: list[Any]) -> list[Any]:
    """Without what is null here and missing there, and what the client adds."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            left = {
                name: plain(each) for name, each in value.items() if name not in ("parsed", "parsed_arguments", "index")
            }
            return {name: each for name, each in left.items() if each is not None}
        return [plain(each) for each in value] if isinstance(value, list) else value

    found: list[Any] = plain(choices)
    return found


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_an_answer_is_the_same_in_one_piece_streamed_and_as_flex(api: Any, asked: dict[str, Any]) -> None:
    whole = api.chat.completions.create(model="big", messages=SAY, **asked)
    flex = api.chat.completions.create(model="big", messages=SAY, service_tier="flex", **asked)
    assert len(whole.choices) == asked.get("n", 1)
    assert known(said(flex)) == known(said(whole))
    assert flex.usage == whole.usage
    assert known(streamed(api, **asked)) == known(said(whole))
    assert known(streamed(api, service_tier="flex", **asked)) == known(said(whole))


def test_several_prompts_are_the_same_in_one_piece_streamed_and_as_flex(api: Any) -> None:
    asked: dict[str, Any] = {
        "model": "small", "prompt": ["one two", "three"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 5,
    }  # fmt: skip
    whole = api.completions.create(**asked)
    flex = api.completions.create(**asked, extra_body={"service_tier": "flex"})
    assert said(flex) == said(whole)
    assert [choice.text[:3] for choice in whole.choices] == ["one", "one", "thr", "thr"]
    for tier in ({}, {"service_tier": "flex"}):
        texts = [""] * 4
        for chunk in api.completions.create(**asked, stream=True, extra_body=tier):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]


def test_batch_items_hold_what_the_same_requests_get(api: Any) -> None:
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "big", "messages": SAY, **a},
        }
        for name, a in ASKED.items()
    ]
    lines.append(lines[0] | {"custom_id": "wrong", "body": {"model": "big", "messages": SAY, "n": 1000}})
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = api.files.create(file=("in.jsonl", data), purpose="batch")
    batch = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    wait_for(lambda: api.batches.retrieve(batch.id).status == "completed", "the batch ends")
    ended = api.batches.retrieve(batch.id)
    results = [json.loads(line) for line in api.files.content(ended.output_file_id).text.splitlines()]
    answers = {each["custom_id"]: each["response"]["body"]["choices"] for each in results}
    for name, asked in ASKED.items():
        whole = api.chat.completions.create(model="big", messages=SAY, **asked)
        assert known(sorted(answers[name], key=lambda choice: choice["index"])) == known(said(whole)), name
    (refused,) = [json.loads(line) for line in api.files.content(ended.error_file_id).text.splitlines()]
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("wrong", 400)
    assert refused["response"]["body"]["error"]["param"] == "n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1000}, "n"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
@pytest.mark.parametrize("tier", ["auto", "flex"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_refused_in_its_words(
    api: Any, fields: dict[str, Any], param: str, tier: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        list(api.chat.completions.create(model="big", messages=SAY, service_tier=tier, stream=stream, **fields))
    assert caught.value.param == param


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2, "max_tokens": 3000},
        {"max_tokens": 3000, "logprobs": True},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "array", "items": {"type": "string", "minLength": 100}, "minItems": 100,
        }}}},
    ],
    ids=["choices", "likelihoods", "json"],
)  # fmt: skip
def test_an_answer_that_was_evicted_is_whole_in_the_end(tmp_path: Any, asked: dict[str, Any]) -> None:
    """The engine has one place, and an interactive request takes it."""
    config = text(speedup=20.0, args=["--max-num-seqs", "1"], keys=False)
    one_place = config.replace("max_instances = 1\n", "max_instances = 1\nmax_num_seqs = 1\n")
    with (
        FaultSite(tmp_path, one_place) as site,
        official_client(site.url) as api,
    ):
        fields: dict[str, Any] = {"model": "big", "messages": SAY, "extra_body": {"ignore_eos": True}, **asked}
        alone = api.chat.completions.create(**fields)
        for _ in range(5):  # Once is enough, unless this process stalls for as long as the answer takes.
            found: list[Any] = []
            flex = threading.Thread(
                target=lambda found=found: found.append(api.chat.completions.create(**fields, service_tier="flex"))
            )
            flex.start()
            while flex.is_alive() and not evictions(site):
                time.sleep(0.3)  # It is to have said something by then; evicted before that, it would prove little.
                api.chat.completions.create(model="big", messages=SAY, max_tokens=2)
            flex.join()
            assert known(said(found[0])) == known(said(alone))
            assert found[0].usage == alone.usage
            if evictions(site):
                break
        assert evictions(site) > 0


def evictions(site: FaultSite) -> int:
    lines = ask(site.url + "/metrics").body.decode().splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("chiron_evictions_total"))
