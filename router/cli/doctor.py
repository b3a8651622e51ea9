"""`mlxspec doctor`: is this machine fit for the server, and if not, what is to be done?"""

import argparse
import resource
from collections.abc import Iterator

import msgspec
import psutil

from common import config as configuration
from common import paths
from common.config import Config
from common.errors import ConfigError
from router import doctor
from router.cli.output import ExitStatus, Output
from router.cli.verbs import SETUP, Verbs, add_json
from router.doctor import Check, Level
from router.service.definition import Service
from router.service.manager import Manager
from router.supervisor import memory
from router.supervisor.options import add_serve_options, read_config

STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def add_verbs(verbs: Verbs) -> None:
    parser = verbs.add(
        "doctor",
        topic=SETUP,
        help="check this machine and the configuration, and say what to do",
        description="Check this machine and the configuration, and say what to do. "
        "Takes the options of `mlxspec serve`. Exit code 1 if the server could not work.",
        examples="mlxspec doctor\nmlxspec doctor --config config.toml --json",
        run=examine,
    )
    add_serve_options(parser)
    add_json(parser)


def examine(options: argparse.Namespace, output: Output) -> int:
    checks = []
    for check in all_checks(options):
        checks.append(check)
        if not output.is_json:
            output.line(f"{check.level:<5} {check.name:<9} {check.found}", STYLES[check.level])
            if check.advice:
                output.line(f"{'':<15} -> {check.advice}")
    if output.is_json:
        output.json({"checks": checks, "is_fit": not _failures(checks)})
    elif failures := _failures(checks):
        output.note(f"{len(failures)} of {len(checks)} checks failed")
    return ExitStatus.FAILED if _failures(checks) else ExitStatus.OK


def all_checks(options: argparse.Namespace) -> Iterator[Check]:
    """Every check, the quick ones first."""
    home = paths.home()
    try:
        config = read_config(options)
        yield Check("config", Level.OK, str(options.config or _found_file() or "defaults"))
    except ConfigError as error:
        yield Check("config", Level.FAIL, error.message, "mend it; config.toml of the project shows every key")
        config = Config()
    if (owner := doctor.running_server(paths.run_dir())) is not None:
        config = configuration.load_effective(paths.run_dir() / "config.json")  # as it was started
    yield doctor.check_home(home)
    yield doctor.check_disk(home)
    yield doctor.check_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield doctor.check_port(config.server.host, config.server.port, owner)
    yield doctor.check_models(config)
    for is_system in (False, True):
        status = Manager(Service((), home, is_system)).status()
        if status.is_installed or not is_system:
            yield doctor.check_service(msgspec.structs.asdict(status), status.path)
    yield doctor.check_memory(memory.budget(config.supervisor), psutil.virtual_memory().total)
    yield from doctor.examine_mlx()


def _found_file() -> str:
    file = paths.home() / "config.toml"
    return str(file) if file.is_file() else ""


def _failures(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.level is Level.FAIL]
