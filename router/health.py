"""GET /livez: the process answers. GET /readyz and /health: a request would be served, or why not."""

from aiohttp import web

from common.messages import ModelTable
from common.states import WorkerState
from router.answers import Answer, json_response
from router.app_keys import BACKEND, STATE

COMING = (WorkerState.STARTING, WorkerState.LOADING)
USABLE = (WorkerState.READY, WorkerState.STOPPED, WorkerState.DRAINING, WorkerState.STOPPING)


class Health(Answer, frozen=True, kw_only=True):
    """`status`: ok, degraded (not the default model, but another answers), or why nothing does: starting,
    loading, draining, no_model, failed.
    """

    status: str
    models: dict[str, WorkerState]
    detail: str = ""


async def live(request: web.Request) -> web.Response:
    return json_response(Health(status="ok", models={}))


async def show(request: web.Request) -> web.Response:
    health = judge(request.app[BACKEND].directory.table, is_draining=request.app[STATE].is_draining)
    return json_response(health, status=200 if health.status in ("ok", "degraded") else 503)


def judge(table: ModelTable | None, *, is_draining: bool) -> Health:
    """The server's health by its model table. A model that is not loaded is usable: on demand."""
    if table is None:
        return Health(status="draining" if is_draining else "starting", models={})
    models = {model.name: model.state for model in table.models}
    if is_draining:
        return Health(status="draining", models=models)
    if not models:
        return Health(status="no_model", models=models, detail="load one with POST /models/load")
    default = next((model for model in table.models if model.name == table.default_model), table.models[0])
    if default.state in USABLE:
        return Health(status="ok", models=models)
    if default.state in COMING:
        return Health(status="loading", models=models, detail=default.detail)
    is_any_ready = WorkerState.READY in models.values()
    return Health(status="degraded" if is_any_ready else "failed", models=models, detail=default.detail)
