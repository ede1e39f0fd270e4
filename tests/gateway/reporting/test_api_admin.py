"""Models, health, the admin's pages, and what is not there."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from chiron.gateway.api.app import api_routes
from gateway_site import ApiSite, two_keys
from official_client import official_client

ADMINS = (("/chiron/status", "GET"), ("/chiron/drain", "POST"), ("/chiron/undrain", "POST"), ("/metrics", "GET"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ApiSite]:
    with ApiSite(tmp_path) as site:
        yield site


def ask(site: ApiSite, path: str, method: str = "GET", key: str = "") -> tuple[int, Any, Any]:
    request = urllib.request.Request(site.url + path, method=method)
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_models_by_name_by_alias_and_with_slashes(site: ApiSite) -> None:
    with official_client(site.url, "x") as api:
        assert [model.id for model in api.models.list()] == ["chat-only", "m", "alias", "org/n"]
        assert api.models.retrieve("org/n").id == "org/n"
        assert api.models.retrieve("alias").id == "alias"
        assert api.models.retrieve("m").owned_by == "chiron"
        with pytest.raises(openai.NotFoundError, match="org/n") as caught:
            api.models.retrieve("gpt-9")
        assert caught.value.code == "model_not_found"


def test_a_key_sees_the_models_it_may_use(tmp_path: Path) -> None:
    with (
        ApiSite(tmp_path, keys=two_keys()) as site,
        official_client(site.url, "sk-a") as api,
    ):
        assert [model.id for model in api.models.list()] == ["m", "alias"]
        with pytest.raises(openai.PermissionDeniedError):
            api.models.retrieve("org/n")


def test_probes_need_no_key_and_the_admin_does(tmp_path: Path) -> None:
    with ApiSite(tmp_path, keys=two_keys()) as site:
        assert ask(site, "/health")[0] == 200
        assert ask(site, "/ready")[0] == 200
        assert ask(site, "/openapi.json")[0] == 200
        for path, method in ADMINS:
            assert ask(site, path, method)[0] == 401
            assert ask(site, path, method, "sk-a")[0] == 403
        assert ask(site, "/v1/models", key="sk-admin")[0] == 200
        status, body, _ = ask(site, "/chiron/status", key="sk-admin")
        assert status == 200
        assert json.loads(body)["runner"]["paused"] == ""
        status, body, headers = ask(site, "/metrics", key="sk-admin")
        assert (status, body) == (200, b"up 1\n")
        assert headers["content-type"].startswith("text/plain; version=0.0.4")


def test_a_drained_gateway_is_not_ready(site: ApiSite) -> None:
    status, body, headers = ask(site, "/ready")
    assert (status, json.loads(body)) == (200, {"status": "ready"})
    assert "retry-after" not in headers
    assert ask(site, "/chiron/drain", "POST")[0] == 202
    status, body, headers = ask(site, "/ready")
    assert (status, json.loads(body)) == (503, {"status": "draining"})
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1000")
    assert ask(site, "/health")[0] == 200


def test_what_is_not_there_is_an_error_object(site: ApiSite) -> None:
    for path in ("/", "/v1", "/v1/files/", "/v1/nope", "/v1/files/a/b", "/%00", "/v1/files/%ff", "/v1/models/a%0Ab"):
        status, body, _ = ask(site, path)
        assert status == 404, path
        assert json.loads(body)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/models/m", "/v1/models/m"),
        ("/v1/v1/files/file-1", "/v1/files/file-1"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/embeddings", None),
        ("/v1/files/a/b", None),
    ],
)
def test_a_base_url_without_v1_or_with_two_is_told(site: ApiSite, path: str, meant: str | None) -> None:
    for method in ("GET", "POST"):
        status, body, _ = ask(site, path, method)
        message = json.loads(body)["error"]["message"]
        assert status == 404
        if meant is None:
            assert "Did you mean" not in message
        else:
            assert f"Did you mean {meant}? A client's base URL ends in /v1" in message


def test_models_are_listed_under_every_name(site: ApiSite) -> None:
    listed = json.loads(ask(site, "/v1/models")[1])["data"]
    assert [(each["id"], each["root"]) for each in listed] == [
        ("chat-only", "chat-only"),
        ("m", "m"),
        ("alias", "m"),
        ("org/n", "org/n"),
    ]
    for each in listed:
        assert json.loads(ask(site, f"/v1/models/{each['id']}")[1]) == each


def test_a_wrong_method_says_which_are_right(site: ApiSite) -> None:
    for path, allowed in (
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/batches/x/cancel", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/health", "GET, HEAD"),
    ):
        for method in ("PUT", "OPTIONS", "TRACE"):
            status, body, headers = ask(site, path, method)
            assert status == 405
            assert headers["allow"] == allowed
            assert json.loads(body)["error"]["code"] == "method_not_allowed"


def test_head_is_get_without_the_body(site: ApiSite) -> None:
    for path in ("/v1/models", "/health", "/openapi.json"):
        status, body, headers = ask(site, path, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) == len(ask(site, path)[1])


def test_every_answer_has_an_id(site: ApiSite) -> None:
    assert ask(site, "/v1/models")[2]["x-request-id"] != ask(site, "/v1/models")[2]["x-request-id"]


def test_the_document_lists_what_the_application_serves(site: ApiSite) -> None:
    document = json.loads(ask(site, "/openapi.json")[1])
    described = {
        (path, method.upper())
        for path, item in document["paths"].items()
        for method in item
        if method in ("get", "post", "put", "delete", "patch")
    }
    served = {
        (path.replace(":path}", "}"), method)
        for path, endpoints in api_routes(site.state).items()
        for method in endpoints
    }
    assert described == served


def test_the_document_names_models_where_no_key_is_asked_for(tmp_path: Path) -> None:
    with ApiSite(tmp_path / "open") as site:
        document = json.loads(ask(site, "/openapi.json")[1])
        model = document["components"]["schemas"]["ChatRequest"]["properties"]["model"]
        assert model["enum"] == ["chat-only", "m", "org/n"]
    with ApiSite(tmp_path / "keys", keys=two_keys()) as site:
        assert b"org/n" not in ask(site, "/openapi.json")[1]
