"""Models that the configuration takes from Hugging Face: fetched when they are first asked for."""

import asyncio

from aiohttp import web

from common.errors import ModelUnavailable
from common.messages import ModelEntry
from common.states import WorkerState
from router.app_keys import BACKEND, CONFIG, HUB
from router.hub.ids import looks_like_id
from router.hub.wishes import Wish
from router.hub_api import fetched

RETRY_AFTER_S = 30.0


async def chosen_model(request: web.Request, name: str | None) -> str:
    """The model that a request means, once it is on this machine.

    Raises `ModelNotFound`, `ModelUnavailable`, or why it could not be fetched.
    """
    model = await request.app[BACKEND].resolve(name)
    if is_far(model) and model.state == WorkerState.STOPPED:
        await _fetch(request.app, model)
    return model.name


def is_far(model: ModelEntry) -> bool:
    """Whether it was not on this machine when the supervisor last looked."""
    return looks_like_id(model.path)


async def downloaded(app: web.Application, model_id: str) -> str:
    """The folder of a model of the hub, once it is there."""
    hub = app[HUB]
    if hub.store.has(model_id):
        return str(hub.store.folder(model_id))
    return str(await fetched(app, hub.jobs.start(Wish(id=model_id))))


async def _fetch(app: web.Application, model: ModelEntry) -> None:
    limit_s = app[CONFIG].server.load_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            folder = await downloaded(app, model.path)
    except TimeoutError:
        raise ModelUnavailable(
            f"{model.name} comes from Hugging Face and was not here within {limit_s:g} s (server.load_timeout_s); "
            "GET /hf/jobs tells how far it is",
            retry_after_s=RETRY_AFTER_S,
        ) from None
    await app[BACKEND].control.ensure_model(model.name, folder)
