"""Keeps one router process alive: a dead one is replaced at once, and with delays when it keeps dying."""

import asyncio
import logging
import random
import time
from pathlib import Path

from common.config import SupervisorConfig
from common.logs import fields
from common.states import ExitCode
from router.supervisor import process
from router.supervisor.machine import restart_delay

log = logging.getLogger(__name__)


class RouterKeeper:
    """The router process and its restarts."""

    def __init__(
        self, commands: process.Commands, run_dir: Path, line: process.Lifeline, limits: SupervisorConfig
    ) -> None:
        self.is_stopping = False
        self.restarts = 0
        self._commands, self._run_dir, self._line, self._limits = commands, run_dir, line, limits
        self._child: process.Child | None = None
        self._gone = asyncio.Event()
        self._gone.set()

    async def keep(self) -> str | None:
        """Run routers until `stop`. Returns early, and why, when the first one says that none can start."""
        crashes = 0
        while not self.is_stopping:
            started_at = time.monotonic()
            code, detail = await self._live()
            if self.is_stopping:
                return None
            if code == ExitCode.BAD_MODEL and self.restarts == 0:
                return detail  # a port in use, or a wrong configuration
            is_stable = time.monotonic() - started_at >= self._limits.stable_after_s
            crashes = 1 if is_stable else crashes + 1
            delay = restart_delay(crashes, self._limits, random.random())
            log.error("router gone %s", fields(code=code, detail=detail, next_try_in_s=delay))
            self.restarts += 1
            await asyncio.sleep(delay)
        return None

    async def stop(self, within_s: float, hurry: asyncio.Event) -> None:
        """Let it drain for at most `within_s`, or until `hurry`; then end it. Returns when it is reaped."""
        self.is_stopping = True
        if self._child:
            self._child.terminate()
        if not await first_of(self._gone, hurry, within_s) and self._child:
            log.warning("router did not end by itself %s", fields(within_s=within_s))
            self._child.kill()
        await self._gone.wait()

    async def _live(self) -> tuple[int, str]:
        self._gone.clear()
        try:
            self._child = await process.spawn_router(self._commands, self._run_dir, self._line)
            if self.is_stopping:
                self._child.terminate()
            code = await self._child.wait()
            return code, self._child.describe_exit(code)
        except OSError as error:
            return 1, f"cannot be spawned: {error.strerror}"
        finally:
            self._child = None
            self._gone.set()


async def first_of(wanted: asyncio.Event, hurry: asyncio.Event, within_s: float) -> bool:
    """Whether `wanted` was set within the time and before `hurry`."""
    waits = [asyncio.ensure_future(event.wait()) for event in (wanted, hurry)]
    try:
        await asyncio.wait(waits, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return wanted.is_set()
