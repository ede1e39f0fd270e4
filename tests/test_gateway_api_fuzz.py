"""The API, fuzzed from its own description: nothing is answered with 500, and nothing that is not described."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz_checks import not_for_forms
from gateway_site import ApiSite

schemathesis = pytest.importorskip("schemathesis")

HOT = ["/v1/chat/completions", "/v1/completions"]
"""Answered by the hot path, which is not here."""


def fuzz(site: ApiSite, mode: Any, examples: int) -> list[str]:
    schema = schemathesis.openapi.from_url(site.url + "/openapi.json").exclude(path=HOT)
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            case.call_and_validate(**not_for_forms(case.operation))

        if mode is schemathesis.GenerationMode.POSITIVE or operation.body or operation.query:
            run()
            tried.append(operation.label)
    return tried


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_operation_does_what_the_document_says(tmp_path: Path, mode: Any) -> None:
    with ApiSite(tmp_path) as site:
        tried = fuzz(site, mode, 10)
    assert len(tried) == (16 if mode is schemathesis.GenerationMode.POSITIVE else 4)
