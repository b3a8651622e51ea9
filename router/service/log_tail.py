"""The last lines of all logs, and what is added to them: for `mlxspec service logs`."""

import os
from collections.abc import Iterator
from pathlib import Path

TAIL_BYTES = 64 * 1024


class LogTail:
    """The logs of one folder; files that appear, shrink or go are no surprise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def last(self, lines: int) -> Iterator[tuple[str, str]]:
        """(log's name, line) of the last `lines` of each log, ordered by their time stamps."""
        found = [(path.stem, line) for path in self._logs() for line in self._tail(path)[-lines:]] if lines else []
        if not lines:
            for path in self._logs():
                self._tail(path)
        yield from sorted(found, key=lambda pair: _time(pair[1]))

    def added(self) -> Iterator[tuple[str, str]]:
        """(log's name, line) of what came since the last call; a log that was cut begins anew."""
        for path in self._logs():
            for line in self._since(path):
                yield path.stem, line

    def _logs(self) -> list[Path]:
        return sorted(self._folder.rglob("*.log"))

    def _tail(self, path: Path) -> list[str]:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            start = max(0, end - TAIL_BYTES)
            log.seek(start)
            lines = log.read(end - start).decode(errors="replace").splitlines()
        self._offsets[path] = end
        return lines[1:] if start else lines

    def _since(self, path: Path) -> list[str]:
        offset = self._offsets.get(path, 0)
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            if end < offset:
                offset = 0
            log.seek(offset)
            block = log.read(end - offset)
        whole = block.rfind(b"\n") + 1  # a line in the making waits for its end
        self._offsets[path] = offset + whole
        return block[:whole].decode(errors="replace").splitlines()


def _time(line: str) -> str:
    """What a line is ordered by: its time stamp. Lines without one, such as a traceback's, go first."""
    return line[:23] if line[:4].isdigit() else ""
