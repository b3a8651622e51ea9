"""Linux: a unit of the user's systemd, or of the system's."""

import os
from pathlib import Path

from router.service.definition import MAX_OPEN_FILES, STOP_TIMEOUT_S, UMASK, Service

UNIT = "mlxspec.service"
WATCHDOG_S = 30
START_TIMEOUT_S = 90
EXIT_CONFIG = 3

_TEMPLATE = """\
# Written by `mlxspec service install`, which writes it anew: put your own settings in a drop-in (systemctl edit).
[Unit]
Description=mlxspec LLM server
After=network.target
# Never give up: a server that failed is started again however often that was.
StartLimitIntervalSec=0

[Service]
# Ready when the port is open; models load meanwhile.
Type=notify
NotifyAccess=main
{user}ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
{environment}
WorkingDirectory={home}
Restart=on-failure
RestartSec=2
# A wrong configuration stays wrong: wait for somebody to mend it.
RestartPreventExitStatus={exit_config}
WatchdogSec={watchdog}
TimeoutStartSec={start_timeout}
TimeoutStopSec={stop_timeout}
# SIGTERM to the supervisor alone, which drains the others; SIGKILL to what is left.
KillMode=mixed
UMask={umask:04o}
LimitNOFILE={files}
NoNewPrivileges=yes

[Install]
WantedBy={target}
"""


def path(service: Service) -> Path:
    """Where systemd looks for it."""
    if service.is_system:
        return Path("/etc/systemd/system") / UNIT
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "systemd" / "user" / UNIT


def content(service: Service) -> str:
    """The unit's text. It needs no runtime directory: sockets lie in MLXSPEC_HOME/run, which the server makes 0700."""
    return _TEMPLATE.format(
        user=f"User={service.run_by}\n" if service.is_system else "",
        command=" ".join(_argument(word) for word in service.command),
        environment="\n".join(f"Environment={_quoted(f'{k}={v}')}" for k, v in service.environment.items()),
        home=str(service.home).replace("%", "%%"),
        exit_config=EXIT_CONFIG,
        watchdog=WATCHDOG_S,
        start_timeout=START_TIMEOUT_S,
        stop_timeout=STOP_TIMEOUT_S,
        umask=UMASK,
        files=MAX_OPEN_FILES,
        target="multi-user.target" if service.is_system else "default.target",
    )


def start_commands(service: Service) -> list[list[str]]:
    """Read it, start it now and at every login or boot; `restart` also takes what has changed."""
    control = _control(service)
    return [[*control, "daemon-reload"], [*control, "enable", UNIT], [*control, "restart", UNIT]]


def stop_commands(service: Service) -> list[list[str]]:
    """Stop it, now and for the future."""
    return [[*_control(service), "disable", "--now", UNIT]]


def status_command(service: Service) -> list[str]:
    return [*_control(service), "is-active", UNIT]


def is_running(output: str) -> bool:
    return output.strip() in ("active", "reloading")


def _control(service: Service) -> list[str]:
    return ["systemctl"] if service.is_system else ["systemctl", "--user"]


def _argument(word: str) -> str:
    """A word of a command line, in which systemd also expands `$NAME`."""
    return _quoted(word.replace("$", "$$"))


def _quoted(word: str) -> str:
    """A word in which systemd's quotes, backslashes and % specifiers mean themselves."""
    safe = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{safe}"' if any(c.isspace() or c in "\"'\\;" for c in word) or not word else safe
