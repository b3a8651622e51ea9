"""Models of Hugging Face over HTTP: `/hf/…`. The work is `router.hub`'s, in threads and child processes."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from common.config import Config
from common.errors import Conflict, Forbidden, HubUnreachable, InvalidValue, ModelUnavailable
from common.states import WorkerState
from router.answers import Answer, json_response
from router.app_keys import BACKEND, CONFIG, HUB
from router.body import read_body
from router.hub.ids import check_id, check_revision
from router.hub.jobs import Job, JobState
from router.hub.query import Query
from router.hub.store import CacheStats, LocalModel, Problem, Store
from router.hub.wishes import Wish
from router.sse import KEEP_ALIVE_S, EventWriter

HUB_TIMEOUT_S = 60.0
MAX_POPULAR = 100
T = TypeVar("T")


class DownloadBody(Wish, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /hf/models/download; with `wait` it is answered when the model is there."""

    wait: bool = False


class JobsAnswer(Answer, frozen=True, kw_only=True):
    jobs: list[JobState]


class LocalAnswer(Answer, frozen=True, kw_only=True):
    path: str
    models: list[LocalModel]


class DeletedAnswer(Answer, frozen=True, kw_only=True):
    id: str
    freed_bytes: int


class VerifiedAnswer(Answer, frozen=True, kw_only=True):
    id: str
    ok: bool
    problems: list[Problem]


async def search(request: web.Request) -> web.Response:
    from router.hub import catalog  # slow to import, and seldom needed

    query = await read_body(request, Query)
    store = request.app[HUB].store
    return _models(await _in_thread(lambda: catalog.search(query, store)))


async def popular(request: web.Request) -> web.Response:
    from router.hub import catalog

    limit, store = _limit(request), request.app[HUB].store
    return _models(await _in_thread(lambda: catalog.popular(store, limit)))


async def info(request: web.Request) -> web.Response:
    from router.hub import catalog

    model_id, revision = check_id(request.match_info["id"]), request.query.get("revision")
    if revision is not None:
        check_revision(revision)
    store, limit_gb = request.app[HUB].store, request.app[CONFIG].supervisor.memory_limit_gb
    details = await _in_thread(lambda: catalog.info(model_id, store, revision, limit_gb))
    return json_response(details)


async def download(request: web.Request) -> web.Response:
    """Start a job (202), or join the one that is on its way; with `wait` answer when it is done (200)."""
    body = await read_body(request, DownloadBody)
    jobs = request.app[HUB].jobs
    job = jobs.start(wish_of(body))
    if not body.wait:
        jobs.afterwards(job, _announce(request.app, job))
        return json_response(job.state(), status=202)
    await fetched(request.app, job)
    return json_response(job.state())


async def list_jobs(request: web.Request) -> web.Response:
    jobs = request.app[HUB].jobs.jobs.values()
    return json_response(JobsAnswer(jobs=[job.state() for job in jobs]))


async def show_job(request: web.Request) -> web.Response:
    job = _job(request)
    await _know(request.app, job)
    return json_response(job.state())


async def cancel_job(request: web.Request) -> web.Response:
    """End a job; what came is kept, so that the same download goes on from there."""
    job = _job(request)
    if job.is_over:
        raise Conflict(f"job {job.id} is {job.status}; there is nothing to cancel")
    await request.app[HUB].jobs.cancel(job)
    return json_response(job.state())


async def job_events(request: web.Request) -> web.StreamResponse:
    """The job's state as server-sent events, at each change until it is over."""
    out, job = EventWriter(request), _job(request)
    async for state in request.app[HUB].jobs.watch(job, KEEP_ALIVE_S):
        if state is None:
            await out.write(b": keep-alive\n\n")
        else:
            await _know(request.app, job)
            await out.send([state])
    await out.write(b"data: [DONE]\n\n")
    return out.response


async def list_local(request: web.Request) -> web.Response:
    """All models in the store. The supervisor looks too, so that it serves those that came from elsewhere."""
    await request.app[BACKEND].control.rescan()
    store = request.app[HUB].store
    return json_response(LocalAnswer(path=str(store.root), models=await _in_thread(store.models)))


async def stats(request: web.Request) -> web.Response:
    answer: CacheStats = await _in_thread(request.app[HUB].store.stats)
    return json_response(answer)


async def verify(request: web.Request) -> web.Response:
    """Compare sizes and hashes of a model's files with the hub's record of them."""
    model_id, store = check_id(request.match_info["id"]), request.app[HUB].store
    problems = await asyncio.to_thread(store.verify, model_id)
    return json_response(VerifiedAnswer(id=model_id, ok=not problems, problems=problems))


async def delete(request: web.Request) -> web.Response:
    """Remove a model from the disk, unless it is loaded."""
    model_id, store = check_id(request.match_info["id"]), request.app[HUB].store
    await _check_unused(request, store.folder(model_id))
    freed = await _in_thread(lambda: store.delete(model_id))
    await request.app[BACKEND].control.rescan()
    return json_response(DeletedAnswer(id=model_id, freed_bytes=freed))


def wish_of(body: DownloadBody) -> Wish:
    return Wish(
        id=body.id, revision=body.revision, quantize=body.quantize, group_size=body.group_size, force=body.force
    )


async def fetched(app: web.Application, job: Job) -> Path:
    """The model's folder once it is there and the supervisor knows of it. Raises the job's error."""
    path = await app[HUB].jobs.wait(job)
    await app[BACKEND].control.rescan()
    return path


async def _know(app: web.Application, job: Job) -> None:
    """Who hears that a model is ready may ask for it at once: then the supervisor knows of it, unless it is away."""
    if job.status == "done":
        with contextlib.suppress(ModelUnavailable):
            await app[BACKEND].control.rescan()


async def _announce(app: web.Application, job: Job) -> None:
    await fetched(app, job)


def allowed_path(path: str, config: Config, store: Store) -> Path:
    """The folder of a model that may be loaded by its path over HTTP. Raises `Forbidden` outside the allowed roots."""
    place = (store.root / Path(path).expanduser()).resolve()
    roots = [store.root, *(Path(root).expanduser() for root in config.hub.model_roots)]
    if not any(place.is_relative_to(root.resolve()) for root in roots):
        known = ", ".join(map(str, roots))
        raise Forbidden(f"{path[:200]} is outside the folders of models ({known}); see hub.model_roots", param="path")
    return place


async def _check_unused(request: web.Request, folder: Path) -> None:
    table = await request.app[BACKEND].known_table()
    idle = (WorkerState.STOPPED, WorkerState.FAILED)
    for model in table.models:
        if Path(model.path) == folder and model.state not in idle:
            raise Conflict(
                f"{model.name} is {model.state}; unload it first (mlxspec unload, or DELETE /models/{model.name})"
            )


def _job(request: web.Request) -> Job:
    job: Job = request.app[HUB].jobs.find(request.match_info["job"])
    return job


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", "20")
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_POPULAR:
        raise InvalidValue(f"limit is {text[:32]!r}; it must lie in [1, {MAX_POPULAR}]", param="limit")
    return int(text)


def _models(found: list[T]) -> web.Response:
    body = msgspec.json.encode({"models": found})
    return web.Response(body=body, content_type="application/json", charset="utf-8")


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        async with asyncio.timeout(HUB_TIMEOUT_S):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise HubUnreachable(f"the hub did not answer within {HUB_TIMEOUT_S:g} s; try again") from None
