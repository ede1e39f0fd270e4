"""The whole API of a running ``chiron serve``, fuzzed from the document that it serves itself: no answer is a 500, and
none is other than described."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from edge_site import ask, chat, edge_site
from fault_site import FaultSite
from fuzz_checks import FORM, is_right, options_for

HOT = ["/v1/chat/completions", "/v1/completions"]
ENDS_IT = "/chiron/drain"
"""Everything after it is answered with 503."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    with edge_site(tmp_path_factory.mktemp("fuzz"), keys=False, speedup=1000, args=["--max-model-len", "2000"]) as it:
        yield it
        assert ask(it.url + HOT[0], chat()).status == 200
        assert ask(it.url + "/ready").status == 200
        log = it.log.read_text()
    assert "Traceback" not in log, log


def hot_checks() -> list[Any]:
    """What an engine takes beyond the document is its own affair, so a wrong body may get a good answer."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    return [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]


def fuzz(site: FaultSite, mode: str, count: int) -> list[str]:
    schemathesis = pytest.importorskip("schemathesis")  # A second that the collection of tests need not take.
    schema = schemathesis.openapi.from_url(site.url + "/openapi.json").exclude(path=ENDS_IT)
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "positive" or operation.body or operation.query:
            try_out(operation, schemathesis.GenerationMode(mode), count)
            tried.append(operation.label)
    return tried


def try_out(operation: Any, mode: Any, count: int) -> None:
    options = {"checks": hot_checks()} if operation.path in HOT else options_for(operation)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        case.call_and_validate(timeout=60, **options)

    run()


MODES = ("positive", "negative")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_does_what_the_document_says(site: FaultSite, mode: str) -> None:
    tried = fuzz(site, mode, 2)
    assert f"POST {HOT[0]}" in tried
    assert len(tried) == (19 if mode == "positive" else 8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_operation_many_times(site: FaultSite, mode: str) -> None:
    fuzz(site, mode, 150)


PURPOSE, FILE = ("purpose", (None, "batch")), ("file", ("a.jsonl", b"\xff{}"))
EXPIRES = [("expires_after[anchor]", (None, "created_at")), ("expires_after[seconds]", (None, "3600"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ([PURPOSE, FILE], True),
        ([PURPOSE, FILE, *EXPIRES], True),
        ([FILE], False),
        ([PURPOSE, ("file", (None, "no file"))], False),
        ([PURPOSE, PURPOSE, FILE], False),
        ([PURPOSE, FILE, ("more", (None, "x"))], False),
        ([PURPOSE, FILE, EXPIRES[0]], False),
        ([("purpose", (None, "fun")), FILE], False),
    ],
)
def test_a_form_is_judged_as_it_was_sent(fields: list[Any], right: bool) -> None:
    document = json.loads(resources.files("chiron").joinpath("data/openapi.json").read_text())
    schema = document["paths"]["/v1/files"]["post"]["requestBody"]["content"][FORM]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    sent = requests.Request("POST", "http://127.0.0.1/v1/files", files=fields).prepare()
    assert is_right(sent, schema) == right
