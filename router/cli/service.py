"""`mlxspec service …`: the server as a service of launchd or systemd."""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from common import paths
from router.cli.output import ExitStatus, Output
from router.cli.verbs import SERVER, Verbs, add_json
from router.service.definition import Service
from router.service.log_tail import LogTail
from router.service.manager import Manager
from router.supervisor.options import add_serve_options, read_config

FOLLOW_PERIOD_S = 0.3
_SYSTEM_HELP = (
    "a LaunchDaemon, which starts with the machine (needs sudo)"
    if sys.platform == "darwin"
    else "a unit of the system's systemd, which starts with the machine (needs sudo)"
)


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "service",
        topic=SERVER,
        help="run the server in the background, now and after every start of the machine",
        examples="mlxspec service install --port 8123\n"
        "mlxspec service print --system   # show the file, change nothing\n"
        "mlxspec service logs --follow",
    )
    commands = Verbs(parser, "service_command", is_required=True)
    for name, what, run in (
        ("install", "write the service's file and start it", install),
        ("print", "show the file that install would write", show),
        ("status", "is it installed, and does it run?", status),
    ):
        verb = commands.add(name, help=what, run=run)
        _add_kind(verb)
        add_serve_options(verb)
        if run is install:
            verb.add_argument("--no-start", action="store_true", help="only write the file")
        if run is status:
            add_json(verb)
    _add_kind(commands.add("uninstall", help="stop the service and remove its file", run=uninstall))
    logs = commands.add("logs", help="the last lines of all logs", run=show_logs)
    logs.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="lines of each log (default: 20)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is added, until Ctrl-C")


def install(options: argparse.Namespace, output: Output) -> int:
    read_config(options)  # what cannot work is said now, not in a log
    manager = Manager(_service(options, _serve_options(options)))
    manager.install(start=not options.no_start)
    output.line(f"wrote {manager.path}")
    if options.no_start:
        return ExitStatus.OK
    output.line("started; see: mlxspec service status, mlxspec service logs --follow")
    if sys.platform == "linux" and not options.system:
        output.note("it ends with your last session; to keep it running: loginctl enable-linger")
    return ExitStatus.OK


def uninstall(options: argparse.Namespace, output: Output) -> int:
    manager = Manager(_service(options, ()))
    manager.uninstall()
    output.line(f"stopped, and removed {manager.path}")
    return ExitStatus.OK


def show(options: argparse.Namespace, output: Output) -> int:
    manager = Manager(_service(options, _serve_options(options)))
    output.note(f"# {manager.path}")
    output.write(manager.content())
    return ExitStatus.OK


def status(options: argparse.Namespace, output: Output) -> int:
    found = Manager(_service(options, _serve_options(options))).status()
    if output.is_json:
        output.json(found)
    else:
        output.facts(
            [
                ("file", found.path if found.is_installed else f"{found.path} (not installed)"),
                ("running", "yes" if found.is_running else "no"),
            ]
        )
        if found.is_installed and not found.is_current:
            output.note("the file differs from what `mlxspec service install` with these options would write")
    return ExitStatus.OK if found.is_running else ExitStatus.FAILED


def show_logs(options: argparse.Namespace, output: Output) -> int:
    tail = LogTail(paths.logs_dir())
    for name, line in tail.last(max(0, options.lines)):
        output.line(f"{name:<12} {line}")
    while options.follow:
        time.sleep(FOLLOW_PERIOD_S)
        for name, line in tail.added():
            output.line(f"{name:<12} {line}")
    return ExitStatus.OK


def _add_kind(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_argument_group("service")
    kind.add_argument("--system", action="store_true", help=_SYSTEM_HELP)
    kind.add_argument("--user", metavar="NAME", help="who runs it, with --system (default: you)")


def _service(options: argparse.Namespace, serve_options: tuple[str, ...]) -> Service:
    """The service of this state folder. With sudo that is the folder of the user who called it, not root's."""
    service = Service(serve_options, paths.home(), options.system, options.user or "")
    if options.system and not os.environ.get("MLXSPEC_HOME"):
        return replace(service, home=Path(f"~{service.run_by}/.mlxspec").expanduser())
    return service


def _serve_options(options: argparse.Namespace) -> tuple[str, ...]:
    """The options of `mlxspec serve` that were given, with absolute paths."""
    given = {
        "--host": options.host,
        "--port": options.port,
        "--model-path": _absolute(options.model_path),
        "--memory-limit-gb": options.memory_limit_gb,
        "--config": options.config and options.config.absolute(),
        "--log-level": options.log_level,
    }
    return tuple(word for name, value in given.items() if value is not None for word in (name, str(value)))


def _absolute(path: str | None) -> str | None:
    """A folder by its absolute path; a Hugging Face id as it is."""
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path
