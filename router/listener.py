"""The HTTP server's door: takes connections up to a limit, so that idle ones cannot use up the process's files."""

import asyncio
import logging
import resource

from aiohttp import web

from common.logs import fields

log = logging.getLogger(__name__)
BACKLOG = 512
FILES_BESIDE_CONNECTIONS = 256
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class _Refusal(asyncio.Protocol):
    """Says once that there are too many connections, without reading."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(REFUSAL)
        transport.close()


async def listen(runner: web.AppRunner, host: str, port: int, max_connections: int) -> asyncio.Server:
    """Serve on an address. Raises `OSError` when it cannot be had. Close the result before the runner's clean-up."""
    server = runner.server
    assert server is not None, "the runner is set up first"

    def greet() -> asyncio.BaseProtocol:
        if len(server.connections) < max_connections:
            return server()
        log.warning("connection refused %s", fields(connections=len(server.connections), limit=max_connections))
        return _Refusal()

    _allow_files(max_connections + FILES_BESIDE_CONNECTIONS)
    return await asyncio.get_running_loop().create_server(greet, host, port, backlog=BACKLOG)


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
