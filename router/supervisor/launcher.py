"""Runs worker processes: each from spawn to reaping in a task of its own."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from common import paths
from common.logs import fields
from router.supervisor import process
from router.supervisor.model import slug
from router.supervisor.worker import Worker

log = logging.getLogger(__name__)

OnExit = Callable[[Worker, int, str], None]


class Launcher:
    """What it takes to spawn a worker."""

    def __init__(
        self, commands: process.Commands, run_dir: Path, line: process.Lifeline, tasks: asyncio.TaskGroup
    ) -> None:
        self._commands, self._run_dir, self._line, self._tasks = commands, run_dir, line, tasks

    def launch(self, worker: Worker, on_spawned: Callable[[Worker], None], on_exit: OnExit) -> None:
        """Start its process; both callbacks run on the event loop, the second always, when it was reaped."""
        self._tasks.create_task(self._live(worker, on_spawned, on_exit), name=f"worker {worker.identity}")

    async def _live(self, worker: Worker, on_spawned: Callable[[Worker], None], on_exit: OnExit) -> None:
        model = worker.model
        number = model.workers.index(worker)
        name = slug(model.name) + (f".{number + 1}" if number else "")
        launch = process.WorkerLaunch(
            identity=worker.identity,
            name=model.name,
            path=model.path,
            run_dir=self._run_dir,
            token=worker.token,
            log_path=paths.logs_dir() / f"worker-{name}.log",
        )
        try:
            child = await process.spawn_worker(self._commands, launch, self._line)
        except OSError as error:
            on_exit(worker, 1, f"cannot be spawned: {error.strerror}")
            return
        log.info("worker spawned %s", fields(identity=worker.identity, pid=child.pid, path=model.path))
        worker.child = child
        on_spawned(worker)
        code = await child.wait()
        on_exit(worker, code, child.describe_exit(code, otherwise=worker.note))
