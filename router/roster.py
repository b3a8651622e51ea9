"""Which peers of the data socket are workers of our supervisor: those whose hello carries their token."""

import hmac
from collections.abc import Mapping

from common.messages import PROTOCOL_VERSION, WorkerEntry, WorkerHello

MAX_STRANGERS = 256


class Roster:
    """Remembers hellos. One may come before the table that vouches for it, so trust is decided late."""

    def __init__(self) -> None:
        self._hellos: dict[str, WorkerHello] = {}

    def greet(self, sender: str, hello: WorkerHello, workers: Mapping[str, WorkerEntry]) -> bool:
        """Take note of a hello; False when it cannot be right."""
        is_wrong = hello.version != PROTOCOL_VERSION or hello.identity != sender
        if is_wrong or (sender in workers and not _is_vouched(hello, workers[sender])):
            return False
        self._hellos[sender] = hello
        self._forget_strangers(workers)
        return True

    def is_trusted(self, sender: str, workers: Mapping[str, WorkerEntry]) -> bool:
        hello, entry = self._hellos.get(sender), workers.get(sender)
        return hello is not None and entry is not None and _is_vouched(hello, entry)

    def _forget_strangers(self, workers: Mapping[str, WorkerEntry]) -> None:
        strangers = [identity for identity in self._hellos if identity not in workers]
        for identity in strangers[:-MAX_STRANGERS]:
            del self._hellos[identity]


def _is_vouched(hello: WorkerHello, entry: WorkerEntry) -> bool:
    return hmac.compare_digest(hello.token.encode(), entry.token.encode())
