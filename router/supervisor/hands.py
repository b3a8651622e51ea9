"""Does what a worker's machine asks for: spawns its process, sends it orders and signals."""

import logging
import time
from collections.abc import Callable

from common.messages import Drain, Exit
from common.states import WorkerState
from router.supervisor import process
from router.supervisor.bulletin import Post
from router.supervisor.launcher import Launcher, OnExit
from router.supervisor.machine import Action
from router.supervisor.model import slug
from router.supervisor.worker import Worker

log = logging.getLogger(__name__)


class Hands:
    """`living` are the workers with processes, by identity; `nudge` is called when one has got its process."""

    def __init__(self, post: Post, launcher: Launcher, on_exit: OnExit, nudge: Callable[[], None]) -> None:
        self.living: dict[str, Worker] = {}
        self._post, self._launcher, self._on_exit, self._nudge = post, launcher, on_exit, nudge

    def do(self, worker: Worker, action: Action) -> None:
        """One action of its machine; what needs a process is left undone without one."""
        match action:
            case Action.SPAWN:
                self._spawn(worker)
            case Action.SEND_DRAIN:
                self._tell(worker, Drain())
            case Action.SEND_EXIT:
                self._tell(worker, Exit())
            case Action.ABORT if worker.child:
                log.error("worker %s %s", worker.identity, worker.machine.detail)
                worker.child.abort()
            case Action.KILL if worker.child:
                worker.child.kill()

    def bury(self, worker: Worker) -> None:
        """Its process was reaped."""
        self.living.pop(worker.identity, None)
        worker.child, worker.is_connected, worker.heartbeat, worker.note = None, False, None, ""

    def _tell(self, worker: Worker, order: Drain | Exit) -> None:
        """By message if it listens, else by signal."""
        if not (worker.is_connected and self._post.send(worker.identity, order)) and worker.child:
            worker.child.terminate()

    def _spawn(self, worker: Worker) -> None:
        model = worker.model
        model.generations += 1
        model.gives_way = False
        identity = f"{slug(model.name)}#{model.generations}"
        worker.born(model.generations, identity, process.new_token(), time.time())
        self.living[worker.identity] = worker
        self._launcher.launch(worker, self._on_spawned, self._on_exit)

    def _on_spawned(self, worker: Worker) -> None:
        if worker.state is WorkerState.STOPPING and worker.child:  # told to go before it was there
            worker.child.kill()
        self._nudge()
