"""Batches as users of the official ``openai`` client run them."""

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from chiron.gateway.settings import BatchSettings
from gateway_site import ApiSite, jsonl, line, two_keys
from official_client import official_client

ENDPOINT = "/v1/chat/completions"


def client(site: ApiSite, key: str = "sk-any") -> openai.OpenAI:
    return official_client(site.url, key)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ApiSite]:
    with ApiSite(tmp_path) as site:
        yield site


def submit(api: openai.OpenAI, data: bytes, window: str = "30m", **options: Any) -> Any:
    file = api.files.create(file=("in.jsonl", data), purpose="batch")
    return api.batches.create(
        input_file_id=file.id,
        endpoint=options.pop("endpoint", ENDPOINT),
        completion_window=window,  # type: ignore[arg-type]
        **options,
    )


def wait(api: openai.OpenAI, id: str, *until: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = api.batches.retrieve(id)
        if batch.status in (until or ("completed", "failed", "expired", "cancelled")):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"still {batch.status}: {batch.request_counts}")


def wait_for_one(api: openai.OpenAI, id: str) -> None:
    """Until an item is done."""
    deadline = time.monotonic() + 60
    while api.batches.retrieve(id).request_counts.completed < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def results(api: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in api.files.content(file_id).text.splitlines()]


def test_a_batch_from_upload_to_results(site: ApiSite) -> None:
    with client(site) as api:
        batch = submit(api, jsonl(*(line(f"id-{i}", f"word {i}") for i in range(40))), metadata={"team": "x"})
        assert batch.status == "validating"
        assert batch.metadata == {"team": "x"}
        assert batch.expires_at - batch.created_at == 1800
        batch = wait(api, batch.id)
        assert batch.status == "completed"
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (40, 40, 0)
        assert batch.model == "m"
        assert batch.error_file_id is None
        lines = results(api, batch.output_file_id)
        assert [each["custom_id"] for each in lines] == [f"id-{i}" for i in range(40)]
        answer = lines[7]["response"]
        assert answer["status_code"] == 200
        assert answer["body"]["choices"][0]["message"]["content"] == "WORD7"
        assert answer["body"]["usage"]["completion_tokens"] == 2
        assert lines[7]["error"] is None
        assert len({each["id"] for each in lines}) == 40
        assert batch.chiron["eta_s"] is None
        assert api.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_what_fails_stands_in_the_error_file(tmp_path: Path) -> None:
    def answer(text: str) -> Any:
        if text == "bad":
            return 400, b'{"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": null}}'
        return {"long": "rejected", "poison": "failed"}.get(text, text)

    with ApiSite(tmp_path, answer=answer) as site, client(site) as api:
        batch = submit(api, jsonl(line("a", "fine"), line("b", "bad"), line("c", "long"), line("d", "poison")))
        batch = wait(api, batch.id)
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
        assert [each["custom_id"] for each in results(api, batch.output_file_id)] == ["a"]
        bad, long, poison = results(api, batch.error_file_id)
        assert bad["response"]["status_code"] == 400
        assert bad["response"]["body"]["error"]["message"] == "no"
        assert long["response"] is None
        assert long["error"]["code"] == "context_length_exceeded"
        assert poison["error"]["code"] == "request_failed"
        assert "2 attempts" in poison["error"]["message"]
        assert site.plane.submitted.count("poison") == 2


def test_a_bad_file_fails_with_line_numbers(site: ApiSite) -> None:
    bad = [
        b"{nope\n",
        jsonl(line("x")).replace(b"POST", b"GET"),
        jsonl(line("y", model="other")),
        jsonl(line("z", stream=True)),
        jsonl(line("x2") | {"url": "/v1/completions"}),
        jsonl(line("")),
        jsonl(line("t", max_tokens=0)),
        jsonl(line("u") | {"body": [1]}),
        jsonl(line("v", model="chat-only")),
        jsonl(line("w", messages=[])),
        jsonl(line("deep", metadata=0)).replace(b'"metadata": 0', b'"metadata": ' + b"[" * 300 + b"]" * 300),
    ]
    with client(site) as api:
        batch = wait(api, submit(api, b"\n".join([jsonl(line("ok")).strip(), *(b.strip() for b in bad)])).id)
        assert batch.status == "failed"
        assert batch.failed_at is not None
        assert batch.errors is not None
        found = {error.line: (error.code, error.param) for error in batch.errors.data}
        assert found == {
            2: ("invalid_json_line", None),
            3: ("invalid_method", "method"),
            4: ("model_not_found", "body.model"),
            5: ("invalid_request", "body.stream"),
            6: ("invalid_url", "url"),
            7: ("invalid_request", "custom_id"),
            8: ("invalid_request", "body.max_tokens"),
            9: ("invalid_request", "body"),
            10: ("model_not_found", "body.model"),
            11: ("invalid_request", "body.messages"),
            12: ("invalid_json_line", None),
        }


def test_a_batch_can_be_cancelled_and_keeps_what_is_done(tmp_path: Path) -> None:
    with ApiSite(tmp_path, answer=lambda text: text if text == "quick" else None) as site, client(site) as api:
        batch = submit(api, jsonl(line("a", "quick"), line("b", "slow"), line("c", "slow")))
        wait_for_one(api, batch.id)
        assert api.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = wait(api, batch.id, "cancelled")
        assert [each["custom_id"] for each in results(api, batch.output_file_id)] == ["a"]
        errors = results(api, batch.error_file_id)
        assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [
            ("b", "batch_cancelled"),
            ("c", "batch_cancelled"),
        ]
        done = wait(api, submit(api, jsonl(line("q", "quick"))).id, "completed")
        with pytest.raises(openai.ConflictError):
            api.batches.cancel(done.id)


def test_a_batch_that_is_late_keeps_what_is_done(tmp_path: Path) -> None:
    with ApiSite(tmp_path, answer=lambda text: text if text == "quick" else None) as site, client(site) as api:
        batch = submit(api, jsonl(line("a", "quick"), line("b", "slow")))
        wait_for_one(api, batch.id)
        site.pass_time(3600.0)
        batch = wait(api, batch.id)
        assert batch.status == "expired"
        assert [each["custom_id"] for each in results(api, batch.output_file_id)] == ["a"]
        assert [each["error"]["code"] for each in results(api, batch.error_file_id)] == ["batch_expired"]
        assert not site.plane.open


def test_completions_and_aliases(site: ApiSite) -> None:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"model": "alias", "prompt": each}}
        for i, each in enumerate(("a text", [1, 2, 3]))
    ]
    with client(site) as api:
        batch = wait(api, submit(api, jsonl(*lines), endpoint="/v1/completions").id)
        assert batch.status == "completed"
        assert {each["response"]["body"]["object"] for each in results(api, batch.output_file_id)} == {
            "text_completion"
        }


def test_lists_come_in_pages(site: ApiSite) -> None:
    with client(site) as api:
        ids = [submit(api, jsonl(line("a"))).id for _ in range(5)]
        page = api.batches.list(limit=2)
        assert [batch.id for batch in page.data] == [ids[4], ids[3]]
        assert page.has_more
        assert [batch.id for batch in api.batches.list(limit=2)] == ids[::-1]
        assert [batch.id for batch in api.batches.list(after=ids[1])] == [ids[0]]
        raw = api.batches.with_raw_response.list(limit=5).http_response.json()
        assert (raw["first_id"], raw["last_id"], raw["has_more"]) == (ids[4], ids[0], False)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0.01s"}, "completion_window"),
        ({"completion_window": "90d"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": True}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600, "more": 1}}, "output_expires_after"),
        ({"output_expires_after": 3600}, "output_expires_after"),
        ({"extra": 1}, "extra"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_bad_batches_are_refused_with_the_field(site: ApiSite, change: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": ENDPOINT, "completion_window": "24h"} | change
    with client(site) as api, pytest.raises(openai.BadRequestError) as caught:
        api.post("/batches", body=body, cast_to=dict)
    assert caught.value.param == param


def test_results_go_when_their_time_is_over_and_an_input_not_before_its_batch_has_ended(tmp_path: Path) -> None:
    held: list[bool] = [True]
    with ApiSite(tmp_path, answer=lambda text: None if held else text.upper()) as site, client(site) as api:
        expiry: Any = {"anchor": "created_at", "seconds": 3600}
        file = api.files.create(file=("in.jsonl", jsonl(line("a"))), purpose="batch", expires_after=expiry)
        batch = api.batches.create(
            input_file_id=file.id,
            endpoint=ENDPOINT,  # type: ignore[arg-type]
            completion_window="24h",
            output_expires_after=expiry,
        )
        unused = api.files.create(file=b"x", purpose="batch", expires_after=expiry)
        wait(api, batch.id, "in_progress")
        site.pass_time(7200)
        gone(api, unused.id)
        assert api.files.retrieve(file.id) == file
        held.clear()
        site.release()
        batch = wait(api, batch.id)
        output = api.files.retrieve(batch.output_file_id)
        assert output.expires_at == output.created_at + 3600
        assert len(results(api, output.id)) == 1
        gone(api, file.id)
        site.pass_time(3700)
        gone(api, output.id)
        assert api.batches.retrieve(batch.id).status == "completed"


def gone(api: openai.OpenAI, file_id: str) -> None:
    """It is, after a while."""
    end_s = time.monotonic() + 60
    while file_id in {file.id for file in api.files.list()}:
        assert time.monotonic() < end_s
    for call in (api.files.retrieve, api.files.content):
        with pytest.raises(openai.NotFoundError):
            call(file_id)


def test_input_files_must_exist_and_be_for_batches(site: ApiSite) -> None:
    with client(site) as api:
        with pytest.raises(openai.NotFoundError) as missing:
            api.batches.create(input_file_id="file-no", endpoint=ENDPOINT, completion_window="24h")
        assert missing.value.param == "input_file_id"
        file = api.files.create(file=b"x", purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            api.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        expiry = {"anchor": "created_at", "seconds": 3600}
        assert submit(api, jsonl(line("a")), output_expires_after=expiry).id


def test_keys_see_their_own_batches_and_use_their_own_models(tmp_path: Path) -> None:
    with (
        ApiSite(tmp_path, keys=two_keys()) as site,
        client(site, "sk-a") as a,
        client(site, "sk-b") as b,
        client(site, "sk-admin") as admin,
    ):
        mine = submit(a, jsonl(line("x"), line("y", model="org/n"), line("z", model="none")))
        with pytest.raises(openai.NotFoundError):
            b.batches.retrieve(mine.id)
        with pytest.raises(openai.NotFoundError):
            b.batches.cancel(mine.id)
        assert list(b.batches.list()) == []
        failed = wait(a, mine.id)
        assert failed.status == "failed"
        assert [(e.line, e.code) for e in failed.errors.data] == [(2, "permission_denied"), (3, "model_not_found")]
        assert failed.errors.data[1].message.endswith("models served here: m.")
        assert wait(b, submit(b, jsonl(line("y", model="org/n"))).id).status == "completed"
        assert len(list(admin.batches.list())) == 2
        with pytest.raises(openai.PermissionDeniedError, match=r"another API key.*one key") as caught:
            admin.batches.create(input_file_id=mine.input_file_id, endpoint=ENDPOINT, completion_window="24h")
        assert caught.value.param == "input_file_id"
        with pytest.raises(openai.AuthenticationError), client(site, "sk-wrong") as stranger:
            stranger.batches.list()


def test_a_window_shorter_or_longer_than_allowed_says_what_is(tmp_path: Path) -> None:
    settings = BatchSettings(completion_window_min_s=60.0, completion_window_max_s=7200.0)
    with ApiSite(tmp_path, batch=settings) as site, client(site) as api:
        with pytest.raises(openai.BadRequestError, match="from 1m to 2h"):
            submit(api, jsonl(line("a")), window="3h")
        assert submit(api, jsonl(line("a")), window="1h30m").completion_window == "1h30m"


def test_a_damaged_output_is_an_error_that_names_it(tmp_path: Path) -> None:
    with ApiSite(tmp_path) as site, client(site) as api:
        batch = wait(api, submit(api, jsonl(*(line(f"id-{i}") for i in range(4)))).id)
        with sqlite3.connect(tmp_path / "batch.sqlite3") as db:
            db.execute("UPDATE results SET line = CAST(replace(line, 'id-2', 'id-3') AS BLOB)")
        db.close()
        with pytest.raises(openai.InternalServerError) as raised:
            api.files.content(batch.output_file_id)
        error = raised.value
        assert (error.status_code, error.code, error.type) == (500, "data_damaged", "server_error")
        for name in (batch.id, batch.output_file_id, "line 3"):
            assert name in error.message
        assert api.batches.retrieve(batch.id).status == "completed"
