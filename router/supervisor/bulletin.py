"""The model table as it is told to everybody: news at once, what only heartbeats move once a second."""

from collections.abc import Callable
from typing import Protocol

from common.messages import Message, ModelEntry, ModelTable
from router.supervisor.control import differs_in_substance
from router.supervisor.model import NEVER

FIGURES_EVERY_S = 1.0


class Post(Protocol):
    """Where messages go; `ControlSocket` in life."""

    def send(self, identity: str, message: Message) -> bool: ...

    def publish(self, table: ModelTable) -> ModelTable: ...


class Bulletin:
    """Remembers what was told last. `show` gets each table that is published."""

    def __init__(self, post: Post, show: Callable[[ModelTable], None]) -> None:
        self._post, self._show = post, show
        self._models: tuple[ModelEntry, ...] | None = None
        self._told_at = NEVER

    def tell(self, table: ModelTable, now: float) -> None:
        """Publish the table if it is due."""
        is_news = self._models is None or differs_in_substance(self._models, table.models)
        if is_news or now >= self.due_at(table.models):
            self._models, self._told_at = table.models, now
            self._show(self._post.publish(table))

    def due_at(self, models: tuple[ModelEntry, ...]) -> float:
        """When figures that differ from those told are to follow; infinity if none do."""
        return self._told_at + FIGURES_EVERY_S if models != self._models else -NEVER
