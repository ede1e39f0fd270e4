"""The API as one ASGI application. Completions are listed to be refused by method: POST never comes here."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiron.gateway.api.admin import Admin, ModelPages
from chiron.gateway.api.batches import Batches
from chiron.gateway.api.files import Files
from chiron.gateway.api.resource import Endpoint, Resource, unknown_path
from chiron.gateway.api.state import ApiState
from chiron.gateway.batch.lines import ENDPOINTS
from chiron.gateway.relay.errors import internal


def make_app(state: ApiState) -> Starlette:
    """The application; routes and methods are those of ``data/openapi.json``."""
    routes = [Route(path, Resource(endpoints)) for path, endpoints in api_routes(state).items()]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    app.router.default = Resource({}, otherwise=unknown_path)
    return app


def api_routes(state: ApiState) -> dict[str, dict[str, Endpoint]]:
    """Endpoints by path and method."""
    files, batches, models, admin = Files(state), Batches(state), ModelPages(state), Admin(state)
    return {
        **{path: {"POST": _elsewhere} for path in ENDPOINTS},
        "/v1/files": {"GET": files.list, "POST": files.create},
        "/v1/files/{file_id}": {"GET": files.get, "DELETE": files.delete},
        "/v1/files/{file_id}/content": {"GET": files.content},
        "/v1/batches": {"GET": batches.list, "POST": batches.create},
        "/v1/batches/{batch_id}": {"GET": batches.get},
        "/v1/batches/{batch_id}/cancel": {"POST": batches.cancel},
        "/v1/models": {"GET": models.list},
        "/v1/models/{model:path}": {"GET": models.get},
        "/health": {"GET": admin.health},
        "/ready": {"GET": admin.ready},
        "/metrics": {"GET": admin.metrics},
        "/openapi.json": {"GET": admin.openapi},
        "/chiron/status": {"GET": admin.status},
        "/chiron/desired": {"GET": admin.desired},
        "/chiron/drain": {"POST": admin.drain},
        "/chiron/undrain": {"POST": admin.undrain},
    }


async def _elsewhere(request: Request) -> Response:
    """The hot path takes completions before this application sees them."""
    raise internal()
