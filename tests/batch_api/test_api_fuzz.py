"""The API, fuzzed from its own description: nothing is answered with 500, and nothing that is not described."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from fuzz_checks import FORM, is_right, options_for
from gateway_site import ApiSite

HOT = ["/v1/chat/completions", "/v1/completions"]
"""Answered by the hot path, which is not here."""


def fuzz(site: ApiSite, mode: str, examples: int) -> list[str]:
    schemathesis = pytest.importorskip("schemathesis")  # A second that the collection of tests need not take.
    schema = schemathesis.openapi.from_url(site.url + "/openapi.json").exclude(path=HOT)
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        @settings(
            max_examples=examples,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            case.call_and_validate(**options_for(case.operation))

        if mode == "positive" or operation.body or operation.query:
            run()
            tried.append(operation.label)
    return tried


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_operation_does_what_the_document_says(tmp_path: Path, mode: str) -> None:
    with ApiSite(tmp_path) as site:
        tried = fuzz(site, mode, 10)
    assert len(tried) == (17 if mode == "positive" else 5)


PURPOSE, FILE = ("purpose", (None, "batch")), ("file", ("a.jsonl", b"\xff{}"))
EXPIRES = [("expires_after[anchor]", (None, "created_at")), ("expires_after[seconds]", (None, "3600"))]


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
