"""macOS: a LaunchAgent (with the user's login) or a LaunchDaemon (with the machine; it gets the GPU all the same)."""

import os
import plistlib
from pathlib import Path
from typing import Any

from router.service.definition import MAX_OPEN_FILES, STOP_TIMEOUT_S, UMASK, Service

LABEL = "dev.mlxspec.server"


def path(service: Service) -> Path:
    """Where launchd looks for it."""
    library = Path("/Library/LaunchDaemons") if service.is_system else Path.home() / "Library" / "LaunchAgents"
    return library / f"{LABEL}.plist"


def content(service: Service) -> str:
    """The property list as XML."""
    return plistlib.dumps(properties(service), sort_keys=False).decode()


def properties(service: Service) -> dict[str, Any]:
    """Why each key: `ProcessType` Background would throttle the GPU's feeder to an eighth of its speed; launchd's own
    patience before SIGKILL is 20 s, less than a drain; `Umask` is an integer, since launchd reads a string as octal
    on some systems only. Standard output is short, and the supervisor truncates it with the other logs.
    """
    log = str(service.home / "logs" / "service.log")
    daemon = {"UserName": service.run_by} if service.is_system else {}
    return {
        "Label": LABEL,
        "ProgramArguments": list(service.command),
        **daemon,
        "EnvironmentVariables": service.environment,
        "WorkingDirectory": str(service.home),
        "ProcessType": "Interactive",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": STOP_TIMEOUT_S,
        "SoftResourceLimits": {"NumberOfFiles": MAX_OPEN_FILES},
        "HardResourceLimits": {"NumberOfFiles": MAX_OPEN_FILES},
        "Umask": UMASK,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }


def start_commands(service: Service) -> list[list[str]]:
    """Load it, which starts it too."""
    return [["launchctl", "bootstrap", domain(service), str(path(service))]]


def stop_commands(service: Service) -> list[list[str]]:
    """Stop it and forget it."""
    return [["launchctl", "bootout", f"{domain(service)}/{LABEL}"]]


def status_command(service: Service) -> list[str]:
    """Exit code 0 when launchd knows it; its output has a line `state = running`."""
    return ["launchctl", "print", f"{domain(service)}/{LABEL}"]


def is_running(output: str) -> bool:
    """Whether that output tells of a running service."""
    return any(line.strip() == "state = running" for line in output.splitlines())


def domain(service: Service) -> str:
    return "system" if service.is_system else f"gui/{os.getuid()}"
