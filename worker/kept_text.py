"""What a model was asked and answered, as token ids on disk, for `mlxspec draft build --served`; off unless wanted.

`MLXSPEC_HOME/texts/MODEL` has two files of JSON lines that only their owner can read: when the newer one is full it
takes the older one's place.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from common import paths
from common.logs import fields

FILE_BYTES = 16 << 20
NEWER, OLDER = "newer.jsonl", "older.jsonl"
log = logging.getLogger(__name__)


class Conversation(msgspec.Struct, frozen=True):
    """Token ids of a whole prompt, its template's included, and of its answer."""

    prompt: list[int]
    answer: list[int]


class KeptText:
    """Adds to the text of one model; several workers may do so at a time."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._is_broken = False

    def keep(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Write a conversation down; where that fails a warning is logged, and nothing more is kept."""
        if self._is_broken or not answer:
            return
        try:
            self._append(msgspec.json.encode(Conversation(list(prompt), list(answer))) + b"\n")
        except OSError as error:
            self._is_broken = True
            log.warning("No more text is kept. %s", fields(folder=self._folder, reason=str(error)))

    def _append(self, line: bytes) -> None:
        for folder in (paths.texts_dir(), self._folder):
            paths.ensure_private_dir(folder)
        newer = self._folder / NEWER
        if newer.is_file() and newer.stat().st_size + len(line) > self._file_bytes:
            os.replace(newer, self._folder / OLDER)
        descriptor = os.open(newer, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(line)  # at once: lines of several workers do not mix


def folder_of(model: str) -> Path:
    """Where the text of the model that is served under this name is kept."""
    return paths.texts_dir() / model


def conversations(folder: Path) -> Iterator[Conversation]:
    """What is kept, the oldest first; a line that was cut off is left out."""
    for name in (OLDER, NEWER):
        file = folder / name
        for line in file.read_bytes().splitlines() if file.is_file() else []:
            try:
                yield msgspec.json.decode(line, type=Conversation)
            except msgspec.DecodeError:
                continue
