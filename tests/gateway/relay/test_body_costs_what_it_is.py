"""A completion's body is measured without being built: whatever is in it counts, and it costs little to find out."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.gateway.batch.lines import line_check
from chiron.gateway.relay.body import MEDIA_BYTES, SMALL_BYTES, read_body
from chiron.gateway.relay.body_fields import STEERING
from chiron.gateway.relay.keys import ANONYMOUS
from chiron.store.port import ItemSpec
from effort import examples
from gateway_site import models

ATTACK = """
import json, sys, time
from chiron.gateway.relay.body import read_body
read_body(b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}', True)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
for unit in sys.argv[1:]:
    count = (30 << 20) // (len(unit) + 1)
    units = (unit + ",").encode() * (count - 1)
    body = b'{"model": "m", "messages": [{"role": "user", "content": [' + units + unit.encode() + b"]}]}"
    open("/proc/self/clear_refs", "w").write("5")  # The peak starts anew.
    before = peak()
    started_s = time.process_time()
    try:
        read_body(body, True)
    except ApiError:
        pass
    took_s = time.process_time() - started_s
    print(json.dumps({"unit": unit, "bytes": len(body), "grown": peak() - before, "seconds": took_s}))
"""
UNITS = [
    "[]",
    "{}",
    '""',
    '{"":0}',
    "0",
    '{"type":"text","text":"a"}',
    '"\\u4e2d"',
    '{"url":"a"}',
    '";base64,"',
    '"\\\\"',
]


@pytest.mark.slow
def test_a_body_of_30_mib_takes_little_memory_and_time_whatever_it_is_made_of() -> None:
    command = [sys.executable, "-c", ATTACK, *UNITS]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(UNITS)
    for one in found:
        assert one["bytes"] > 29 << 20
        # As objects it was 25 times its size, and took five seconds of the loop.
        assert one["grown"] < 8 << 20, one
        assert one["seconds"] < 1.0, one


def size(fields: dict[str, Any], chat: bool = True, padded: int = 0) -> int:
    """Bytes of text that a request counts as; ``padded``: with so many spaces that it is no small body any more."""
    raw = json.dumps(fields, ensure_ascii=False).encode()
    shape = read_body(raw[:-1] + b" " * padded + b"}", chat).shape
    assert not shape.token_ids
    return shape.text_bytes - padded


TEXT = "word " * 2000
SAID = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": TEXT}}]},
        {"functions": [{"name": "f", "description": TEXT}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": TEXT}}}},
        {"documents": [{"text": TEXT}]},
        {"guided_json": {"description": TEXT}},
        {"chat_template_kwargs": {"x": TEXT}},
        {"suffix": TEXT},
        {"stop": [TEXT]},
        {"whatever an engine may read": TEXT},
        {"messages": [SAID, {"role": "tool", "content": TEXT}]},
        {"messages": [SAID, {"role": "user", "content": [{"type": "text", "text": TEXT}]}]},
        {"messages": [SAID, {"role": "assistant", "tool_calls": [{"function": {"arguments": TEXT}}]}]},
        {"messages": [SAID, {"role": "assistant", "reasoning_content": TEXT}]},
        # What looks like an image where none can be is text.
        {"tools": [{"type": "function", "function": {"url": TEXT.replace(" ", "+")}}]},
    ],
)
@pytest.mark.parametrize("padded", [0, 2 * SMALL_BYTES])
def test_whatever_a_request_holds_counts(more: dict[str, Any], padded: int) -> None:
    plain = {"model": "m", "messages": [SAID]}
    longer = size({**plain, **more}, padded=padded) - size(plain, padded=padded)
    assert 0.9 * len(TEXT) < longer < 1.1 * len(TEXT) + 300


def test_the_frame_of_a_request_does_not_count() -> None:
    plain = {"model": "m", "messages": [SAID]}
    assert size({**plain, "max_tokens": 10, "temperature": 0.5, "stream": True}) == size(plain)


@pytest.mark.parametrize("padded", [0, 2 * SMALL_BYTES])
def test_an_image_counts_as_tokens_and_not_as_its_bytes(padded: int) -> None:
    def asked(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, *parts]}]}

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBOR/+" * 30_000}}
    linked = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    sound = {"type": "input_audio", "input_audio": {"data": "UklGR" * 20_000, "format": "wav"}}
    for part in (image, linked, sound):
        for count in (1, 3):
            more = size(asked(*[part] * count), padded=padded) - size(asked(), padded=padded)
            assert count * MEDIA_BYTES <= more < count * (MEDIA_BYTES + 200)


def test_escapes_count_as_what_they_stand_for() -> None:
    said = {"model": "m", "messages": [{"role": "user", "content": "中文" * 1000}]}
    escaped = read_body(json.dumps(said).encode(), True).shape.text_bytes
    assert escaped == size(said)


@pytest.mark.parametrize("padded", [0, 2 * SMALL_BYTES])
def test_ids_of_tokens_are_counted(padded: int) -> None:
    for prompt, count in (([1, 2, 3], 3), ([[1, 2], [3, 4, 5]], 5), ([7], 1), ([128_255] * 1000, 1000)):
        raw = json.dumps({"model": "m", "prompt": prompt}).encode()
        shape = read_body(raw[:-1] + b" " * padded + b"}", False).shape
        assert (shape.token_ids, shape.learnable_bytes) == (count, 0)
        assert shape.tokens(4.0) - count <= padded / 4


def test_a_line_of_a_batch_counts_as_the_same_request() -> None:
    body = {"model": "m", "messages": [SAID], "tools": [{"function": {"description": TEXT}}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    check = line_check("/v1/chat/completions", {"m": models().by_name["m"].settings}, ANONYMOUS)
    found = check(json.dumps(line).encode())
    assert isinstance(found, ItemSpec)
    assert found.input_bytes == size(body)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS,
    lambda each: st.lists(each) | st.dictionaries(TEXTS, each),
)


@settings(max_examples=examples(20))
@given(
    st.dictionaries(TEXTS, JSON, max_size=5),
    st.sampled_from([0, 1, 2 * SMALL_BYTES]),
    st.booleans(),
)
def test_values_are_replaced_in_place_and_nothing_else_changes(more: dict[str, Any], padded: int, ascii: bool) -> None:
    fields = {**more, "model": "m", "messages": [SAID], "stream_options": {"include_usage": False}, "n": 1}
    raw = json.dumps(fields, ensure_ascii=ascii).encode()
    body = read_body(b" " * padded + raw + b" \n", True)
    values: dict[str, Any] = {"model": "other", "stream": True, "stream_options": {"include_usage": True}}
    values["resume_token_ids"] = [1, 2]
    assert json.loads(body.with_values(values)) == {**fields, **values}


def test_of_a_field_that_is_given_twice_the_last_counts() -> None:
    raw = b'{"model": "a", "messages": [{"role": "user", "content": "x"}], "mod\\u0065l": "b"}'
    body = read_body(raw, True)
    assert body.shape.fields["model"] == "b"
    assert json.loads(body.with_values({"model": "c"}))["model"] == "c"


@pytest.mark.parametrize("padded", [0, 2 * SMALL_BYTES])
@pytest.mark.parametrize("name", [name for name in STEERING if name != "model"])
def test_each_field_that_steers_a_request_is_found_in_small_bodies_and_in_large_ones(name: str, padded: int) -> None:
    value = {"stream": True, "stream_options": {"include_usage": False}, "service_tier": "flex"}.get(name)
    value = (name == "return_token_ids" or 3) if value is None else value
    raw = json.dumps({"model": "m", "messages": [SAID], name: value}).encode()
    assert read_body(b" " * padded + raw, True).shape.fields == {"model": "m", name: value}
