"""What a service is, whoever runs it: the command, its folder, its user. launchd and systemd get the same limits."""

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path

STOP_TIMEOUT_S = 60  # a drain of 30 s, workers that free their models, and some room
MAX_OPEN_FILES = 8192
UMASK = 0o077


@dataclass(frozen=True, slots=True)
class Service:
    """One server as a service.

    With `is_system` it starts with the machine and runs as `user`, else with its user's login.
    """

    options: tuple[str, ...]  # of `mlxspec serve`, paths absolute
    home: Path
    is_system: bool = False
    user: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """The server in the foreground, by absolute paths: a service has neither our PATH nor our folder."""
        return (sys.executable, "-P", "-m", "router.cli", "serve", *self.options)

    @property
    def environment(self) -> dict[str, str]:
        """No key and no token is ever written into a service's file."""
        return {"MLXSPEC_HOME": str(self.home)}

    @property
    def run_by(self) -> str:
        """Its user; with sudo the one who called it, not root."""
        return self.user or os.environ.get("SUDO_USER") or getpass.getuser()
