"""GET /openapi.json: all routes as an OpenAPI document, made from the route table and the bodies' structs."""

import inspect
import re
from typing import Any

import msgspec
from aiohttp import web

from router.answers import ErrorAnswer
from router.hub.query import Query
from router.hub_api import DownloadBody
from router.schemas import (
    AliasBody,
    BatchGenerateBody,
    ChatBody,
    CompletionBody,
    GenerateBody,
    GroupBody,
    LoadModelBody,
    NamedGroupBody,
    PinModelBody,
    SearchModelsBody,
)
from router.version import VERSION

OPENAPI_VERSION = "3.1.0"
REFERENCE = "#/components/schemas/{name}"
BODIES: dict[str, type[msgspec.Struct]] = {
    "POST /generate": GenerateBody,
    "POST /batch_generate": BatchGenerateBody,
    "POST /v1/chat/completions": ChatBody,
    "POST /v1/completions": CompletionBody,
    "POST /models/load": LoadModelBody,
    "POST /models/pin": PinModelBody,
    "POST /models/search": SearchModelsBody,
    "POST /groups": NamedGroupBody,
    "POST /hf/models/search": Query,
    "POST /hf/models/download": DownloadBody,
    "PUT /groups/{name}": GroupBody,
    "PUT /aliases/{name}": AliasBody,
}

Json = dict[str, Any]


async def show(request: web.Request) -> web.Response:
    return web.Response(body=msgspec.json.encode(document(request.app.router)), content_type="application/json")


def document(router: web.UrlDispatcher) -> Json:
    """The OpenAPI document of a router's routes."""
    _, components = msgspec.json.schema_components([*BODIES.values(), ErrorAnswer], ref_template=REFERENCE)
    paths: dict[str, Json] = {}
    for route in router.routes():
        if route.resource is not None and route.method != "HEAD":
            path = route.resource.canonical
            paths.setdefault(path, {})[route.method.lower()] = _operation(route, path)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "mlxspec", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: web.AbstractRoute, path: str) -> Json:
    operation: Json = {
        "responses": {
            "2XX": {"description": "An answer, or a stream of events."},
            "default": {"description": "An error.", "content": _content(ErrorAnswer)},
        }
    }
    if text := inspect.getdoc(route.handler):
        operation["summary"] = text.partition("\n")[0]
    if names := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body := BODIES.get(f"{route.method} {path}"):
        operation["requestBody"] = {"required": True, "content": _content(body)}
    return operation


def _content(kind: type[msgspec.Struct]) -> Json:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=kind.__name__)}}}
