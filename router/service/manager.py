"""Installs, removes and looks at the service with the tool of this system: launchctl or systemctl."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from common import paths
from common.errors import MlxspecError, NotFound
from router.service import launchd, systemd
from router.service.definition import Service

COMMAND_TIMEOUT_S = 90.0  # a stop may take the whole drain
NO_TOOL = 127


class ServiceError(MlxspecError):
    """The system refused: no right to write the file, or no service manager."""

    code = "service_error"
    http_status = 500


class Result(msgspec.Struct, frozen=True):
    """What a command of the system said."""

    code: int
    output: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`is_current`: the file is what `install` with the same options would write."""

    path: str
    is_installed: bool
    is_current: bool
    is_running: bool


class Kind(Protocol):
    """What `launchd` and `systemd` have in common."""

    def path(self, service: Service, /) -> Path: ...
    def content(self, service: Service, /) -> str: ...
    def start_commands(self, service: Service, /) -> list[list[str]]: ...
    def stop_commands(self, service: Service, /) -> list[list[str]]: ...
    def status_command(self, service: Service, /) -> list[str]: ...
    def is_running(self, output: str, /) -> bool: ...


Runner = Callable[[Sequence[str]], Result]


def kind_of(platform: str = sys.platform) -> Kind:
    """This system's service manager."""
    return launchd if platform == "darwin" else systemd


def run_command(command: Sequence[str]) -> Result:
    """Run a command of the system and take what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError:
        return Result(NO_TOOL, f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return Result(1, f"no answer within {COMMAND_TIMEOUT_S:g} s")
    return Result(done.returncode, (done.stdout + done.stderr).strip())


class Manager:
    """The service on this machine."""

    def __init__(self, service: Service, kind: Kind | None = None, run: Runner = run_command) -> None:
        self._service, self._kind, self._run = service, kind or kind_of(), run
        self.path = self._kind.path(service)

    def content(self) -> str:
        """The text of the plist or unit."""
        return self._kind.content(self._service)

    def install(self, *, start: bool = True) -> None:
        """Write the file and start the service; one that runs is replaced. Raises `ServiceError`."""
        self._make_home()
        was_installed = self.path.exists()
        self._write(self.content())
        if not start:
            return
        if was_installed and self._kind is launchd:
            self._stop()  # launchd takes a changed file only after the old one has gone
        for command in self._kind.start_commands(self._service):
            self._must(command)

    def uninstall(self) -> None:
        """Stop the service and remove its file. Raises `NotFound` when there is none."""
        if not self.path.exists():
            raise NotFound(f"no service is installed at {self.path}")
        self._stop()
        try:
            self.path.unlink()
        except OSError as error:
            raise self._refused(error) from error

    def status(self) -> Status:
        """Whether it is installed, up to date and running."""
        text = self._read()
        result = self._run(self._kind.status_command(self._service))
        return Status(
            path=str(self.path),
            is_installed=text is not None,
            is_current=text == self.content(),
            is_running=self._kind.is_running(result.output),
        )

    def _make_home(self) -> None:
        """The state folder with its logs, which launchd opens before the server runs; never left to root."""
        for folder in (self._service.home, self._service.home / "logs"):
            is_new = not folder.exists()
            paths.ensure_private_dir(folder)
            if is_new and os.geteuid() == 0:
                shutil.chown(folder, self._service.run_by)

    def _stop(self) -> None:
        """Stop it; one that does not run is no error."""
        for command in self._kind.stop_commands(self._service):
            self._run(command)

    def _must(self, command: Sequence[str]) -> None:
        result = self._run(command)
        if result.code:
            raise ServiceError(
                f"`{' '.join(command)}` failed: {result.output or f'exit code {result.code}'}; "
                f"the service's file is {self.path}: start it by hand, or remove it with: mlxspec service uninstall"
            )

    def _write(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(f".{self.path.name}.new")
            fresh.write_text(text, encoding="utf-8")
            fresh.chmod(0o644)  # launchd refuses files that others may write
            fresh.replace(self.path)
        except OSError as error:
            raise self._refused(error) from error

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:
            return None

    def _refused(self, error: OSError) -> ServiceError:
        hint = "; a service of the whole system needs sudo" if self._service.is_system else ""
        return ServiceError(f"cannot write {self.path}: {error.strerror}{hint}")
