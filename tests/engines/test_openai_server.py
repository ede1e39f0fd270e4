"""What engine servers accept and answer, checked against the official client's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chiron.engines.serve.answer import Answer, Part
from chiron.engines.serve.openai import GenerationRequest, Usage, parse_limit, parse_request
from chiron.engines.serve.request_error import RequestError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def parse(chat: bool, **changes: Any) -> GenerationRequest:
    body = {**(CHAT if chat else TEXT), **changes}
    return parse_request(json.dumps(body).encode(), chat=chat, served=["m"])


def test_a_plain_chat_request_gets_the_defaults_of_the_api() -> None:
    request = parse(True)
    assert (request.max_tokens, request.temperature, request.top_p, request.stream) == (None, 1.0, 1.0, False)
    assert request.messages[0].content == "hi"


def test_a_plain_completion_ends_after_16_tokens() -> None:
    assert parse(False).max_tokens == 16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([5, 6], ((5, 6),)),
        ([[5, 6], [7]], ((5, 6), (7,))),
        (["a", [7]], ("a", (7,))),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_them(given: Any, expected: Any) -> None:
    request = parse(False, prompt=given, n=2)
    assert request.prompts == expected
    assert request.choices == 2 * len(expected)


def test_text_parts_are_joined_and_null_counts_as_absent() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(True, messages=[{"role": "user", "content": parts}], max_tokens=None, stop=None, n=1)
    assert (request.messages[0].content, request.max_tokens, request.stop) == ("ab", None, ())


def test_the_newer_name_of_the_token_limit_wins() -> None:
    assert parse(True, max_tokens=5, max_completion_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("chat", "changes", "param", "allowed"),
    [
        (True, {"n": 129}, "n", "from 1 to 128"),
        (True, {"n": 0}, "n", "from 1 to 128"),
        (False, {"n": 2, "best_of": 3}, "best_of", "equal to n"),
        (False, {"n": 64, "prompt": ["a", "b", "c"]}, "prompt", "128 together"),
        (False, {"n": 2, "resume_token_ids": [1]}, "resume_token_ids", "several choices"),
        (True, {"temperature": 3}, "temperature", "from 0 to 2"),
        (True, {"temperature": True}, "temperature", "from 0 to 2"),
        (True, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (True, {"max_tokens": 1.5}, "max_tokens", "whole number"),
        (True, {"stream": "yes"}, "stream", "true or false"),
        (True, {"stream_options": {"include_usage": True}}, "stream_options", "only when stream is true"),
        (True, {"messages": []}, "messages", "a list of 1 to"),
        (True, {"messages": ["hi"]}, "messages[0]", "an object"),
        (True, {"messages": [{"content": "hi"}]}, "messages[0].role", "a string"),
        (True, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content", "text parts"),
        (True, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        (True, {"messages": [{"role": "u", "content": [{"type": "image_url"}]}]}, "messages[0].content", "image_url"),
        (True, {"messages": [{"role": "a", "tool_calls": {}}]}, "messages[0].tool_calls", "a list of up to"),
        (True, {"messages": [{"role": "tool", "tool_call_id": 1}]}, "messages[0].tool_call_id", "a string"),
        (True, {"tools": [{"type": "function"}]}, "tools", "must be an object"),
        (True, {"tools": [{"type": "custom"}]}, "tools", "only 'function'"),
        (True, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters, digits"),
        (True, {"tool_choice": "required"}, "tool_choice", "without tools"),
        (True, {"functions": [{"name": "a"}]}, "functions", "does not implement"),
        (True, {"top_logprobs": 2}, "top_logprobs", "unless logprobs is true"),
        (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        (True, {"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        (True, {"response_format": {"type": "json_schema"}}, "response_format", "must hold a schema"),
        (True, {"response_format": [1]}, "response_format", "an object"),
        (True, {"stop": ["a"] * 17}, "stop", "up to 16 strings"),
        (True, {"stop": ""}, "stop", "1 to 256 characters"),
        (True, {"seed": 1 << 64}, "seed", "a whole number from"),
        (True, {"resume_token_ids": [1, "a"]}, "resume_token_ids", "a list of token ids"),
        (False, {"prompt": ["a", 1]}, "prompt", "a list of token ids"),
        (False, {"prompt": []}, "prompt", "a list of token ids"),
        (False, {"prompt": [-1]}, "prompt", "a list of token ids"),
        (False, {"logprobs": 6}, "logprobs", "from 0 to 5"),
        (False, {"echo": "yes"}, "echo", "true or false"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_and_what_is_allowed(
    chat: bool, changes: dict[str, Any], param: str, allowed: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse(chat, **changes)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert allowed in caught.value.message
    assert json.loads(caught.value.body())["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": 1}', b"{}"])
def test_a_body_that_is_no_request_is_a_400(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(body, chat=True, served=["m"])
    assert caught.value.status == 400


def test_an_unknown_model_is_a_404_that_lists_the_known() -> None:
    with pytest.raises(RequestError, match=r"'x' does not exist here; served: m") as caught:
        parse(True, model="x")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("body", [b"{}", b'{"limit": 0}', b'{"limit": "4"}', b'{"limit": true}'])
def test_a_limit_is_a_whole_number_of_at_least_one(body: bytes) -> None:
    with pytest.raises(RequestError, match="limit is"):
        parse_limit(body)


def events(stream: bytes) -> list[dict[str, Any]]:
    lines = stream.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_one_event_a_step_and_reads_as_the_client_expects(chat: bool) -> None:
    types = pytest.importorskip("openai.types")
    chunk_type = types.chat.ChatCompletionChunk if chat else types.Completion
    request = parse(chat, stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    answer = Answer(request, id="1", created_s=7)
    stream = answer.event(0, Part('a"\n', [1])) + answer.event(0, Part("é", [2, 3]), "length")
    stream += answer.end(Usage(prompt_tokens=2, completion_tokens=3))
    # As the client reads events: its type of a text completion has no null finish reason, which every server sends.
    chunks = [chunk_type.construct(**event) for event in events(stream)]
    texts = [c.choices[0].delta.content if chat else c.choices[0].text for c in chunks[:-1]]
    assert texts == ['a"\n', "é"]
    assert [chunk.choices[0].token_ids for chunk in chunks[:-1]] == [[1], [2, 3]]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, "length"]
    if chat:
        assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", None]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5


@pytest.mark.parametrize("chat", [True, False])
def test_a_whole_answer_reads_as_the_client_expects(chat: bool) -> None:
    types = pytest.importorskip("openai.types")
    body = Answer(parse(chat), id="1", created_s=7).whole(
        [(Part("é", [4]), "stop")], Usage(prompt_tokens=2, completion_tokens=1)
    )
    data = json.loads(body)
    read = (types.chat.ChatCompletion if chat else types.Completion).model_validate(data)
    assert (read.choices[0].message.content if chat else read.choices[0].text) == "é"
    assert read.usage.completion_tokens == 1
    assert "token_ids" not in data["choices"][0]
