"""Keeps logs short: a file that has grown too long is copied to `<name>.1` and emptied where it is.

Its writers go on undisturbed, since all of them append: workers and router on the descriptor they inherited, native
crash dumps, and what launchd collects. Lines written between copy and cut, some microseconds, are lost.
"""

import asyncio
import itertools
import logging
import os
import shutil
from pathlib import Path

from common.config import LogConfig
from common.logs import fields

log = logging.getLogger(__name__)
PERIOD_S = 5.0


async def keep_short(folder: Path, limits: LogConfig) -> None:
    """Look after all logs below `folder` for ever."""
    while True:
        await asyncio.to_thread(rotate_long, folder, limits)
        await asyncio.sleep(PERIOD_S)


def rotate_long(folder: Path, limits: LogConfig) -> None:
    """Rotate those that have grown too long. A file that cannot be is logged."""
    for path in sorted(folder.rglob("*.log")):
        try:
            if path.stat().st_size > limits.max_bytes:
                rotate(path, limits.backups)
        except OSError as error:
            log.warning("log not rotated %s", fields(path=path, error=error.strerror))


def rotate(path: Path, backups: int) -> None:
    """`path` becomes `<name>.1`, that `<name>.2` and so on; the last one goes. Raises `OSError`."""
    older = [path.with_name(f"{path.name}.{number}") for number in range(1, backups + 1)]
    for newer, old in reversed(list(itertools.pairwise(older))):
        if newer.exists():
            newer.replace(old)
    shutil.copyfile(path, older[0])
    older[0].chmod(0o600)
    os.truncate(path, 0)
