"""The URL table."""

from aiohttp import web

from router import (
    advice,
    groups,
    health,
    hub_api,
    metrics,
    models,
    native,
    openai_chat,
    openai_completions,
    openapi,
    stats,
)
from router.answers import Answer, json_response
from router.version import VERSION


class Index(Answer, frozen=True, kw_only=True):
    name: str = "mlxspec"
    version: str = VERSION
    routes: list[str]


async def index(request: web.Request) -> web.Response:
    return json_response(Index(routes=[f"{route.method} {route.path.replace(':.+', '')}" for route in ROUTES]))


ROUTES = [
    web.get("/", index),
    web.post("/generate", native.generate),
    web.post("/batch_generate", native.batch_generate),
    web.post("/v1/chat/completions", openai_chat.create),
    web.post("/v1/completions", openai_completions.create),
    web.get("/v1/models", models.list_openai),
    web.get("/v1/models/{name:.+}", models.show_openai),
    web.get("/models", models.list_all),
    web.post("/models/load", models.load),
    web.post("/models/pin", models.pin),
    web.post("/reload", models.reload),
    web.post("/models/search", models.search),
    web.get("/models/{name:.+}", models.show),
    web.delete("/models/{name:.+}", models.unload),
    web.get("/groups", groups.list_all),
    web.post("/groups", groups.create),
    web.get("/groups/{name:.+}", groups.show),
    web.put("/groups/{name:.+}", groups.put),
    web.delete("/groups/{name:.+}", groups.delete),
    web.get("/aliases", groups.list_aliases),
    web.put("/aliases/{name:.+}", groups.put_alias),
    web.delete("/aliases/{name:.+}", groups.delete_alias),
    web.post("/hf/models/search", hub_api.search),
    web.post("/hf/models/download", hub_api.download),
    web.get("/hf/models/local", hub_api.list_local),
    web.get("/hf/models/popular", hub_api.popular),
    web.get("/hf/models/{id:.+}/info", hub_api.info),
    web.get("/hf/models/{id:.+}/verify", hub_api.verify),
    web.delete("/hf/models/{id:.+}", hub_api.delete),
    web.get("/hf/jobs", hub_api.list_jobs),
    web.get("/hf/jobs/{job}", hub_api.show_job),
    web.get("/hf/jobs/{job}/events", hub_api.job_events),
    web.delete("/hf/jobs/{job}", hub_api.cancel_job),
    web.get("/hf/cache/stats", hub_api.stats),
    web.get("/health", health.show),
    web.get("/livez", health.live),
    web.get("/readyz", health.show),
    web.get("/stats", stats.show),
    web.get("/optimize", advice.show),
    web.get("/metrics", metrics.show),
    web.get("/openapi.json", openapi.show),
]
