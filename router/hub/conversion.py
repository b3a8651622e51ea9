"""Weights into another form, by a child process: the conversion needs MLX, which only the worker's side may import."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from common import lifeline, openblas
from common.errors import HubError, MlxspecError, from_code
from router.hub.store import Store

MODULE = "worker.convert.mlx"
TIMEOUT_S = 6 * 3600.0
STOP_S = 5.0
ERROR_PREFIX = "error: "


def convert(source: Path, out: Path, form: str | None, group_size: int | None = None) -> Path:
    """Write the model in `source` to `out` in the given form (None: as stored). `out` is whole or is not there.

    The child ends with this process, however that ends. Raises the child's error.
    """
    Store.empty(out)
    command = [sys.executable, "-P", "-m", MODULE, str(source), str(out)]
    command += ["--form", form] if form else []
    command += ["--group-size", str(group_size)] if group_size else []
    read_end, write_end = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, write_end)  # its end of file ends the child
        env = openblas.with_preload() | {lifeline.VARIABLE: str(read_end)}
        child = subprocess.Popen(
            command,
            env=env,
            pass_fds=(read_end,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(read_end)
        stack.callback(_end, child)
        try:
            _, complaint = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise HubError(f"the conversion took longer than {TIMEOUT_S / 3600:g} h and was ended") from None
    if child.returncode != 0:
        Store.empty(out.parent / f".{out.name}-{child.pid}")
        raise _error(child.returncode, complaint)
    return out


def _end(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
            return
        child.kill()
        child.wait()


def _error(status: int, complaint: str) -> MlxspecError:
    """The child's last line says what and why: `error: CODE: message`."""
    lines = [line for line in complaint.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if last.startswith(ERROR_PREFIX):
        code, _, message = last.removeprefix(ERROR_PREFIX).partition(": ")
        return from_code(code, message)
    if status < 0:
        hint = " (out of memory, perhaps)" if status == -9 else ""
        return HubError(f"the conversion was ended by signal {-status}{hint}; nothing half-made is left")
    return HubError(f"the conversion failed with exit code {status}: {last[:300] or 'no reason given'}")
