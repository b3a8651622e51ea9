"""What was set over HTTP and outlives the server: a small file in the state folder, replaced as a whole."""

import logging
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from common import paths
from common.groups import Group
from common.logs import fields

log = logging.getLogger(__name__)
FILE = "state.json"


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """`models` are the paths of registered ones; `pins` say of a model, configured or not, whether it is pinned."""

    groups: dict[str, Group] = {}
    aliases: dict[str, str] = {}
    models: dict[str, str] = {}
    pins: dict[str, bool] = {}


def default_path() -> Path:
    return paths.home() / FILE


def load(path: Path) -> Saved:
    """What was saved. An unreadable file is put aside (`state.json.broken`), so that the server starts all the same."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Saved)
    except FileNotFoundError:
        return Saved()
    except (msgspec.DecodeError, ValueError) as error:
        aside = path.with_name(path.name + ".broken")
        with suppress(FileNotFoundError):  # another process was faster
            path.replace(aside)
        log.error("saved state is unreadable %s", fields(put_aside=aside, error=error))
        return Saved()


def save(saved: Saved, path: Path) -> None:
    """Replace the file: a reader, or a crash, sees the old or the new one."""
    paths.ensure_private_dir(path.parent)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(saved)))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
