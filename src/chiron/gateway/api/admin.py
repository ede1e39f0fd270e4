"""Models, health, and the admin's pages."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from chiron.gateway.api.files import authorization
from chiron.gateway.api.resource import json_response
from chiron.gateway.api.state import ApiState
from chiron.gateway.relay.errors import invalid, model_not_found, not_found, retry_after

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class ModelPages:
    def __init__(self, state: ApiState) -> None:
        self._state = state

    async def list(self, request: Request) -> Response:
        key = self._state.keys.check(authorization(request))
        models = self._state.models.cascades | self._state.models.by_name
        names = [name for name in sorted(models) if not key.models or name in key.models]
        data = [self._object(said, name) for name in names for said in (name, *models[name].settings.aliases)]
        return json_response({"object": "list", "data": data})

    async def get(self, request: Request) -> Response:
        key = self._state.keys.check(authorization(request))
        said = request.path_params["model"]
        return json_response(self._object(said, self._state.models.find(said, key).settings.name))

    def _object(self, said: str, name: str) -> dict[str, Any]:
        """``said``: the model's name, or an alias of it."""
        created_s = int(self._state.started_s)
        return {"id": said, "object": "model", "created": created_s, "owned_by": "chiron", "root": name}


def describe(state: ApiState) -> bytes:
    """The OpenAPI document. A server that asks nobody for a key names its models and classes in it, too."""
    text = files("chiron").joinpath("data/openapi.json").read_bytes()
    if not state.keys.open:
        return text
    served = state.models.cascades | state.models.by_name
    document = orjson.loads(text)
    components = document["components"]
    for name in ("ChatRequest", "CompletionRequest"):
        components["schemas"][name]["properties"]["model"]["enum"] = sorted(served)
    classes = sorted({name for model in served.values() for name in model.classes})
    components["parameters"]["RequestClass"]["schema"]["enum"] = classes
    return orjson.dumps(document)


class Admin:
    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._document = describe(state)

    async def health(self, request: Request) -> Response:
        """The process answers. It needs no key: probes have none."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether it is worth sending requests here, for one model or for all."""
        if (name := request.query_params.get("model")) is not None:
            return self._model_ready(name)
        if why := self._state.ready():
            return json_response({"status": why}, 503, retry_after(self._state.retry_after_s))
        return json_response({"status": "ready"})

    def _model_ready(self, name: str) -> Response:
        state = self._state
        served = state.models.named(name)
        if served is None:
            raise model_not_found(name[:200], state.models.by_name if state.keys.open else ())
        fine, words = state.model_ready(served.settings.name)
        return json_response({"status": words}, *((200,) if fine else (503, retry_after(state.retry_after_s))))

    async def openapi(self, request: Request) -> Response:
        return Response(self._document, media_type="application/json")

    async def status(self, request: Request) -> Response:
        self._state.keys.check_admin(authorization(request))
        return json_response(self._state.status())

    async def desired(self, request: Request) -> Response:
        """Of one model, or of one kind of its instances, an object that KEDA reads; of all models without a name."""
        state, asked = self._state, request.query_params
        state.keys.check_admin(authorization(request))
        page = state.desired()
        if (name := asked.get("model")) is None:
            if "kind" in asked:  # Of all models it would be taken for one number.
                raise not_found("kind is given without model: name the model whose kind it is.")
            return json_response(page)
        served = state.models.named(name)
        if served is None:
            raise model_not_found(name[:200], state.models.by_name)
        if (cascade := served.settings.cascade) is not None:
            parts = f"{cascade.first!r} and {cascade.then!r}"
            raise not_found(f"Model {served.settings.name!r} is a cascade without instances of its own: of {parts}.")
        found = next(each for each in page["models"] if each["model"] == served.settings.name)
        if (kind := asked.get("kind")) is not None:
            kinds = {each["kind"]: each for each in found["kinds"]}
            if kind not in kinds:
                raise not_found(f"Model {found['model']!r} has no kind {kind[:200]!r}. Its kinds: {', '.join(kinds)}.")
            found = kinds[kind]
        if found["desired"] is None:  # A number would be believed.
            return json_response({"status": found["why"]}, 503, retry_after(state.retry_after_s))
        return json_response(found)

    async def drain(self, request: Request) -> Response:
        self._state.keys.check_admin(authorization(request))
        self._state.drain()
        return json_response({"status": "draining"}, 202)

    async def undrain(self, request: Request) -> Response:
        self._state.keys.check_admin(authorization(request))
        if not self._state.undrain():
            raise invalid("The gateway is stopping; it takes no more requests.", status=409, code="conflict")
        return json_response({"status": self._state.ready() or "ready"})

    async def metrics(self, request: Request) -> Response:
        self._state.keys.check_admin(authorization(request))
        if self._state.metrics is None:
            raise not_found("This server keeps no metrics.")
        return Response(self._state.metrics(), media_type=PROMETHEUS)
