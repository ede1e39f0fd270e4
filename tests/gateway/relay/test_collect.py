"""A streamed answer, put together, is the answer that would have come in one piece."""

import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from chiron.gateway.relay.collect import CollectError, Collector

HEAD = {"id": "chatcmpl-1", "created": 7, "model": "m", "system_fingerprint": "fp"}


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(*choices: dict[str, Any], **top: Any) -> bytes:
    return event({**HEAD, "object": "chat.completion.chunk", "choices": list(choices), **top})


def said(text: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": None, **fields}


def end(reason: str = "stop", index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": {}, "finish_reason": reason}


STREAM = (
    chunk({"index": 0, "delta": {"role": "assistant", "content": ""}})
    + b": a comment\r\n\r\n"
    + chunk(said("Grüß", token_ids=[1, 2]))
    + chunk(said(" Gott", token_ids=[3]))
    + chunk(end())
    + chunk(usage={"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8})
    + b"data: [DONE]\n\n"
)


def collect(data: bytes, chat: bool = True, **options: Any) -> Collector:
    collector = Collector(chat, **options)
    collector.feed(data)
    return collector


def test_a_chat_answer() -> None:
    collector = collect(STREAM)
    assert collector.done
    assert collector.tokens == 3
    assert collector.token_ids == [1, 2, 3]
    answer = collector.result()
    assert answer == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüß Gott", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }
    ChatCompletion.model_validate(answer, strict=True)


@given(st.lists(st.integers(0, len(STREAM)), max_size=40), st.booleans())
def test_wherever_the_stream_is_split(cuts: list[int], crlf: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if crlf else STREAM
    edges = [0, *sorted(cuts), len(stream)]
    collector = Collector(True)
    for start, stop in pairwise(edges):
        collector.feed(stream[start:stop])
    assert collector.result() == collect(STREAM).result()


def test_several_choices_and_tool_calls() -> None:
    def tool(index: int, **fields: Any) -> dict[str, Any]:
        return {"index": 0, "delta": {"tool_calls": [{"index": index, **fields}]}}

    data = (
        chunk(tool(0, id="call_1", type="function", function={"name": "look", "arguments": ""}))
        + chunk(tool(0, function={"arguments": '{"q":'}), said("b", 1))
        + chunk(tool(1, id="call_2", type="function", function={"name": "go", "arguments": "{}"}))
        + chunk(tool(0, type="function", function={"name": "look", "arguments": '"x"}'}), said("c", 1))
        + chunk(end("tool_calls"), end("length", 1))
    )
    answer = collect(data).result()
    first, second = answer["choices"]
    assert first["message"]["content"] is None
    assert first["message"]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"q":"x"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "go", "arguments": "{}"}},
    ]
    assert second["message"]["content"] == "bc"
    assert second["finish_reason"] == "length"
    ChatCompletion.model_validate(answer, strict=True)


def test_fields_that_nobody_told_us_about_come_through() -> None:
    data = (
        chunk({"index": 0, "delta": {"reasoning_content": "let me"}})
        + chunk({"index": 0, "delta": {"reasoning_content": " think"}})
        + chunk(said("42"))
        + chunk({"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 13}, service_tier="flex")
    )
    answer = collect(data).result()
    assert answer["choices"][0]["message"]["reasoning_content"] == "let me think"
    assert answer["choices"][0]["stop_reason"] == 13
    assert answer["service_tier"] == "flex"


def test_log_probabilities_of_chats() -> None:
    def entry(token: str) -> dict[str, Any]:
        return {"token": token, "logprob": -0.5, "bytes": [97], "top_logprobs": []}

    data = (
        chunk(said("a", logprobs={"content": [entry("a")], "refusal": None}))
        + chunk(said("b", logprobs={"content": [entry("b")], "refusal": None}))
        + chunk(end())
    )
    assert collect(data).result()["choices"][0]["logprobs"] == {"content": [entry("a"), entry("b")]}


def test_a_completion() -> None:
    def part(text: str, reason: str | None = None, **fields: Any) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, **fields}
        return event({**HEAD, "object": "text_completion", "choices": [choice]})

    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
    collector = collect(part("one", logprobs=logprobs) + part(" two", "length", logprobs=logprobs), chat=False)
    answer = collector.result()
    assert answer["choices"][0]["text"] == "one two"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "a"]
    assert collector.tokens == 2
    Completion.model_validate(answer, strict=True)


def test_log_probabilities_are_not_merged_by_a_token_that_is_called_index() -> None:
    def part(logprob: float) -> bytes:
        logprobs = {"tokens": ["index"], "token_logprobs": [logprob], "top_logprobs": [{"index": logprob}]}
        return event({"choices": [{"index": 0, "text": "index", "logprobs": logprobs, "finish_reason": "stop"}]})

    answer = collect(part(0) + part(0), chat=False).result()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"index": 0}, {"index": 0}]


def test_of_several_choices_none_may_be_missing_and_none_is_gone_on_with() -> None:
    one = chunk(said("one", token_ids=[1])) + chunk(end())
    collector = Collector(True, several=True)
    collector.feed(one)
    assert collector.token_ids == []
    with pytest.raises(CollectError, match="ended before"):
        collector.result()
    collector.feed(chunk({**said("two"), "index": 1}) + chunk({**end(), "index": 1}) + b"data: [DONE]\n\n")
    assert [choice["message"]["content"] for choice in collector.result()["choices"]] == ["one", "two"]


def test_an_event_without_a_value_says_nothing() -> None:
    def text(text: str, index: int, reason: str | None = None) -> bytes:
        choice = {"text": text, "index": index, "logprobs": None, "finish_reason": reason}
        return event({**HEAD, "object": "text_completion", "choices": [choice]})

    # As llama.cpp begins its answer to a list of prompts.
    stream = event(None) + text("b", 1) + text("a", 0) + text("", 1, "length") + text("", 0, "length")
    assert [choice["text"] for choice in collect(stream, chat=False).result()["choices"]] == ["a", "b"]


def test_an_answer_over_two_streams() -> None:
    collector = Collector(True, keep_token_ids=True)
    first = chunk(said("one", token_ids=[1])) + chunk(said(" two", token_ids=[2]))
    collector.feed(first[:-10])
    assert collector.token_ids == [1]
    collector.resume()
    collector.feed(chunk(said(" two", token_ids=[2])) + chunk(end()))
    answer = collector.result()
    assert answer["choices"][0]["message"]["content"] == "one two"
    assert answer["choices"][0]["token_ids"] == [1, 2]
    collector.reset()
    assert collector.tokens == 0
    collector.feed(STREAM)
    assert collector.result()["choices"][0]["message"]["content"] == "Grüß Gott"


def test_an_answer_cut_off_is_no_answer() -> None:
    collector = collect(chunk(said("half")))
    assert not collector.done
    assert collector.partial()["choices"][0]["message"]["content"] == "half"
    assert collector.partial()["choices"][0]["finish_reason"] is None
    with pytest.raises(CollectError, match="ended before"):
        collector.result()
    with pytest.raises(CollectError, match="ended before"):
        Collector(True).result()


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_engine_gave_up_is_no_answer(reason: str) -> None:
    end = {"index": 0, "delta": {}, "finish_reason": reason}
    collector = collect(chunk(said("half")) + event({"choices": [end]}) + b"data: [DONE]\n\n")
    assert collector.finished
    with pytest.raises(CollectError, match="aborted the answer"):
        collector.result()


def test_an_error_in_the_stream() -> None:
    collector = collect(chunk(said("half")) + event({"error": {"message": "out of memory", "code": 500}}))
    assert collector.done
    assert collector.error == {"message": "out of memory", "code": 500}
    with pytest.raises(CollectError, match="out of memory"):
        collector.result()


@pytest.mark.parametrize(
    "data",
    [
        b"data: {nope\n\n",
        b"data: [1]\n\n",
        b'data: {"choices": [3]}\n\n',
        b'data: {"choices": [{"index": "x"}]}\n\n',
        b"data: \xff\n\n",
        b'data: {"error": {"code": 400, "input": %b}}\n\n' % (b"[" * 600 + b"]" * 600),
        b'data: {"choices": [{"delta": %b}]}\n\n' % (b'{"a":' * 900 + b"1" + b"}" * 900),
    ],
)
def test_a_stream_of_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(CollectError):
        collect(data)


def test_memory_is_bounded() -> None:
    collector = Collector(True, bytes_max=1000)
    with pytest.raises(CollectError, match="1000 bytes"):
        collector.feed(b"data: never ends" * 100)
    endless = Collector(True, bytes_max=1000)
    for _ in range(10):
        endless.feed(b"data: " + b"x" * 94)
    with pytest.raises(CollectError):
        endless.feed(b"x")


def cpu_s(work: Callable[[], None]) -> float:
    before_s = time.process_time()
    work()
    return time.process_time() - before_s


def test_a_line_that_does_not_end_costs_what_its_bytes_cost() -> None:
    def feed(pieces: int) -> None:
        collector = Collector(True)
        for _ in range(pieces):
            collector.feed(b"x" * 256)

    # Four times the bytes, sixteen times the work if each piece were joined to all before it.
    few, many = (min(cpu_s(lambda n=n: feed(n)) for _ in range(3)) for n in (7_000, 28_000))  # type: ignore[misc]
    assert many < 9 * few + 0.01


@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65530 + b"\n", b"data:\n" * 10_000])
def test_an_event_has_a_limit(piece: bytes) -> None:
    collector = Collector(True)

    def feed() -> None:
        for _ in range(200):
            collector.feed(piece)

    with pytest.raises(CollectError, match="larger than 8388608 bytes"):
        feed()


def test_many_events_have_none_of_it() -> None:
    collector = Collector(True)
    for _ in range(300):
        collector.feed(b": " + b"x" * 65536 + b"\n\n")
