"""Models over HTTP: what there is, loading and unloading."""

import re
from pathlib import PurePath

from aiohttp import web

from common.errors import InvalidRequest, InvalidValue, ModelUnavailable
from common.messages import ModelEntry, ModelFacts, ModelTable, WorkerEntry
from common.states import WorkerState
from router.answers import Answer, json_response
from router.app_keys import BACKEND, CONFIG, HUB, STATE
from router.body import read_body
from router.fetching import downloaded, is_far
from router.hub.ids import looks_like_id
from router.hub.jobs import JobState
from router.hub.wishes import Wish
from router.hub_api import allowed_path, fetched
from router.model_table import check_hope
from router.schemas import LoadModelBody, PinModelBody, SearchModelsBody

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
MAX_PATH_CHARS = 1024
MAX_FOUND = 1000
STALE_FAILURE_S = 2.0  # a model still FAILED so long after it was asked for has not been tried again
UNLOAD_MARGIN_S = 10.0


class OpenAIModel(Answer, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "mlxspec"


class OpenAIModels(Answer, frozen=True, kw_only=True):
    object: str = "list"
    data: list[OpenAIModel]


class WorkerAnswer(Answer, frozen=True, kw_only=True):
    identity: str
    state: WorkerState
    pid: int
    footprint_bytes: int
    kv_bytes: int
    running: int
    waiting: int
    phase: str
    started_at: float


class ModelAnswer(Answer, frozen=True, kw_only=True):
    """A model with its state; `facts` are known once it has been loaded.

    `need_bytes` is what loading it is expected to take, 0 if that is unknown; times are seconds since the epoch.
    """

    name: str
    state: WorkerState
    path: str
    is_default: bool
    pinned: bool
    restarts: int
    detail: str
    need_bytes: int
    last_used_at: float
    idle_unload_s: float
    facts: ModelFacts | None
    workers: list[WorkerAnswer]


class ModelsAnswer(Answer, frozen=True, kw_only=True):
    default_model: str | None
    memory_budget_bytes: int
    memory_used_bytes: int
    models: list[ModelAnswer]


class PinnedAnswer(Answer, frozen=True, kw_only=True):
    name: str
    pinned: bool


class ReloadedAnswer(Answer, frozen=True, kw_only=True):
    changes: list[str]


class FoundModels(Answer, frozen=True, kw_only=True):
    """`total` may be more than are told: the search had a limit."""

    total: int
    models: list[ModelAnswer]


class UnloadedAnswer(Answer, frozen=True, kw_only=True):
    name: str
    state: WorkerState = WorkerState.STOPPED


async def list_openai(request: web.Request) -> web.Response:
    models = [model.name for model in (await _table(request)).models]
    names, created = request.app[BACKEND].names, request.app[STATE].started_at
    ids = dict.fromkeys([*models, *sorted(names.groups), *sorted(names.aliases)])
    return json_response(OpenAIModels(data=[OpenAIModel(id=name, created=created) for name in ids]))


async def show_openai(request: web.Request) -> web.Response:
    model = await _named(request)
    return json_response(OpenAIModel(id=model.name, created=request.app[STATE].started_at))


async def list_all(request: web.Request) -> web.Response:
    table = await _table(request)
    return json_response(
        ModelsAnswer(
            default_model=table.default_model,
            memory_budget_bytes=table.memory_budget_bytes,
            memory_used_bytes=table.memory_used_bytes,
            models=[_answer(model, table.default_model) for model in table.models],
        )
    )


async def show(request: web.Request) -> web.Response:
    model = await _named(request)
    return json_response(_answer(model, (await _table(request)).default_model))


async def load(request: web.Request) -> web.Response:
    """Load a known or new model; answered when it is ready or has failed, with `wait` false at once (202).

    One that is on the hub alone is downloaded first; without `wait` the answer is then the download's job.
    """
    body = await read_body(request, LoadModelBody)
    table = await _table(request)
    name, path = _wanted(body, request.app)
    is_known = body.path is None and request.app[BACKEND].directory.find(name) is not None
    if path is not None and looks_like_id(path):
        if not body.wait:
            return json_response(_download_and_load(request.app, name, path), status=202)
        path = await downloaded(request.app, path)
    await request.app[BACKEND].control.ensure_model(name, path)
    if path is not None and not is_known:
        request.app[BACKEND].names.remember_model(name, path)
    if not body.wait:
        return json_response(_answer(await _known(request, name), table.default_model), status=202)
    model = await _until_ready(request, name, table.revision)
    return json_response(_answer(model, table.default_model))


async def pin(request: web.Request) -> web.Response:
    """Load a model and keep it loaded, or let it go again when room is needed."""
    body = await read_body(request, PinModelBody)
    await _table(request)
    name = request.app[BACKEND].directory.named(body.model).name
    await request.app[BACKEND].control.pin(name, is_pinned=body.pinned)
    request.app[BACKEND].names.remember_pin(name, is_pinned=body.pinned)
    return json_response(PinnedAnswer(name=name, pinned=body.pinned))


async def reload(request: web.Request) -> web.Response:
    """Read the configuration again; says what changed and what waits for a restart."""
    return json_response(ReloadedAnswer(changes=await request.app[BACKEND].control.reload()))


async def search(request: web.Request) -> web.Response:
    """Among all models that the server knows: configured, registered, or found in its folder."""
    body = await read_body(request, SearchModelsBody)
    if not 1 <= body.limit <= MAX_FOUND:
        raise InvalidValue(f"limit is {body.limit}; it must lie in [1, {MAX_FOUND}]", param="limit")
    if body.state is not None and body.state not in list(WorkerState):
        raise InvalidValue(f"state is {body.state[:64]!r}; possible: {', '.join(WorkerState)}", param="state")
    table = await _table(request)
    found = [model for model in table.models if _matches(model, body)]
    answers = [_answer(model, table.default_model) for model in found[: body.limit]]
    return json_response(FoundModels(total=len(found), models=answers))


def _matches(model: ModelEntry, asked: SearchModelsBody) -> bool:
    text = f"{model.name} {model.path} {model.facts.architecture if model.facts else ''}".lower()
    is_named = all(word in text for word in asked.query.lower().split())
    return is_named and (asked.state is None or model.state == asked.state)


async def unload(request: web.Request) -> web.Response:
    """Unload a model; answered when its process is gone."""
    model = await _named(request)
    config = request.app[CONFIG].supervisor
    timeout_s = config.drain_timeout_s + config.stop_timeout_s + UNLOAD_MARGIN_S
    await request.app[BACKEND].control.unload(model.name, timeout_s)
    return json_response(UnloadedAnswer(name=model.name))


async def _table(request: web.Request) -> ModelTable:
    return await request.app[BACKEND].known_table()


async def _named(request: web.Request) -> ModelEntry:
    """The model in the URL, by its exact name."""
    await _table(request)
    return request.app[BACKEND].directory.named(request.match_info["name"])


def _wanted(body: LoadModelBody, app: web.Application) -> tuple[str, str | None]:
    """Name and path of the model to load: of a known one, or of one to be registered.

    The path is an allowed folder, or an id of the hub.
    """
    directory = app[BACKEND].directory
    if body.path is None:
        if not body.model:
            raise InvalidRequest("model is missing; give the name of a known model, or a path", param="model")
        if directory.find(body.model) is None and looks_like_id(body.model):
            return body.name or body.model, body.model
        known = directory.named(body.model)
        return known.name, known.path if is_far(known) else None
    name = body.name or body.model or PurePath(body.path).name
    if not NAME.fullmatch(name) or ".." in name:
        raise InvalidValue(f"name is {name[:128]!r}; it must match {NAME.pattern} without '..'", param="name")
    if not 0 < len(body.path) <= MAX_PATH_CHARS or "\0" in body.path:
        raise InvalidValue(
            f"path has {len(body.path)} characters; 1 to {MAX_PATH_CHARS} are allowed, none of them NUL",
            param="path",
        )
    if looks_like_id(body.path) and not (app[HUB].store.root / body.path).is_dir():
        return name, body.path
    return name, str(allowed_path(body.path, app[CONFIG], app[HUB].store))


def _download_and_load(app: web.Application, name: str, model_id: str) -> JobState:
    """Start the download of a model that is loaded when it has come."""
    job = app[HUB].jobs.start(Wish(id=model_id))

    async def finish() -> None:
        path = await fetched(app, job)
        await app[BACKEND].control.ensure_model(name, str(path))

    app[HUB].jobs.afterwards(job, finish())
    return job.state()


async def _known(request: web.Request, name: str) -> ModelEntry:
    """The model's entry, which for a new one may still be on its way."""
    directory = request.app[BACKEND].directory
    try:
        return await directory.wait_until(lambda _: directory.find(name), STALE_FAILURE_S)
    except TimeoutError:
        raise ModelUnavailable(f"model {name!r} was accepted, but is not listed yet", param="model") from None


async def _until_ready(request: web.Request, name: str, asked_at_revision: int) -> ModelEntry:
    backend, limit_s = request.app[BACKEND], request.app[CONFIG].server.load_timeout_s
    is_stale_possible = True

    def ready_or_hopeless(table: ModelTable) -> ModelEntry | None:
        model = backend.directory.find(name)
        if model is None or model.state == WorkerState.READY:
            return model
        if table.revision > asked_at_revision or not is_stale_possible:
            check_hope(model)
        return None

    try:
        return await backend.directory.wait_until(ready_or_hopeless, min(STALE_FAILURE_S, limit_s))
    except TimeoutError:
        is_stale_possible = False
    try:
        return await backend.directory.wait_until(ready_or_hopeless, limit_s)
    except TimeoutError:
        raise ModelUnavailable(
            f"model {name!r} was not ready within {limit_s:g} s (server.load_timeout_s)", param="model"
        ) from None


def _answer(model: ModelEntry, default: str | None) -> ModelAnswer:
    return ModelAnswer(
        name=model.name,
        state=model.state,
        path=model.path,
        is_default=model.name == default,
        pinned=model.pinned,
        restarts=model.restarts,
        detail=model.detail,
        need_bytes=model.need_bytes,
        last_used_at=model.last_used_at,
        idle_unload_s=model.idle_unload_s,
        facts=model.facts,
        workers=[_worker(worker) for worker in model.workers],
    )


def _worker(worker: WorkerEntry) -> WorkerAnswer:
    return WorkerAnswer(
        identity=worker.identity,
        state=worker.state,
        pid=worker.pid,
        footprint_bytes=worker.footprint_bytes,
        kv_bytes=worker.kv_bytes,
        running=worker.running,
        waiting=worker.waiting,
        phase=worker.phase,
        started_at=worker.started_at,
    )
