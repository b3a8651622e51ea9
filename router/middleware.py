"""What every request passes: its id, errors as JSON, who may ask (`access`), readiness, size and content type."""

import asyncio
import logging
import math
import re
import time
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler

from common.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    MlxspecError,
    ModelUnavailable,
    NotFound,
    RequestTooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from common.logs import fields
from router.access import check_key, check_origin, origin_headers
from router.answers import error_answer, json_response
from router.app_keys import CONFIG, REQUEST_ID, STATE

log = logging.getLogger(__name__)
SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
HEADER = "X-Request-Id"
DRAIN_RETRY_AFTER_S = 5.0
RETRY_AFTER_S = 1.0  # of an error that passes by itself, if it does not say when


@web.middleware
async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, the client's own if that is sane, and count it while it is served."""
    given = request.headers.get(HEADER, "")
    request[REQUEST_ID] = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
    state = request.app[STATE]
    state.in_flight += 1
    started_s = time.monotonic()
    status: int | None = None
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        state.in_flight -= 1
        log.debug(
            "answered %s",
            fields(
                request=request[REQUEST_ID],
                method=request.method,
                path=request.path,
                status=status or "gone",
                elapsed_s=time.monotonic() - started_s,
            ),
        )


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes one JSON body; of an unforeseen one only the log knows more."""
    try:
        return await handler(request)
    except asyncio.CancelledError:
        raise
    except MlxspecError as error:
        return _answer(error)
    except web.HTTPException as error:
        response = _answer(_translated(request, error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionError:
        raise asyncio.CancelledError from None  # the client is gone; there is nobody to answer
    except Exception:
        log.exception("unforeseen error %s", fields(request=request[REQUEST_ID], path=request.path))
        return _answer(InternalError(f"internal error; the log has it under request {request[REQUEST_ID]}"))


@web.middleware
async def check_readiness(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A server that is about to stop takes no new work."""
    if request.app[STATE].is_draining and request.method not in ("GET", "HEAD"):
        raise ModelUnavailable("the server is stopping", retry_after_s=DRAIN_RETRY_AFTER_S)
    return await handler(request)


@web.middleware
async def check_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the body's announced size and its type before a byte of it is read; the real size while it is."""
    limit = request.app[CONFIG].server.max_body_bytes
    if (request.content_length or 0) > limit:
        raise _too_large(request.content_length or 0, limit)
    if request.method in ("POST", "PUT") and request.content_type != "application/json":
        given = request.headers.get("Content-Type", "")[:100]
        raise UnsupportedMediaType(f"Content-Type is {given!r}; it must be application/json")
    return await handler(request)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: the id goes back with every answer, streams included."""
    if REQUEST_ID in request:
        response.headers[HEADER] = request[REQUEST_ID]
    response.headers.update(origin_headers(request))


CHAIN = [identify, answer_errors, check_origin, check_key, check_readiness, check_body]


def _answer(error: MlxspecError) -> web.Response:
    response = json_response(error_answer(error), status=error.http_status)
    retry_after_s = RETRY_AFTER_S if error.retryable and error.retry_after_s is None else error.retry_after_s
    if retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _translated(request: web.Request, error: web.HTTPException) -> MlxspecError:
    """aiohttp's own errors in our words."""
    place = f"{request.method} {request.path[:200]}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{place} is not offered; possible: {allowed}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return _too_large(None, request.app[CONFIG].server.max_body_bytes)
    if error.status == 404:
        return NotFound(f"{place} does not exist; GET / lists the routes")
    return InvalidRequest(f"{place}: {error.reason}") if error.status < 500 else InternalError(error.reason)


def _too_large(size: int | None, limit: int) -> RequestTooLarge:
    has = f"has {size} bytes" if size is not None else "is too large"
    return RequestTooLarge(f"the body {has}; at most {limit} are read (server.max_body_bytes)")
