"""Files by the official ``openai`` client, and by clients that do odd things."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import openai
import pytest

from chiron.gateway.api.state import ApiLimits
from chiron.gateway.settings import BatchSettings
from gateway_site import ApiSite, two_keys
from official_client import official_client


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ApiSite]:
    with ApiSite(tmp_path) as site:
        yield site


def client(site: ApiSite, key: str = "sk-any") -> openai.OpenAI:
    return official_client(site.url, key)


def form(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(
        b"--XX\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), body) for head, body in parts
    )


def post(site: ApiSite, body: bytes, kind: str = "multipart/form-data; boundary=XX") -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=60)
    with closing(connection):
        connection.request("POST", "/v1/files", body, {"content-type": kind})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_a_file_there_and_back(site: ApiSite) -> None:
    data = bytes(range(256)) * 5000
    with client(site) as api:
        file = api.files.create(file=("Übung.jsonl", data), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.object) == (len(data), "Übung.jsonl", "batch", "file")
        assert api.files.retrieve(file.id) == file
        assert api.files.content(file.id).content == data
        assert api.files.list().data == [file]
        deleted = api.files.delete(file.id)
        assert (deleted.id, deleted.deleted) == (file.id, True)
        for call in (api.files.retrieve, api.files.content, api.files.delete):
            with pytest.raises(openai.NotFoundError) as caught:
                call(file.id)
            assert caught.value.type == "not_found_error"


def test_lists_come_in_pages_both_ways(site: ApiSite) -> None:
    with client(site) as api:
        ids = [api.files.create(file=b"x", purpose=purpose).id for purpose in ("batch", "user_data", "batch")]
        assert [file.id for file in api.files.list(limit=1)] == ids[::-1]
        assert [file.id for file in api.files.list(limit=2, order="asc")] == ids
        assert [file.id for file in api.files.list(purpose="batch")] == [ids[2], ids[0]]
        assert api.files.list(after=ids[1]).data[0].id == ids[0]
        for bad in ({"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError) as caught:
                api.files.list(**bad)  # type: ignore[arg-type]
            assert caught.value.param == next(iter(bad))
        with pytest.raises(openai.NotFoundError):
            api.files.list(after="file-none")


def test_the_purpose_may_come_after_the_file(site: ApiSite) -> None:
    parts = form(('name="file"; filename="a.jsonl"', b"data"), ('name="purpose"', b"batch")) + b"--XX--\r\n"
    status, file = post(site, parts)
    assert (status, file["purpose"], file["bytes"]) == (200, "batch", 4)
    with client(site) as api:
        assert api.files.retrieve(file["id"]).purpose == "batch"


FILE = ('name="file"; filename="a.jsonl"', b"data")
PURPOSE = ('name="purpose"', b"batch")
END = b"--XX--\r\n"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(FILE) + END, "purpose"),
        (form(PURPOSE) + END, "file"),
        (form(FILE, ('name="purpose"', b"lunch")) + END, "purpose"),
        (form(PURPOSE, FILE, FILE) + END, "file"),
        (form(PURPOSE, PURPOSE, FILE) + END, "purpose"),
        (form(PURPOSE, ('name="file"', b"data")) + END, "file"),
        (form(PURPOSE, FILE, ('name="extra"', b"1")) + END, "field"),
        (form(("name=purpose; filename=p", b"batch"), FILE) + END, "purpose"),
        (form(PURPOSE, FILE), None),
        (form(PURPOSE, FILE)[:-20], None),
        (b"garbage", None),
        (b"", None),
        (form(('name="purpose"', b"x" * 5000), FILE) + END, "purpose"),
        (form(("nothing", b"x")) + END, None),
        (form(*[('name="purpose"', b"batch")] * 40) + END, None),
    ],
)
def test_forms_that_are_not_right_say_what_is_wrong(site: ApiSite, body: bytes, param: str | None) -> None:
    status, answer = post(site, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    with client(site) as api:
        assert api.files.list().data == []


def expiring(**changes: object) -> dict[str, Any]:
    return {"anchor": "created_at", "seconds": 3600} | changes


def test_a_file_goes_when_its_time_is_over(site: ApiSite) -> None:
    with client(site) as api:
        kept = api.files.create(file=b"kept", purpose="batch")
        file = api.files.create(file=b"short", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
        assert kept.expires_at is None
        assert file.expires_at == file.created_at + 3600
        assert api.files.retrieve(file.id) == file
        site.pass_time(3590)
        assert {each.id for each in api.files.list()} == {kept.id, file.id}
        site.pass_time(20)
        end_s = monotonic() + 60
        while file.id in {each.id for each in api.files.list()}:
            assert monotonic() < end_s
        for call in (api.files.retrieve, api.files.content, api.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        assert api.files.content(kept.id).content == b"kept"


@pytest.mark.parametrize(
    ("expiry", "message"),
    [
        (expiring(seconds=3599), "expires_after.seconds is 3599; it must be an integer from 3600 to 2592000."),
        (expiring(seconds=2_592_001), "expires_after.seconds is 2592001; "),
        (expiring(seconds=3600.5), "expires_after.seconds is '3600.5'; "),
        (expiring(seconds=10**20), "expires_after.seconds is '100000000000000000000'; "),
        (expiring(seconds=-3600), "expires_after.seconds is '-3600'; "),
        (expiring(seconds="soon"), "expires_after.seconds is 'soon'; "),
        (expiring(anchor="last_active_at"), "expires_after.anchor is 'last_active_at'; it must be 'created_at'."),
        ({"seconds": 3600}, "expires_after.anchor is missing; "),
        ({"anchor": "created_at"}, "expires_after.seconds is missing; "),
    ],
)
def test_an_expiry_that_is_not_right_is_refused(site: ApiSite, expiry: dict[str, Any], message: str) -> None:
    with client(site) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.files.create(file=b"x", purpose="batch", expires_after=expiry)  # type: ignore[arg-type]
        assert (caught.value.param, caught.value.type) == ("expires_after", "invalid_request_error")
        assert message in caught.value.message
        assert api.files.list().data == []


def test_the_expiry_may_come_after_the_file(site: ApiSite) -> None:
    anchor = ('name="expires_after[anchor]"', b"created_at")
    for seconds, status in ((b"7200", 200), (b"1", 400)):
        late = form(PURPOSE, FILE, anchor, ('name="expires_after[seconds]"', seconds)) + END
        assert post(site, late)[0] == status
    with client(site) as api:
        (file,) = api.files.list()
        assert file.expires_at == file.created_at + 7200


def test_other_content_types_are_refused(site: ApiSite) -> None:
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300, "x\u00ff"):
        assert post(site, b"{}", kind)[0] == 400


def test_a_path_in_a_filename_is_dropped(site: ApiSite) -> None:
    _, file = post(site, form(('name="file"; filename="../../etc/passwd"', b"x"), PURPOSE) + END)
    assert file["filename"] == "passwd"


def test_a_file_too_large_is_refused_before_and_while_it_comes(tmp_path: Path) -> None:
    with ApiSite(tmp_path, batch=BatchSettings(file_max_bytes=100_000)) as site:
        with client(site) as api:
            assert api.files.create(file=b"x" * 100_000, purpose="batch").bytes == 100_000
            for size in (100_001, 300_000):
                with pytest.raises(openai.APIStatusError) as caught:
                    api.files.create(file=b"x" * size, purpose="batch")
                assert caught.value.status_code == 413
                assert caught.value.code == "request_too_large"
            assert len(api.files.list().data) == 1
        assert len(list(tmp_path.rglob("file-*"))) == 1


def test_an_upload_that_stalls_or_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with ApiSite(tmp_path, limits=ApiLimits(upload_stall_s=0.3)) as site:
        host, port = site.url.removeprefix("http://").split(":")
        head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=XX\r\n"
        start = head + b"content-length: 10000\r\n\r\n" + form(PURPOSE, FILE)
        with socket.create_connection((host, int(port)), timeout=60) as stalled:
            stalled.sendall(start)
            assert b" 408 " in stalled.recv(1000)
        with socket.create_connection((host, int(port)), timeout=60) as gone:
            gone.sendall(start)
        with client(site) as api:
            assert api.files.list().data == []
    assert not list(tmp_path.rglob("file-*"))


def test_too_many_uploads_at_once_get_429(tmp_path: Path) -> None:
    with ApiSite(tmp_path, limits=ApiLimits(uploads_max=1, upload_stall_s=60)) as site:
        host, port = site.url.removeprefix("http://").split(":")
        head = b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=XX\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as first:
            first.sendall(head + b"content-length: 10000\r\nexpect: 100-continue\r\n\r\n")
            assert first.recv(1000).startswith(b"HTTP/1.1 100 "), "it is being read"
            with client(site) as api, pytest.raises(openai.RateLimitError) as refused:
                api.files.create(file=b"x", purpose="batch")
            assert refused.value.response.headers["retry-after"] == "2"


def test_a_key_sees_its_own_files_only(tmp_path: Path) -> None:
    with (
        ApiSite(tmp_path, keys=two_keys()) as site,
        client(site, "sk-a") as a,
        client(site, "sk-b") as b,
        client(site, "sk-admin") as admin,
    ):
        file = a.files.create(file=b"mine", purpose="batch")
        assert b.files.list().data == []
        for call in (b.files.retrieve, b.files.content, b.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        assert admin.files.content(file.id).content == b"mine"
        status, _ = post(site, b"")
        assert status == 401
