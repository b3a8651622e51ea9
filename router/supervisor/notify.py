"""Tells systemd that the server is ready, alive or ending (the protocol of sd_notify(3)); elsewhere it does nothing."""

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

from common.logs import fields

log = logging.getLogger(__name__)
PARTS = 3  # signs of life in the time in which systemd wants one


class Notifier:
    """Datagrams to the socket that systemd named. One that cannot be sent is logged: the server goes on."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = _watchdog_s(env)
        self._is_ready = False

    def ready(self) -> None:
        """The port is open. Said once, whatever router opened it."""
        if not self._is_ready:
            self._is_ready = True
            self._tell("READY=1")

    def stopping(self) -> None:
        """Requests are being drained."""
        self._tell("STOPPING=1")

    async def keep_alive(self) -> None:
        """Sign of life of the event loop, for as long as systemd wants one."""
        while self._watchdog_s:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / PARTS)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            log.warning("systemd not told %s", fields(state=state, error=error.strerror))


def _watchdog_s(env: Mapping[str, str]) -> float:
    """How often systemd wants a sign of life; 0: never, or not from this process."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = env.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdigit() else 0.0
