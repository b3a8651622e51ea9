"""Child processes: the router and the workers are spawned, watched and ended here.

Each child holds the read end of a pipe whose write end only the supervisor has, so that it ends when the
supervisor does, however that died. Each leads its own process group: a terminal's Ctrl-C reaches the
supervisor alone.
"""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common import lifeline, openblas, paths

TAIL_BYTES = 16 * 1024
MAX_DETAIL_CHARS = 500
TOKEN_VARIABLE = "MLXSPEC_TOKEN"
_RECORD = re.compile(r"^\S+ \S+ (?P<level>[A-Z]+) +[^:]*: (?P<sentence>.*)$")


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs that children run; tests put their own here."""

    worker: Sequence[str] = (sys.executable, "-P", "-m", "worker")
    router: Sequence[str] = (sys.executable, "-P", "-m", "router")


@dataclass(frozen=True, slots=True)
class WorkerLaunch:
    """What makes one worker process."""

    identity: str
    name: str
    path: str
    run_dir: Path
    token: str
    log_path: Path


class Lifeline:
    """The pipe whose end of file tells the children that the supervisor is gone."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self._write_end)


class Child:
    """One running process with its log."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path, log_offset: int) -> None:
        self._process = process
        self._log_path = log_path
        self._log_offset = log_offset
        self.pid = process.pid

    async def wait(self) -> int:
        """The exit code once the process is reaped; negative for a signal."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask it to finish and go (SIGTERM)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def abort(self) -> None:
        """Have it write where all its threads stand into its log, and die (SIGABRT)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)

    def kill(self) -> None:
        """End it and whatever it has started, at once (SIGKILL)."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def describe_exit(self, code: int, otherwise: str = "") -> str:
        """Why it ended, as far as its exit code and its log tell; `otherwise` is what else is known."""
        if code < 0:
            return exit_text(code)
        return last_error(self._log_path, self._log_offset) or otherwise or exit_text(code)


async def spawn_worker(commands: Commands, launch: WorkerLaunch, line: Lifeline) -> Child:
    """Start a worker process. Raises `OSError` when the system refuses."""
    arguments = [
        *("--identity", launch.identity),
        *("--name", launch.name),
        *("--model", launch.path),
        *("--run-dir", str(launch.run_dir)),
    ]
    env = openblas.with_preload(os.environ) | {TOKEN_VARIABLE: launch.token}
    return await _spawn([*commands.worker, *arguments], env, launch.log_path, line)


async def spawn_router(commands: Commands, run_dir: Path, line: Lifeline) -> Child:
    """Start the router process. Raises `OSError` when the system refuses."""
    command = [*commands.router, "--run-dir", str(run_dir)]
    return await _spawn(command, os.environ, paths.logs_dir() / "router.log", line)


async def _spawn(command: Sequence[str], env: Mapping[str, str], log_path: Path, line: Lifeline) -> Child:
    with open_log(log_path) as log:
        offset = log.tell()
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**env, lifeline.VARIABLE: str(line.read_end)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(line.read_end,),
            process_group=0,
        )
    return Child(process, log_path, offset)


def new_token() -> str:
    """The secret by which a worker proves that we spawned it."""
    return secrets.token_hex(16)


def open_log(path: Path) -> IO[bytes]:
    """Open a log for appending (mode 0600), as `rotation.py` needs it."""
    paths.ensure_private_dir(path.parent)
    log = path.open("ab")
    os.fchmod(log.fileno(), 0o600)
    return log


def last_error(path: Path, offset: int = 0) -> str:
    """What went wrong in the log after `offset`: its last ERROR sentence or traceback line; or nothing."""
    try:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(offset if offset <= end else 0, end - TAIL_BYTES))  # beyond the end: it was cut meanwhile
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return _worst_line([line.rstrip() for line in lines if line.strip()])[:MAX_DETAIL_CHARS]


def _worst_line(lines: Sequence[str]) -> str:
    plain = ""  # the end of a traceback, or what a program that does not log has said
    for line in reversed(lines):
        record = _RECORD.match(line)
        if record and record["level"] in ("ERROR", "CRITICAL"):
            return record["sentence"]
        if record and plain:
            return plain
        if not record and not plain and not line.startswith(" "):
            plain = line
    return plain


def exit_text(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
