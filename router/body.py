"""From the bytes of a request body to a typed struct, with an error that names what is wrong."""

import asyncio
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from common.errors import InvalidRequest, RequestTimeout
from router.app_keys import CONFIG

Body = TypeVar("Body", bound=msgspec.Struct)
MAX_DEPTH = 64

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_FIELD = re.compile(r"(?:required field|unknown field) `([^`]+)`")


async def read_body(request: web.Request, kind: type[Body]) -> Body:
    """Read and decode the body. Raises `InvalidRequest` or `RequestTimeout`; aiohttp watches the size."""
    limit_s = request.app[CONFIG].server.body_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            raw = await request.read()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {limit_s:g} s (server.body_timeout_s)") from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from error
    return decode(raw, kind)


def decode(raw: bytes, kind: type[Body]) -> Body:
    """The struct in `raw`."""
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from error
    except RecursionError as error:
        raise _too_deep() from error
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if is_deeper(raw, MAX_DEPTH):
        raise _too_deep()
    return body


def is_deeper(raw: bytes, limit: int) -> bool:
    """Whether valid JSON is nested deeper than `limit`: take the innermost brackets away, `limit` times."""
    brackets = _STRINGS.sub(b"", raw).translate(_AS_SQUARE, _NOT_BRACKETS)
    for _ in range(limit):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _named(text: str) -> InvalidRequest:
    """msgspec's message with the field in front."""
    place = _PLACE.search(text)
    inside = place.group(1) if place else ""
    field = _FIELD.search(text)
    if field:
        name = f"{inside}.{field.group(1)}" if inside else field.group(1)
        problem = "is missing" if "required" in text else "is not a known field"
        return InvalidRequest(f"{name} {problem}", param=name)
    problem = _PLACE.sub("", text).replace("`", "")
    name = inside or "the body"
    return InvalidRequest(f"{name}: {problem[:1].lower()}{problem[1:]}", param=inside or None)
