"""The newest model table of the supervisor: look-ups by name, and waiting until it says something."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from common.errors import ModelNotFound, ModelUnavailable
from common.messages import ModelEntry, ModelTable, WorkerEntry
from common.states import WorkerState

Found = TypeVar("Found")
DEFAULT_ALIAS = "default"
NAMES_IN_MESSAGE = 20
LONG_BACKOFF_S = 5.0  # a model that stays down for longer is not waited for


class Directory:
    """Keeps the newest `ModelTable` and tells its subscribers of each."""

    def __init__(self) -> None:
        self.table: ModelTable | None = None
        self._workers: dict[str, WorkerEntry] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._changed = asyncio.Event()

    def subscribe(self, on_change: Callable[[], None]) -> None:
        self._subscribers.append(on_change)

    def update(self, table: ModelTable) -> None:
        """Take `table` unless it is older than what is known."""
        if self.table is not None and table.revision < self.table.revision:
            return
        self.table = table
        self._workers = {worker.identity: worker for model in table.models for worker in model.workers}
        for on_change in self._subscribers:
            on_change()
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        return self.table.models if self.table else ()

    @property
    def workers(self) -> dict[str, WorkerEntry]:
        """Every worker of every model by identity."""
        return self._workers

    def find(self, name: str) -> ModelEntry | None:
        return next((model for model in self.models if model.name == name), None)

    def named(self, name: str) -> ModelEntry:
        """The model of exactly this name. Raises `ModelNotFound`."""
        if model := self.find(name):
            return model
        raise ModelNotFound(f"model {name!r} is not known; {self._known()}", param="model")

    def resolve(self, name: str | None) -> ModelEntry:
        """The model a request means, by name or by default. Raises `ModelNotFound` with the known names."""
        if name and (name != DEFAULT_ALIAS or self.find(name)):
            return self.named(name)
        default = self.table.default_model if self.table else None
        if default is None:
            raise ModelNotFound(f"model is missing and no default model is set; {self._known()}", param="model")
        if model := self.find(default):
            return model
        raise ModelNotFound(f"the default model {default!r} is not known; {self._known()}", param="model")

    def ready_workers(self, name: str) -> list[WorkerEntry]:
        model = self.find(name)
        return [w for w in model.workers if w.state == WorkerState.READY] if model else []

    async def wait_until(self, look: Callable[[ModelTable], Found | None], timeout_s: float) -> Found:
        """The first result of `look` that is not None, now or after a change. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            while True:
                if self.table is not None and (found := look(self.table)) is not None:
                    return found
                await self._changed.wait()

    def _known(self) -> str:
        names = sorted(model.name for model in self.models)
        more = f" and {len(names) - NAMES_IN_MESSAGE} more" if len(names) > NAMES_IN_MESSAGE else ""
        return f"known models: {', '.join(names[:NAMES_IN_MESSAGE]) or 'none'}{more}"


def failure_of(model: ModelEntry) -> ModelUnavailable:
    return ModelUnavailable(f"model {model.name!r} failed: {model.detail or 'no reason was given'}", param="model")


def check_hope(model: ModelEntry) -> None:
    """Raise `ModelUnavailable` for a model that will not answer for a long while."""
    if model.state == WorkerState.FAILED:
        raise failure_of(model)
    pause_s = model.retry_after_s or 0.0
    reason = model.detail or "reason unknown"
    if model.state == WorkerState.BACKOFF and pause_s > LONG_BACKOFF_S:
        raise ModelUnavailable(
            f"model {model.name!r} died and starts again in {pause_s:.0f} s: {reason}",
            param="model",
            retry_after_s=pause_s,
        )
