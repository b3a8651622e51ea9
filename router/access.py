"""Who may ask: the Host and Origin of a request, and the API key that its route needs (decisions are pure)."""

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from common.config import LOOPBACK_HOSTS, ServerConfig
from common.errors import Forbidden, Unauthorized
from common.keys import ADMIN_VARIABLE, Scope
from router.app_keys import CONFIG, KEYS

OPEN_PATHS = ("/livez", "/readyz")
USER_POSTS = ("/generate", "/batch_generate", "/models/search", "/hf/models/search")
USER_PREFIX = "/v1/"
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key, X-Request-Id",
}


@web.middleware
async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a foreign web page makes a browser send: another Host (DNS rebinding), another Origin."""
    server = request.app[CONFIG].server
    host, origin = request.headers.get("Host"), request.headers.get("Origin")
    if host is not None and not is_host_allowed(host, server):
        names = ", ".join(sorted(allowed_hosts(server)))
        raise Forbidden(f"Host {host[:100]!r} is not served here; possible: {names} (server.allowed_hosts adds others)")
    if origin is not None and not is_origin_allowed(origin, host or "", server.allowed_origins):
        raise Forbidden(f"Origin {origin[:100]!r} is foreign (server.allowed_origins allows others)")
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return web.Response(status=204, headers=PREFLIGHT_HEADERS)  # a browser asks before it sends a key
    return await handler(request)


def origin_headers(request: web.Request) -> dict[str, str]:
    """What lets a page of a listed origin read the answer; nothing for any other."""
    origin = request.headers.get("Origin", "")
    if origin.lower() not in _lower(request.app[CONFIG].server.allowed_origins):
        return {}
    return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Where keys are set, every route needs one that is good for it, but for the two that only tell life."""
    keys = request.app[KEYS]
    needed = needed_scope(request.method, request.path)
    if keys and needed > Scope.NONE:
        scope = keys.scope_of(given_key(request))
        if scope is Scope.NONE:
            raise Unauthorized("an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
        if scope < needed:
            raise Forbidden(
                f"{request.method} {request.path[:200]} needs an admin key, and this is a user's "
                f"(a line 'admin KEY' in the key file, or {ADMIN_VARIABLE})"
            )
    return await handler(request)


def given_key(request: web.Request) -> str:
    """The key that came with a request, or ""."""
    kind, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")


def needed_scope(method: str, path: str) -> Scope:
    """What a route asks of a key. Looking and generating are a user's; everything else, new routes too, an admin's."""
    if path in OPEN_PATHS:
        return Scope.NONE
    if method in ("GET", "HEAD") or path in USER_POSTS or path.startswith(USER_PREFIX):
        return Scope.USER
    return Scope.ADMIN


def allowed_hosts(server: ServerConfig) -> set[str]:
    """The names that a Host header may have, without ports."""
    names = {*LOOPBACK_HOSTS, server.host.lower(), *(name.lower() for name in server.allowed_hosts)}
    return names if server.host in LOOPBACK_HOSTS else names | {socket.gethostname().lower()}


def is_host_allowed(host: str, server: ServerConfig) -> bool:
    """Whether a Host header names this server. Addresses cannot be rebound, so any will do where others may connect."""
    name = _hostname(host)
    if name is None:
        return False
    return name in allowed_hosts(server) or (server.host not in LOOPBACK_HOSTS and _is_address(name))


def is_origin_allowed(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Whether a page of `origin` may ask: one of this server's own, or one that the configuration lists."""
    return origin.lower().partition("://")[2] == host.lower() or origin.lower() in _lower(allowed)


def _lower(names: Collection[str]) -> set[str]:
    return {name.lower() for name in names}


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
