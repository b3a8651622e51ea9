"""The supervisor process: parent of the router and of every worker, from start to clean end."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common import config as configuration
from common import logs, paths, sockets
from common.config import Config
from common.errors import ConfigError
from common.logs import fields
from common.messages import (
    EnsureModel,
    Heartbeat,
    ModelTable,
    Pin,
    Reload,
    StateChanged,
    Status,
    Unload,
    Watch,
    WorkerHello,
)
from common.states import ExitCode, WorkerState
from router.supervisor import process, reload, rotation
from router.supervisor.calls import CallDesk
from router.supervisor.console import Console, address, first_steps
from router.supervisor.control import ControlSocket
from router.supervisor.fleet import Fleet
from router.supervisor.launcher import Launcher
from router.supervisor.notify import Notifier
from router.supervisor.options import add_serve_options, read_config
from router.supervisor.reconfigure import reconfigure
from router.supervisor.router_keeper import RouterKeeper, first_of

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
EXIT_OK = ExitCode.OK
EXIT_CONFIG = ExitCode.BAD_MODEL
CTRL_C_DRAIN_S = 3.0
ROUTER_GRACE_S = 1.0  # what a router may take to end after its drain
HURRY_S = 1.0  # what workers get to free their models after a second signal
KILL_MARGIN_S = 2.0
_UNDECIDED = (WorkerState.STOPPED, WorkerState.STARTING, WorkerState.LOADING)


def main(arguments: list[str] | None = None) -> int:
    """Console script `mlxspec-supervisor`."""
    parser = argparse.ArgumentParser(
        prog="mlxspec-supervisor",
        description="Run the server: the HTTP router and one worker per loaded model.",
    )
    add_serve_options(parser)
    return serve(parser.parse_args(arguments))


def serve(options: argparse.Namespace) -> int:
    """Run the server as the options say; returns its exit code, with errors as one line."""
    try:
        return run(read_config(options), read_again=lambda: read_config(options))
    except ConfigError as error:
        print(f"mlxspec: {error}", file=sys.stderr)
        return EXIT_CONFIG


def run(
    config: Config,
    commands: process.Commands | None = None,
    console: Console | None = None,
    read_again: Callable[[], Config] | None = None,
) -> int:
    """Run the server until a signal ends it. Raises `ConfigError` before anything was started.

    `read_again` gives the configuration anew when somebody has changed it.
    """
    configuration.check_default_model(config)
    run_dir = sockets.prepare_run_dir(paths.run_dir())
    with contextlib.closing(sockets.lock_run_dir(run_dir)):
        try:
            with process.open_log(paths.logs_dir() / "supervisor.log") as log_file:
                _log_to(log_file, config.log.level)
                supervisor = Supervisor(
                    config,
                    run_dir,
                    commands or process.Commands(),
                    console or Console(),
                    read_again or (lambda: config),
                )
                return asyncio.run(supervisor.run())
        finally:
            _tidy(run_dir)


def _log_to(file: IO[bytes], level: str) -> None:
    stream = open(file.fileno(), "a", encoding="utf-8", closefd=False)  # noqa: SIM115 - lives as long as the process
    logs.setup("supervisor", level, stream)


def _tidy(run_dir: Path) -> None:
    for name in (sockets.CONTROL_SOCKET, sockets.DATA_SOCKET, CONFIG_FILE, sockets.LOCK_FILE):
        (run_dir / name).unlink(missing_ok=True)


class Supervisor:
    """The event loop of the daemon."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        commands: process.Commands,
        console: Console,
        read_again: Callable[[], Config],
    ) -> None:
        self._config, self._run_dir, self._commands, self._console = config, run_dir, commands, console
        self._notifier = Notifier()
        self._read_again = read_again
        self._has_terminal = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._drain_s = config.supervisor.drain_timeout_s
        self._refusal: str | None = None
        self._main_model: str | None = None
        self._table: ModelTable | None = None
        self._is_router_up = False
        self._is_announced = False

    async def run(self) -> int:
        """Start everything, run until a signal, end everything; returns the exit code."""
        (self._run_dir / sockets.DATA_SOCKET).unlink(missing_ok=True)
        configuration.dump(self._config, self._run_dir / CONFIG_FILE)
        self._listen_to_signals()
        with (
            contextlib.closing(process.Lifeline()) as line,
            contextlib.closing(ControlSocket(self._run_dir / sockets.CONTROL_SOCKET)) as control,
        ):
            async with asyncio.TaskGroup() as tasks:
                await self._work(tasks, control, line)
        if self._refusal:
            hint = f"choose another address with --port or --host (log: {paths.logs_dir() / 'router.log'})"
            print(f"mlxspec: {self._refusal}; {hint}", file=sys.stderr)
            return EXIT_CONFIG
        self._console.say("mlxspec has ended")
        return EXIT_OK

    async def _work(self, tasks: asyncio.TaskGroup, control: ControlSocket, line: process.Lifeline) -> None:
        self._console.say(f"mlxspec starts on {address(self._config.server)}")
        launcher = Launcher(self._commands, self._run_dir, line, tasks)
        fleet = Fleet(self._config, control, launcher, show=self._show)
        keeper = RouterKeeper(self._commands, self._run_dir, line, self._config.supervisor)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup, fleet)
        self._want_first_models(fleet)
        chores = [
            tasks.create_task(self._keep_router(keeper), name="router"),
            tasks.create_task(self._listen(control, fleet), name="control"),
            tasks.create_task(fleet.steer(), name="fleet"),
            tasks.create_task(self._notifier.keep_alive(), name="watchdog"),
            tasks.create_task(rotation.keep_short(paths.logs_dir(), self._config.log), name="logs"),
        ]
        await self._stop.wait()
        await self._end(fleet, keeper)
        for chore in chores:
            chore.cancel()

    # --- at work --------------------------------------------------------------------------------------

    def _want_first_models(self, fleet: Fleet) -> None:
        """The default model, then those that are always to be loaded."""
        self._main_model = fleet.default_name()
        for name in configuration.first_models(self._config):
            fleet.want(fleet.models[name], for_ever=True)

    async def _listen(self, control: ControlSocket, fleet: Fleet) -> None:
        desk = CallDesk(fleet, control, lambda: self._reload(fleet))
        async for sender, message in control.frames():
            match message:
                case Heartbeat():
                    fleet.on_heartbeat(sender, message)
                case WorkerHello():
                    fleet.on_hello(sender, message)
                case StateChanged():
                    fleet.on_state(sender, message)
                case Watch():
                    control.add_watcher(sender, message)
                    self._on_watch(message)
                case EnsureModel() | Unload() | Pin() | Reload() | Status():
                    desk.answer(sender, message)

    def _on_watch(self, watch: Watch) -> None:
        if watch.client == "router":
            self._is_router_up = True
            self._notifier.ready()
            self._announce()

    async def _keep_router(self, keeper: RouterKeeper) -> None:
        self._refusal = await keeper.keep()
        if self._refusal:
            self._hurry.set()
            self._stop.set()

    def _show(self, table: ModelTable) -> None:
        self._table = table
        self._console.show(table)
        self._announce()

    def _announce(self) -> None:
        """Say how to try the server, once: when it listens and the first model is there or has failed."""
        states = {entry.name: entry.state for entry in self._table.models} if self._table else {}
        is_decided = self._main_model is None or states.get(self._main_model) not in (*_UNDECIDED, None)
        if self._is_router_up and is_decided and not self._is_announced and not self._stop.is_set():
            self._is_announced = True
            self._console.say(*first_steps(self._config.server, self._main_model))

    # --- another configuration -------------------------------------------------------------------------

    def _on_hangup(self, fleet: Fleet) -> None:
        if self._has_terminal and not _is_on_terminal():  # it was closed, and the server with it
            self._on_signal(signal.SIGHUP)
            return
        with contextlib.suppress(ConfigError):  # it has been told, and all goes on as before
            self._reload(fleet)

    def _reload(self, fleet: Fleet) -> list[str]:
        """Read the configuration again and apply what changed; raises `ConfigError`, and then changes nothing."""
        try:
            wanted = self._read_again()
            configuration.check_default_model(wanted)
        except ConfigError as error:
            log.error("configuration not taken over: %s", error)
            self._console.say(f"configuration not taken over: {error}")
            raise
        change = reload.compare(self._config, wanted)
        self._config = change.config
        configuration.dump(self._config, self._run_dir / CONFIG_FILE)
        reconfigure(fleet, change)
        self._console.say("configuration read again:", *(f"  {line}" for line in change.lines()))
        log.info("configuration read again %s", fields(changes="; ".join(change.lines())))
        return change.lines()

    # --- ending ---------------------------------------------------------------------------------------

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        self._has_terminal = _is_on_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("signal received %s", fields(signal=number.name))
        if self._stop.is_set():
            self._hurry.set()
            return
        if number is signal.SIGINT:
            self._drain_s = min(self._drain_s, CTRL_C_DRAIN_S)
        self._console.say("", f"ending: at most {self._drain_s:g} s for running requests; once more ends it at once")
        self._stop.set()

    async def _end(self, fleet: Fleet, keeper: RouterKeeper) -> None:
        """The router drains and goes first, then the workers."""
        self._notifier.stopping()
        await keeper.stop(self._drain_s + ROUTER_GRACE_S, self._hurry)
        fleet.stop()
        patience_s = self._config.supervisor.stop_timeout_s + KILL_MARGIN_S
        if not await first_of(fleet.is_empty, self._hurry, patience_s):
            await first_of(fleet.is_empty, asyncio.Event(), HURRY_S)
            fleet.kill()
            await fleet.is_empty.wait()


def _is_on_terminal() -> bool:
    """Whether somebody sits before this process; no more when the terminal was closed."""
    return os.isatty(0)
