"""What clients send to a running ``chiron serve``: classes, keys, limits, and requests that are wrong in every way."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from chiron.engines.metrics import parse_metrics
from edge_site import SECRETS, Said, ask, chat, edge_site
from fault_site import FaultSite, wait_for

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    with edge_site(tmp_path_factory.mktemp("edge")) as running:
        yield running
        check_secrets(running)
        log = running.log.read_text()
    assert "Traceback" not in log, log


def check_secrets(site: FaultSite) -> None:
    """No key is anywhere: not in logs, events, status or metrics, and no hash either."""
    found = [site.log.read_bytes()]
    found += [ask(site.url + path, key="admin").body for path in ("/chiron/status", "/metrics", "/openapi.json")]
    files = [path for path in (site.directory / "chiron-data").rglob("*") if path.is_file()]
    assert any(path.name.startswith("events") for path in files)
    found += [path.read_bytes() for path in files]
    for name, secret in SECRETS.items():
        assert not any(secret.encode() in text for text in found), name
    assert not any(b"sha256:" in text for text in found)


def arrived(site: FaultSite) -> dict[str, float]:
    """Requests so far, by class."""
    page = ask(site.url + "/metrics", key="admin").body.decode()
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line.startswith("chiron_requests_arrived_total{"):
            cls = line.partition('class="')[2].partition('"')[0]
            found[cls] = found.get(cls, 0.0) + float(line.rpartition(" ")[2])
    return found


def post(site: FaultSite, data: object, path: str = CHAT, key: str = "all", **headers: str) -> Said:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ask(site.url + path, data, key=key, headers=named)


@pytest.mark.parametrize(
    ("fields", "headers", "cls"),
    [
        ({}, {}, "chat"),
        ({"service_tier": "auto"}, {}, "chat"),
        ({"service_tier": "flex"}, {}, "batch"),
        ({"service_tier": "flex", "stream": True}, {}, "batch"),
        ({}, {"x_chiron_class": "fast"}, "fast"),
        ({}, {"x_chiron_class": "batch"}, "batch"),
        ({"service_tier": "flex"}, {"x_chiron_class": "fast"}, "fast"),
        ({}, {"x_slo_tpot_ms": "25"}, "fast"),
        ({}, {"x_slo_tpot_ms": "1"}, "fast"),
        ({}, {"x_slo_tpot_ms": "1000000"}, "chat"),
        ({}, {"x_slo_ttft_ms": "1.5"}, "chat"),
        ({}, {"x_slo_ttft_ms": "0.001", "x_slo_tpot_ms": "0.001"}, "fast"),
        ({}, {"x_chiron_class": "batch", "x_slo_ttft_ms": "100", "x_slo_tpot_ms": "0.001"}, "batch"),
        ({"model": "gpt-4o"}, {}, "chat"),
    ],
)
def test_the_class_of_a_request(site: FaultSite, fields: dict[str, Any], headers: dict[str, str], cls: str) -> None:
    before = arrived(site)
    answer = post(site, chat(**fields), **headers)
    assert answer.status == 200, answer
    after = arrived(site)
    assert {name for name in after if after[name] > before.get(name, 0.0)} == {cls}


@pytest.mark.parametrize(
    "value", ["", "abc", "-1", "0", "nan", "inf", "1e400", "1e-300", "3600001", "1,5", "\xb2", "5 ms"]
)
@pytest.mark.parametrize("name", ["x_slo_ttft_ms", "x_slo_tpot_ms"])
def test_slo_headers_that_are_no_promise(site: FaultSite, name: str, value: str) -> None:
    error = post(site, chat(), **{name: value}).error
    assert (error["type"], name.replace("_", "-") in error["message"]) == ("invalid_request_error", True)


def test_classes_and_models_that_are_not_there(site: FaultSite) -> None:
    unknown = post(site, chat(), x_chiron_class="gold")
    assert (unknown.status, unknown.error["type"]) == (400, "invalid_request_error")
    assert unknown.error["message"].endswith("'gold' is no class of 'big'; allowed: chat, fast, batch")
    for path in (CHAT, TEXT):
        missing = post(site, chat(model="nope", prompt="x"), path)
        assert (missing.status, missing.error["code"], missing.error["param"]) == (404, "model_not_found", "model")


NESTED = b'{"model":"big","messages":[{"role":"user","content":"x"}],"metadata":'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"NaN",
        b'{"model": "big", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"model": "big", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "big", "messages": [{"role": "user", "content": "x"}],}',
        b'{"model": "big", "messages": [{"role": "user", "content": "x\x00"}]}',
        b"\xef\xbb\xbf{}",
        b"\x1f\x8b\x08\x00",
        b"{}",
        {"messages": []},
        chat(model=None),
        chat(model=5),
        chat(model=["big"]),
        chat(messages=None),
        chat(messages=[]),
        chat(messages="hello"),
        chat(messages={"role": "user"}),
        chat(messages=[None]),
        chat(messages=[[]]),
        chat(messages=["x"]),
        chat(messages=[{}]),
        chat(messages=[{"role": "user", "content": 5}]),
        chat(messages=[{"role": "user", "content": [5]}]),
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": 5}]}]),
        chat(max_tokens=-1),
        chat(max_tokens="many"),
        chat(max_tokens=1.5),
        chat(max_tokens=10**40),
        chat(temperature="hot"),
        chat(temperature=1e308),
        chat(stream="yes"),
        chat(stream=1),
        chat(stream=[[[]]]),
        chat(stream_options=5),
        chat(stream=True, stream_options="x"),
        chat(stop=5),
        chat(seed=10**30),
        NESTED + b"[" * 300 + b"]" * 300 + b"}",
        NESTED + b"[" * 5000 + b"]" * 5000 + b"}",
        NESTED + b'{"a":' * 900 + b"1" + b"}" * 901,
        b"[" * 1_000_000,
    ],
)
@pytest.mark.parametrize("tier", ["", "flex"])
def test_bodies_that_are_wrong_are_400_whatever_the_class(site: FaultSite, data: object, tier: str) -> None:
    if tier and isinstance(data, dict):
        data = data | {"service_tier": tier}
    if tier and isinstance(data, bytes) and data.startswith(b'{"model"'):
        data = data.replace(b'{"model"', b'{"service_tier":"flex","model"', 1)
    answer = post(site, data)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), answer
    assert len(answer.body) < 2000


@pytest.mark.parametrize("prompt", [None, 5, {}, [], [None], ["x", 5], [1.5], [["x"]], [[-1]], [10**30], [True, "x"]])
def test_prompts_that_are_wrong_are_400(site: FaultSite, prompt: object) -> None:
    answer = post(site, {"model": "big", "prompt": prompt, "max_tokens": 2}, TEXT)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), answer


def test_fields_that_nobody_knows_and_odd_but_fine_values_pass(site: FaultSite) -> None:
    odd = {"user": "\u0000\U0001f600", "metadata": {"a": [1e300, -(2**63), None]}, "unheard_of": True, "": 1}
    for fields in (odd, {"stream_options": None}, {"stop": ["\u0000"]}, {"temperature": 0}, {"max_tokens": 1}):
        assert post(site, chat(**fields)).status == 200, fields
    assert post(site, {"model": "big", "prompt": [1, 2, 3], "max_tokens": 2}, TEXT).status == 200


def test_without_a_key_with_a_wrong_one_and_with_one_for_something_else(site: FaultSite) -> None:
    missing, wrong = post(site, chat(), key=""), post(site, chat(), key="sk-nobody")
    for refused in (missing, wrong):
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    assert "sk-nobody" not in wrong.body.decode()
    for key, fields in (
        ("small-only", chat()),
        ("chat-only", chat(service_tier="flex")),
        ("small-only", chat(model="gpt-4o")),
    ):
        refused = post(site, fields, key=key)
        assert (refused.status, refused.error["code"]) == (403, "permission_denied"), key
    assert post(site, chat(), key="chat-only", x_chiron_class="fast").status == 403
    assert post(site, chat(model="small"), key="small-only").status == 200
    assert post(site, chat(), key="admin").status == 200
    assert [m["id"] for m in ask(site.url + "/v1/models", key="small-only").json["data"]] == ["small"]


def test_the_admins_pages_are_the_admins(site: FaultSite) -> None:
    for path in ("/chiron/status", "/metrics"):
        assert [ask(site.url + path, key=key).status for key in ("", "all", "admin")] == [401, 403, 200]
    assert [ask(site.url + "/chiron/drain", b"", key=key).status for key in ("", "all")] == [401, 403]
    assert [ask(site.url + path).status for path in ("/health", "/ready", "/openapi.json")] == [200] * 3


def test_rate_limits_say_when_to_come_back(site: FaultSite) -> None:
    statuses = [post(site, chat(), key="few") for _ in range(4)]
    assert [answer.status for answer in statuses] == [200, 200, 429, 429]
    refused = statuses[-1]
    assert refused.error["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
    long = {"role": "user", "content": "word " * 100}
    assert [post(site, chat(messages=[long]), key="poor").status for _ in range(2)] == [200, 429]


def test_other_methods_and_paths(site: FaultSite) -> None:
    refused = ask(site.url + CHAT, key="all")
    assert (refused.status, refused.headers["allow"]) == (405, "POST")
    for path in (
        "/",
        "/v1",
        "/v1/chat/completions/",
        "/v1//completions",
        "/%2e%2e/etc/passwd",
        "/v1/models/%0d%0aevil:1",
    ):
        answer = ask(site.url + path, key="all")
        assert (answer.status, answer.error["type"]) == (404, "not_found_error"), path
        assert "evil" not in answer.headers


def test_what_is_sent_back_of_a_header_or_a_name_cannot_make_a_header(site: FaultSite) -> None:
    form = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\ncontent-disposition: form-data; '
        b'name="file"; filename="a%0d%0aevil: 1\\"; x=y.jsonl"\r\n\r\n{}\n\r\n--b--\r\n'
    )
    kind = {"content-type": "multipart/form-data; boundary=b"}
    made = ask(site.url + "/v1/files", form, key="all", headers=kind)
    assert made.status == 200, made
    content = ask(f"{site.url}/v1/files/{made.json['id']}/content", key="all")
    assert (content.status, content.body, "evil" in content.headers) == (200, b"{}\n", False)
    assert post(site, chat(), x_request_id="mine\tand: more").status == 200


def test_limits_of_the_server(site: FaultSite) -> None:
    assert post(site, chat(), x_long="y" * 70_000).status == 431
    many = {f"x_{number}": "y" for number in range(120)}
    assert post(site, chat(), **many).status == 431
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 40000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_many_odd_promises_leave_nothing_behind(site: FaultSite) -> None:
    def metrics() -> str:
        return ask(site.url + "/metrics", key="admin").body.decode()

    def classes() -> set[str]:
        """That series have as a label. What was decided meanwhile has series of its own."""
        return set(re.findall(r'[{,]class="([^"]*)"', metrics()))

    post(site, chat())
    for number in range(200):
        assert post(site, chat(max_tokens=1), x_slo_tpot_ms=f"{10 + number * 0.37}").status == 200
    assert "chat" in classes() <= {"chat", "fast", "batch"}
    status = ask(site.url + "/chiron/status", key="admin").json
    assert {cls["name"] for model in status["models"] for cls in model.get("classes", [])} <= {"chat", "fast", "batch"}


def test_tokens_in_the_metrics_are_the_answers(site: FaultSite) -> None:
    def tokens() -> float:
        return parse_metrics(ask(site.url + "/metrics", key="admin").body.decode())["chiron_generation_tokens_total"]

    before, made = tokens(), 0
    for number in range(1, 6):
        usage = post(site, chat(max_tokens=number * 3, ignore_eos=True)).json["usage"]
        assert usage["completion_tokens"] == number * 3
        made += number * 3
    for options in ({}, {"stream_options": {"include_usage": True}}):
        said = post(site, chat(max_tokens=17, ignore_eos=True, stream=True, **options)).body
        assert said.endswith(b"data: [DONE]\n\n")
        made += 17
    wait_for(lambda: tokens() >= before + made, "all are counted")
    assert tokens() == before + made


def test_a_client_that_leaves_frees_the_engine(site: FaultSite) -> None:
    def cancelled() -> float:
        found = ask(site.url + "/chiron/status", key="admin").json
        urls = [i["url"] for model in found["models"] for i in model["instances"]]
        pages = [parse_metrics(ask(url + "/metrics").body.decode()) for url in urls]
        return sum(page["chiron:engine_cancelled_requests_total"] for page in pages)

    before = cancelled()
    data = json.dumps(chat(max_tokens=100_000, ignore_eos=True, stream=True)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head % (SECRETS["all"].encode(), len(data)) + data)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert cancelled() == before
    wait_for(lambda: cancelled() == before + 1, "the engine is free")
