"""What admission makes of a request's class and the promises that its client asks for."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from chiron.core.types import RequestClass
from chiron.gateway.relay.admission import Admitted, Models, ServedModel, admit
from chiron.gateway.relay.errors import ApiError
from chiron.gateway.relay.keys import ANONYMOUS
from chiron.gateway.settings import ModelSettings
from chiron.net.incoming import Incoming

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=3600.0)


def admitted(*classes: RequestClass, headers: dict[str, str], **fields: Any) -> Admitted:
    """By a model which serves these."""
    names = tuple(cls.name for cls in classes)
    settings = ModelSettings(name="m", kinds=(), classes=names, default_class=names[0], batch_class=names[-1])
    served = ServedModel(settings=settings, classes={cls.name: cls for cls in classes}, kv_capacity_tokens=1000)
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    incoming = Incoming(SimpleNamespace())  # type: ignore[arg-type]
    incoming.body, incoming.path = json.dumps(body).encode(), "/v1/chat/completions"
    incoming.headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return admit(incoming, ANONYMOUS, Models({"m": served}))


def class_of(*classes: RequestClass, headers: dict[str, str], **fields: Any) -> RequestClass:
    """The class that a model which serves these gives to a request."""
    return admitted(*classes, headers=headers, **fields).cls


ASKED = {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "20"}


def test_promises_asked_for_take_the_place_of_an_interactive_classs_own() -> None:
    assert class_of(CHAT, NIGHT, headers={}) == CHAT
    promised = class_of(CHAT, NIGHT, headers=ASKED)
    assert (promised.name, promised.ttft_s, promised.itl_s) == ("chat", 0.5, 0.02)


@pytest.mark.parametrize("headers", [ASKED, {"x-slo-ttft-ms": "500"}, {"x-slo-tpot-ms": "20"}])
def test_batch_work_has_its_deadline_and_no_other_promise(headers: dict[str, str]) -> None:
    assert class_of(CHAT, NIGHT, headers={"x-chiron-class": "night", **headers}) == NIGHT
    assert class_of(CHAT, NIGHT, headers=headers, service_tier="flex") == NIGHT
    # A model that does nothing else has no class with such promises.
    assert class_of(NIGHT, headers=headers) == NIGHT


@pytest.mark.parametrize("name", ["7-12", "agent/1:a.b_c@d", "x" * 128, "!~"])
def test_a_header_names_the_program(name: str) -> None:
    assert admitted(CHAT, NIGHT, headers={"x-chiron-program": name, **ASKED}).program == name
    assert admitted(CHAT, NIGHT, headers={"x-chiron-class": "night", "x-chiron-program": name}).program == name
    assert admitted(CHAT, NIGHT, headers=ASKED).program == ""


@pytest.mark.parametrize("name", ["", "x" * 129, "two words", "tab\t", "caf\u00e9", "\x7f", "nul\0"])
def test_what_is_no_name_of_a_program_is_refused(name: str) -> None:
    with pytest.raises(ApiError, match=r"x-chiron-program: .* is no name of a program; allowed: 1 to 128") as refused:
        admitted(CHAT, NIGHT, headers={"x-chiron-program": name})
    assert refused.value.status == 400
    assert len(str(refused.value)) < 300
