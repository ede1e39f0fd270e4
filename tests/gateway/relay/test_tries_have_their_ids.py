"""Engines that know requests by the gateway's id never see one twice, however often a request starts again."""

from __future__ import annotations

from chiron.core.types import Request, RequestClass
from chiron.engines.rows import ENGINES
from chiron.gateway.relay.body import body_of
from chiron.gateway.relay.calls import CollectedCall

CLASS = RequestClass(name="batch", kind="batch", deadline_s=60.0)


def test_each_try_of_a_collected_request_has_an_id_of_its_own() -> None:
    call = CollectedCall(path=b"/v1/completions", body=body_of({"prompt": "x"}), request_id="req-1", key_name="")
    request = Request(1, "m", CLASS, 0.0, 1, call)
    ids = []
    for _ in range(3):
        call.message(ENGINES["vllm"], "m", request)
        ids.append(dict(call.headers())[b"x-request-id"])
    assert ids == [b"req-1", b"req-1.2", b"req-1.3"]
