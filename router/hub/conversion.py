"""Weights into another form, by a child process: the conversion needs MLX, which only the worker's side may import."""

import subprocess
from pathlib import Path

from common.errors import HubError, MlxspecError, from_code
from router import child as child_process
from router.hub.store import Store

MODULE = "worker.convert.mlx"
TIMEOUT_S = 6 * 3600.0
ERROR_PREFIX = "error: "


def convert(source: Path, out: Path, form: str | None, group_size: int | None = None) -> Path:
    """Write the model in `source` to `out` in the given form (None: as stored). `out` is whole or is not there.

    The child ends with this process, however that ends. Raises the child's error.
    """
    Store.empty(out)
    arguments = [str(source), str(out)]
    arguments += ["--form", form] if form else []
    arguments += ["--group-size", str(group_size)] if group_size else []
    with child_process.running(MODULE, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            _, complaint = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise HubError(f"the conversion took longer than {TIMEOUT_S / 3600:g} h and was ended") from None
    if child.returncode != 0:
        Store.empty(out.parent / f".{out.name}-{child.pid}")
        raise _error(child.returncode, complaint)
    return out


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
