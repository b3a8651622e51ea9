"""The router process: sockets, HTTP server, and a clean end."""

import asyncio
import logging
import signal
from contextlib import suppress
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from common import saved_state
from common.config import Config
from common.keys import Keys, load_keys
from common.logs import fields
from router import control_client, data_socket, middleware
from router.app_keys import BACKEND, CONFIG, HUB, KEYS, LEDGER, METERS, STATE, Hub, ServerState
from router.backend import Backend
from router.data_socket import DataSocket
from router.ledger import Ledger
from router.listener import listen
from router.meters import Meters
from router.metrics import LiveCollector
from router.model_table import Directory
from router.names import Names
from router.observer import Observers
from router.routes import ROUTES

log = logging.getLogger(__name__)
EXIT_OK = 0
EXIT_NO_PORT = 3
LAST_BYTES_S = 1.0  # what answers that are cut off get to leave
DRAIN_POLL_S = 0.05


def init_app(config: Config, backend: Backend, keys: Keys = Keys()) -> web.Application:  # noqa: B008 - it is frozen
    """The HTTP application on a running backend."""
    app = web.Application(middlewares=middleware.CHAIN, client_max_size=config.server.max_body_bytes)
    app[CONFIG] = config
    app[BACKEND] = backend
    app[KEYS] = keys
    app[STATE] = ServerState()
    app[HUB] = Hub()
    app.on_cleanup.append(_end_downloads)
    app[LEDGER] = Ledger()
    app[METERS] = Meters()
    app[METERS].registry.register(LiveCollector(backend))
    backend.observers.members += [app[LEDGER], app[METERS]]
    app.on_response_prepare.append(middleware.add_headers)
    app.add_routes(ROUTES)
    return app


class _Discretion(logging.Filter):
    """Tells of a request that cannot be read without quoting it: there may be a key in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = f"request cannot be read {fields(error=type(error).__name__)}", None
            record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
        return True


_DISCRETION = _Discretion()


def make_runner(app: web.Application) -> web.AppRunner:
    """The server around the application. A connection that sends no whole request head in time is closed."""
    server_logger.addFilter(_DISCRETION)
    return web.AppRunner(
        app,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=app[CONFIG].server.header_timeout_s,
        shutdown_timeout=LAST_BYTES_S,
    )


async def serve(run_dir: Path, config: Config) -> int:
    """Run until SIGTERM or SIGINT; returns the process's exit status."""
    context = data_socket.new_context()
    try:
        backend = connect(config, context, run_dir, Names(config, saved_state.default_path()))
        return await _serve_http(config, backend)
    finally:
        context.destroy(linger=0)


def connect(config: Config, context: data_socket.Context, run_dir: Path, names: Names) -> Backend:
    """A backend on the sockets of both planes."""
    control, observers = control_client.connect(context, run_dir, Directory()), Observers()
    socket = DataSocket(data_socket.bind_data_socket(context, run_dir), control.directory, observers)
    return Backend(config, socket, control, observers, names)


async def _serve_http(config: Config, backend: Backend) -> int:
    app = init_app(config, backend, load_keys(config.server.api_keys_file))
    runner = make_runner(app)
    await runner.setup()
    host, port = config.server.host, config.server.port
    try:
        door = await listen(runner, host, port, config.server.max_connections)
    except OSError as error:
        log.error("cannot listen on http://%s:%d: %s", host, port, error.strerror or error)
        await runner.cleanup()
        return EXIT_NO_PORT
    log.info("router serves %s", fields(url=f"http://{host}:{port}"))
    async with asyncio.TaskGroup() as tasks:
        planes = [tasks.create_task(backend.run()), tasks.create_task(backend.control.run())]
        await _until_drained(app, config.supervisor.drain_timeout_s)
        backend.stop_all()
        door.close()
        await runner.cleanup()
        for plane in planes:
            plane.cancel()
    log.info("router ends")
    return EXIT_OK


async def _end_downloads(app: web.Application) -> None:
    await app[HUB].jobs.close()


async def _until_drained(app: web.Application, timeout_s: float) -> None:
    """Wait for the first signal, then for the live requests, a second signal or the time limit."""
    first, second = _signals()
    await first.wait()
    state = app[STATE]
    state.is_draining = True
    app[BACKEND].stop_waiting()
    await _end_downloads(app)  # they go on where they stopped when they are asked for again
    log.info("router drains %s", fields(live_requests=state.in_flight, timeout_s=timeout_s))
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while state.in_flight and not second.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(second.wait(), DRAIN_POLL_S)


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return first, second
